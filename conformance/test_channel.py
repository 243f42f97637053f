"""The worker channel `parlour.v1`, frame by frame: how it begins, is read, serves and ends."""

from __future__ import annotations

import asyncio
import time

import pytest

from parlour_v1 import Channel, Field, Kind, frame, pair, raw_frame, varint, write_field

# Every test runs over a network that delivers byte by byte, too.
SPLIT = True


async def refused(channel: Channel, kind="invalid", close=1002) -> str:
    """The text of the fault with which the host ends the connection."""
    fault = await channel.take(lambda f: f.kind == Kind.FAULT and f.id == 0)
    assert fault.fault == kind, fault
    assert await channel.closed() == close
    return fault.get(Field.DETAIL)


# The handshake


async def test_the_handshake_says_what_both_will_speak(room):
    async with await Channel.open(room.url, versions=(7, 1)) as channel:
        assert channel.websocket.subprotocol == "parlour.v1"
        welcome = channel.welcome
        assert welcome.get(Field.VERSION) == 1
        assert welcome.get(Field.MAX_PAYLOAD) == 1 << 20
        assert welcome.get(Field.HEARTBEAT_MS) == 15_000
        assert welcome.get(Field.NAME)


async def test_an_unknown_feature_is_not_agreed_on(room):
    async with await Channel.open(room.url, hello=False) as channel:
        await channel.send(frame(Kind.HELLO, name="x", version=1, feature=["teleport"]))
        assert "teleport" not in (await channel.next(Kind.WELCOME)).all(Field.FEATURE)


async def test_no_common_version_is_a_fault_that_names_the_versions(room):
    channel = await Channel.open(room.url, hello=False)
    await channel.send(frame(Kind.HELLO, name="from the future", version=[2, 3]))
    assert "1" in await refused(channel)


@pytest.mark.parametrize(
    "first",
    [
        frame(Kind.PING, id=1),
        frame(Kind.REGISTER, id=1, agent_type="early"),
        frame(Kind.CALL, id=1, agent_type="early", key="x"),
        frame(Kind.WELCOME, version=1),
    ],
    ids=["ping", "register", "call", "welcome"],
)
async def test_anything_before_hello_ends_the_connection(room, first):
    channel = await Channel.open(room.url, hello=False)
    await channel.send(first)
    await refused(channel)


async def test_a_second_hello_ends_the_connection(room):
    channel = await Channel.open(room.url)
    await channel.send(frame(Kind.HELLO, name="again", version=1))
    await refused(channel)


async def test_a_channel_that_never_says_hello_is_closed(start_room):
    room = start_room(timeouts__handshake="300ms")
    channel = await Channel.open(room.url, hello=False)
    await channel.closed(5)


async def test_a_client_that_asks_for_an_unknown_subprotocol_is_not_given_the_dialect(room):
    answer = await asyncio.to_thread(
        room.http,
        "GET",
        "/open_channel",
        headers={
            "connection": "upgrade",
            "upgrade": "websocket",
            "sec-websocket-version": "13",
            "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
            "sec-websocket-protocol": "parlour.v9",
        },
    )
    assert answer.status == 400


# Frames


async def test_unknown_kinds_and_fields_are_skipped(room):
    async with pair(room, "skips") as (caller, worker):
        strange = (
            varint(1000 << 3) + varint(5)
            + varint(1001 << 3 | 1) + bytes(8)
            + varint(1002 << 3 | 2) + varint(3) + b"abc"
            + varint(1003 << 3 | 5) + bytes(4)
        )  # fmt: skip
        header = (
            strange
            + write_field(Field.ID, 9)
            + write_field(Field.AGENT_TYPE, "skips")
            + write_field(Field.KEY, "x")
        )
        await caller.send(
            raw_frame(200, b"\xff\xff", b"whatever"), raw_frame(Kind.CALL, header, b"body")
        )
        call = await worker.next(Kind.CALL)
        assert call.payload == b"body"
        await worker.send(raw_frame(99, b""), frame(Kind.REPLY, b"reply", id=call.id))
        assert (await caller.answer(9)).payload == b"reply"


async def test_a_message_may_hold_several_frames(room):
    async with pair(room, "many") as (caller, worker):
        calls = [
            frame(Kind.CALL, b"%d" % n, id=n, agent_type="many", key="x") for n in (101, 102, 103)
        ]
        await caller.send(*calls, frame(Kind.PING, id=77))
        assert (await caller.next(Kind.PONG)).id == 77
        got = [await worker.next(Kind.CALL) for _ in range(3)]
        assert [call.payload for call in got] == [b"101", b"102", b"103"]
        await worker.send(*(frame(Kind.REPLY, c.payload, id=c.id) for c in got))
        assert [(await caller.answer(n)).payload for n in (101, 102, 103)] == [
            b"101",
            b"102",
            b"103",
        ]


@pytest.mark.parametrize(
    "message",
    [
        bytes([Kind.PING, 5, 8]),
        bytes([Kind.PING, 2, 8, 1]),
        raw_frame(Kind.PING, b""),
        raw_frame(Kind.PING, b"\x0b"),
        raw_frame(Kind.PING, b"\x0a\x00"),
        raw_frame(Kind.PING, b"\x08" + b"\xff" * 10),
        raw_frame(Kind.CALL, write_field(Field.ID, 1)),
        raw_frame(Kind.PUBLISH, write_field(Field.TOPIC_TYPE, b"\xc3\x28")),
    ],
    ids=[
        "header cut short",
        "payload missing",
        "needed field missing",
        "unknown field type",
        "field of another type",
        "endless varint",
        "call without a target",
        "text that is not UTF-8",
    ],
)
async def test_a_message_that_cannot_be_read_ends_the_connection(room, message):
    async with pair(room, "reads") as (other, worker):
        channel = await Channel.open(room.url)
        await channel.send(message)
        await refused(channel)
        number = await other.begin_call("reads/x")
        await worker.reply(await worker.next(Kind.CALL))
        assert (await other.answer(number)).kind == Kind.REPLY


# Registrations


async def test_a_shared_type_is_served_by_all_and_a_key_sticks_to_one(room):
    async with pair(room, "shared") as (caller, first), await Channel.open(room.url) as second:
        assert (await second.register("shared", capability=["sum"])).kind == Kind.DONE
        serving = {}

        async def serve(worker, name):
            while True:
                call = await worker.next(Kind.CALL, 60)
                serving.setdefault(call.get(Field.KEY), set()).add(name)
                await worker.reply(call)

        tasks = [asyncio.create_task(serve(w, n)) for n, w in enumerate((first, second))]
        for _ in range(2):
            keys = (f"shared/{key}" for key in range(50))
            await asyncio.gather(*(caller.call(agent) for agent in keys))
        for task in tasks:
            task.cancel()
        assert len(serving) == 50 and all(len(names) == 1 for names in serving.values())
        assert set.union(*serving.values()) == {0, 1}


async def test_capabilities_are_shown_to_whoever_lists_agents(room):
    async with pair(room, "able", capability=["sum", "sort"]):
        agents = {agent["type"]: agent for agent in room.get("/v1/agents")["agents"]}
        assert set(agents["able"]["capabilities"]) == {"sum", "sort"}
        assert len(agents["able"]["workers"]) == 1 and agents["able"]["exclusive"] is False


async def test_an_exclusive_type_is_refused_to_a_second_worker_and_freed_by_death(room):
    async with await Channel.open(room.url) as second:
        first = await Channel.open(room.url)
        assert (await first.register("alone", exclusive=True)).kind == Kind.DONE
        for exclusive in (False, True):
            refusal = await second.register("alone", exclusive=exclusive)
            assert refusal.fault == "conflict" and refusal.get(Field.DETAIL)
        first.kill()
        deadline = time.monotonic() + 5
        while (await second.register("alone", exclusive=True)).kind != Kind.DONE:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)


async def test_a_type_that_is_shared_cannot_become_exclusive(room):
    async with pair(room, "common"), await Channel.open(room.url) as second:
        assert (await second.register("common", exclusive=True)).fault == "conflict"


async def test_one_agent_may_be_registered_by_its_key(room):
    async with pair(room, "desk", key="anna") as (caller, worker):
        number = await caller.begin_call("desk/anna")
        await worker.reply(await worker.next(Kind.CALL), b"anna")
        assert (await caller.answer(number)).payload == b"anna"
        assert (await caller.call("desk/bert")).fault == "unknown_agent"


async def test_what_is_unregistered_gets_no_more_calls(room):
    async with pair(room, "leaving") as (caller, worker):
        done = await worker.request(Kind.UNREGISTER, agent_type="leaving")
        assert done.kind == Kind.DONE
        assert (await caller.call("leaving/x")).fault == "unknown_agent"


@pytest.mark.parametrize("name", ["", ".", "..", "not a name", "ü", "a/b", "x" * 200, "nul\0"])
async def test_a_bad_name_is_refused(room, name):
    channel = await Channel.open(room.url)
    await channel.send(frame(Kind.REGISTER, id=1, agent_type=name))
    fault = await channel.next(Kind.FAULT)
    assert fault.fault == "invalid" and fault.get(Field.DETAIL)
    await channel.close()


@pytest.mark.parametrize("key", ["", "new\nline", "x" * 257])
async def test_a_bad_key_is_refused(room, key):
    channel = await Channel.open(room.url)
    await channel.send(frame(Kind.CALL, id=1, agent_type="any", key=key))
    assert (await channel.next(Kind.FAULT)).fault == "invalid"
    await channel.close()


# Coming and going


async def test_a_ping_is_answered_with_its_number(room):
    async with await Channel.open(room.url) as channel:
        await channel.send(frame(Kind.PING, id=2**64 - 1))
        assert (await channel.next(Kind.PONG)).id == 2**64 - 1


async def test_the_host_pings_and_cuts_a_peer_that_is_silent(start_room):
    room = start_room(timeouts__heartbeat="200ms")
    async with await Channel.open(room.url) as alive:
        silent = await Channel.open(room.url)

        async def say_nothing(*_):
            pass

        silent.send = say_nothing
        await silent.closed(10)
        while alive.pings < 5:
            await asyncio.sleep(0.02)
        await alive.send(frame(Kind.PING, id=1))
        assert (await alive.next(Kind.PONG)).id == 1
        assert room.metric("parlour_missed_heartbeats_total") == 1


async def test_a_worker_that_drains_ends_its_calls_and_gets_no_new_ones(room):
    async with pair(room, "drains") as (caller, worker):
        number = await caller.begin_call("drains/x")
        call = await worker.next(Kind.CALL)
        await worker.send(frame(Kind.DRAIN), frame(Kind.PING, id=1))
        await worker.next(Kind.PONG)
        assert (await caller.call("drains/x")).fault == "unknown_agent"
        await worker.reply(call, b"last")
        assert (await caller.answer(number)).payload == b"last"
