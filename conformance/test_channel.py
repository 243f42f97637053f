"""The worker channel `parlour.v1`, frame by frame."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest
from websockets.exceptions import ConnectionClosed

from parlour_v1 import Channel, Field, Kind, frame, raw_frame, varint, write_field


@contextlib.asynccontextmanager
async def pair(room, agent_type: str, **registration):
    """A caller, and a worker that serves this type."""
    async with await Channel.open(room.url) as caller, await Channel.open(room.url) as worker:
        done = await worker.register(agent_type, **registration)
        assert done.kind == Kind.DONE, done
        yield caller, worker


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


# Calls


async def test_a_call_and_its_reply_keep_everything_beside_the_payload(room):
    async with pair(room, "whole") as (caller, worker):
        payload = bytes(range(256)) * 10
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        number = await caller.begin_call(
            "whole/ключ/2",
            payload,
            content_type="application/octet-stream",
            data_type="Blob",
            metadata={"request-type": "sum ✓", "a": ""},
            timeout_ms=5000,
            traceparent=trace,
            idempotency_key="once",
        )
        call = await worker.next(Kind.CALL)
        assert call.payload == payload
        assert (call.get(Field.AGENT_TYPE), call.get(Field.KEY)) == ("whole", "ключ/2")
        assert call.get(Field.CONTENT_TYPE) == "application/octet-stream"
        assert call.get(Field.DATA_TYPE) == "Blob"
        assert call.metadata == {"request-type": "sum ✓", "a": ""}
        assert call.get(Field.TRACEPARENT) == trace
        assert call.get(Field.IDEMPOTENCY_KEY) == "once"
        assert 0 < call.get(Field.TIMEOUT_MS) <= 5000
        # The host names the message; as the first one it names its conversation too.
        assert call.get(Field.MESSAGE_ID) and call.get(Field.CONVERSATION)
        assert call.get(Field.PRINCIPAL) == "anonymous"
        await worker.reply(call, b"\0\xff", content_type="x/y", data_type="Out", metadata={"m": "1"})
        reply = await caller.answer(number)
        assert (reply.kind, reply.payload, reply.metadata) == (Kind.REPLY, b"\0\xff", {"m": "1"})
        assert (reply.get(Field.CONTENT_TYPE), reply.get(Field.DATA_TYPE)) == ("x/y", "Out")


async def test_a_call_without_a_timeout_has_the_default_one_and_none_exceeds_the_longest(room):
    async with pair(room, "patient") as (caller, worker):
        first = await caller.begin_call("patient/x")
        call = await worker.next(Kind.CALL)
        assert 25_000 < call.get(Field.TIMEOUT_MS) <= 30_000
        await worker.reply(call)
        second = await caller.begin_call("patient/x", timeout_ms=10**9)
        call = await worker.next(Kind.CALL)
        assert 595_000 < call.get(Field.TIMEOUT_MS) <= 600_000
        await worker.reply(call)
        assert (await caller.answer(first)).kind == (await caller.answer(second)).kind == Kind.REPLY


async def test_a_workers_fault_reaches_the_caller(room):
    async with pair(room, "faulty") as (caller, worker):
        number = await caller.begin_call("faulty/x")
        call = await worker.next(Kind.CALL)
        await worker.send(
            frame(
                Kind.FAULT,
                id=call.id,
                fault_kind="agent_failed",
                detail="no ☕ left",
                hint="buy some",
                may_have_run=True,
            )
        )
        fault = await caller.answer(number)
        assert fault.fault == "agent_failed" and fault.get(Field.MAY_HAVE_RUN) == 1
        assert (fault.get(Field.DETAIL), fault.get(Field.HINT)) == ("no ☕ left", "buy some")


async def test_an_agent_that_nobody_serves_is_a_fault_that_did_not_run(room):
    async with await Channel.open(room.url) as caller:
        fault = await caller.call("nobody/x")
        assert fault.fault == "unknown_agent" and fault.get(Field.MAY_HAVE_RUN) == 0
        assert fault.get(Field.HINT)


async def test_a_call_that_is_cancelled_ends_once_and_its_worker_is_told(room):
    async with pair(room, "stopped") as (caller, worker):
        number = await caller.begin_call("stopped/x")
        call = await worker.next(Kind.CALL)
        await caller.send(frame(Kind.CANCEL, id=number))
        fault = await caller.answer(number)
        assert fault.fault == "cancelled" and fault.get(Field.MAY_HAVE_RUN) == 1
        assert (await worker.next(Kind.CANCEL)).id == call.id
        # Too late: nobody waits any more.
        await worker.reply(call)
        await worker.request(Kind.SUBSCRIBE, subscription=1, topic_type="sync")
        await caller.request(Kind.SUBSCRIBE, subscription=1, topic_type="sync")
        assert caller.inbox == []


async def test_a_deadline_ends_a_call_and_its_worker_is_told(room):
    async with pair(room, "slow") as (caller, worker):
        number = await caller.begin_call("slow/x", timeout_ms=100)
        call = await worker.next(Kind.CALL)
        fault = await caller.answer(number)
        assert fault.fault == "deadline_exceeded" and fault.get(Field.MAY_HAVE_RUN) == 1
        assert (await worker.next(Kind.CANCEL)).id == call.id


async def test_a_deadline_that_is_over_on_arrival_is_not_delivered(room):
    async with pair(room, "expired") as (caller, worker):
        fault = await caller.call("expired/x", timeout_ms=0)
        assert fault.fault == "deadline_exceeded" and fault.get(Field.MAY_HAVE_RUN) == 0
        await worker.request(Kind.SUBSCRIBE, subscription=1, topic_type="sync")
        assert worker.inbox == []


async def test_a_lost_worker_ends_its_calls_at_once(room):
    async with pair(room, "mortal") as (caller, worker):
        number = await caller.begin_call("mortal/x")
        await worker.next(Kind.CALL)
        killed = time.monotonic()
        worker.kill()
        fault = await caller.answer(number)
        assert fault.fault == "worker_lost" and fault.get(Field.MAY_HAVE_RUN) == 1
        assert time.monotonic() - killed < 5


async def test_a_callers_death_cancels_its_calls(room):
    async with pair(room, "orphan") as (_, worker):
        caller = await Channel.open(room.url)
        await caller.begin_call("orphan/x")
        call = await worker.next(Kind.CALL)
        caller.kill()
        assert (await worker.next(Kind.CANCEL)).id == call.id


async def test_two_callers_with_the_same_ids_each_get_their_own_answers(room):
    async with pair(room, "twins") as (one, worker), await Channel.open(room.url) as two:
        for caller, text in ((one, b"one"), (two, b"two")):
            for number in (1000, 1001, 1002):
                await caller.send(
                    frame(Kind.CALL, text + b" %d" % number, id=number, agent_type="twins", key="x")
                )
        calls = [await worker.next(Kind.CALL) for _ in range(6)]
        assert len({call.id for call in calls}) == 6
        for call in reversed(calls):
            await worker.reply(call, call.payload)
        for caller, text in ((one, b"one"), (two, b"two")):
            for number in (1000, 1001, 1002):
                assert (await caller.answer(number)).payload == text + b" %d" % number


async def test_a_call_id_in_use_is_a_fault(room):
    async with pair(room, "twice") as (caller, worker):
        again = frame(Kind.CALL, id=500, agent_type="twice", key="x")
        await caller.send(again)
        call = await worker.next(Kind.CALL)
        await caller.send(again)
        fault = await caller.next(Kind.FAULT)
        assert fault.fault == "invalid"
        # Both outcomes are seen under one number, so which call ended is not the question here.
        await worker.reply(call)
        assert room.answers()


async def test_a_reply_that_nobody_asked_for_goes_nowhere(room):
    before = room.metric("parlour_replies_unasked_total")
    async with pair(room, "asked") as (caller, worker), await Channel.open(room.url) as stranger:
        number = await caller.begin_call("asked/x")
        call = await worker.next(Kind.CALL)
        for forged in (call.id, number, 0, 2**63):
            await stranger.send(frame(Kind.REPLY, b"forged", id=forged))
            await stranger.send(frame(Kind.FAULT, id=forged, fault_kind="internal", detail="x"))
        await stranger.send(frame(Kind.PING, id=1))
        await stranger.next(Kind.PONG)
        await worker.reply(call, b"honest")
        assert (await caller.answer(number)).payload == b"honest"
    assert room.metric("parlour_replies_unasked_total") >= before + 8


async def test_a_payload_over_the_limit_is_too_large_and_names_its_setting(room):
    async with pair(room, "large") as (caller, worker):
        fault = await caller.call("large/x", bytes((1 << 20) + 1))
        assert fault.fault == "too_large" and fault.get(Field.MAY_HAVE_RUN) == 0
        assert fault.get(Field.CONFIG_KEY) == "limits.payload_bytes"
        assert fault.get(Field.LIMIT) == 1 << 20
        number = await caller.begin_call("large/x", bytes(1 << 20))
        call = await worker.next(Kind.CALL)
        assert len(call.payload) == 1 << 20
        await worker.reply(call, bytes((1 << 20) + 1))
        assert (await caller.answer(number)).fault == "too_large"


async def test_a_message_far_over_the_limit_closes_with_1009(room):
    channel = await Channel.open(room.url)
    with contextlib.suppress(ConnectionClosed):
        await channel.send(bytes(4 << 20))
    assert await channel.closed() in (1009, 1006)


async def test_more_than_16_messages_after_one_another_are_a_loop(room):
    async with pair(room, "loops") as (caller, worker):
        fault = await caller.call("loops/x", hops=17)
        assert fault.fault == "invalid" and fault.get(Field.CONFIG_KEY) == "limits.hops"
        number = await caller.begin_call("loops/x", hops=16)
        call = await worker.next(Kind.CALL)
        assert call.get(Field.HOPS) == 16
        await worker.reply(call)
        assert (await caller.answer(number)).kind == Kind.REPLY


async def test_two_agents_that_call_each_other_without_end_are_stopped(room):
    async with pair(room, "ping") as (caller, first), await Channel.open(room.url) as second:
        await second.register("pong")

        async def bounce(worker, mine, other):
            while True:
                call = await worker.next(Kind.CALL, 60)
                follow_up = asyncio.create_task(
                    worker.call(
                        f"{other}/x",
                        conversation=call.get(Field.CONVERSATION),
                        cause=call.get(Field.MESSAGE_ID),
                        hops=call.get(Field.HOPS, 0) + 1,
                        sender_type=mine,
                        sender_key="x",
                    )
                )

                def pass_on(task, call=call):
                    fault = task.result()
                    text = fault.get(Field.DETAIL)
                    asyncio.ensure_future(
                        worker.send(
                            frame(Kind.FAULT, id=call.id, fault_kind="agent_failed", detail=text)
                        )
                    )

                follow_up.add_done_callback(pass_on)

        tasks = [
            asyncio.create_task(bounce(first, "ping", "pong")),
            asyncio.create_task(bounce(second, "pong", "ping")),
        ]
        fault = await caller.call("ping/x")
        for task in tasks:
            task.cancel()
        assert fault.fault == "agent_failed" and "17 messages" in fault.get(Field.DETAIL)


# Who says so


async def test_a_sender_is_passed_on_only_if_its_connection_serves_it(room):
    before = room.metric("parlour_senders_refused_total")
    async with pair(room, "target") as (caller, worker):
        for served in (False, True):
            if served:
                await caller.register("me")
            number = await caller.begin_call("target/x", sender_type="me", sender_key="k")
            call = await worker.next(Kind.CALL)
            expected = ("me", "k") if served else (None, None)
            assert (call.get(Field.SENDER_TYPE), call.get(Field.SENDER_KEY)) == expected
            await worker.reply(call)
            await caller.answer(number)
    assert room.metric("parlour_senders_refused_total") == before + 1


async def test_a_principal_is_stamped_and_never_believed(room):
    async with pair(room, "trusts") as (caller, worker):
        number = await caller.begin_call("trusts/x", principal="root")
        call = await worker.next(Kind.CALL)
        assert call.get(Field.PRINCIPAL) == "anonymous"
        await worker.reply(call)
        await caller.answer(number)


async def test_a_follow_up_keeps_its_conversation_and_cause(room):
    async with pair(room, "follows") as (caller, worker):
        number = await caller.begin_call(
            "follows/x", conversation="c-1", cause="m-0", message_id="m-1", hops=3
        )
        call = await worker.next(Kind.CALL)
        assert call.get(Field.CONVERSATION) == "c-1"
        assert call.get(Field.CAUSE) == "m-0"
        assert call.get(Field.HOPS) == 3
        await worker.reply(call)
        await caller.answer(number)


# Events


async def test_a_publish_is_acknowledged_with_its_recipients(room):
    async with pair(room, "hears") as (publisher, worker), await Channel.open(room.url) as plain:
        await worker.subscribe(5, topic_type="order.paid", agent_type="hears")
        await plain.subscribe(300, topic_prefix="order.")
        await plain.subscribe(301, topic_type="order.paid")
        done = await publisher.publish(
            "order.paid/shop 7",
            b"\0body",
            content_type="a/b",
            data_type="Order",
            metadata={"k": "v"},
        )
        assert done.kind == Kind.DONE and done.all(Field.DROPPED) == []
        assert done.get(Field.RECIPIENTS) == 3
        event = await worker.next(Kind.EVENT)
        assert event.all(Field.AGENT_TYPE) == ["hears"]
        assert (event.get(Field.TOPIC_TYPE), event.get(Field.SOURCE)) == ("order.paid", "shop 7")
        assert (event.payload, event.metadata) == (b"\0body", {"k": "v"})
        assert (event.get(Field.CONTENT_TYPE), event.get(Field.DATA_TYPE)) == ("a/b", "Order")
        assert event.get(Field.MESSAGE_ID) and event.get(Field.PRINCIPAL) == "anonymous"
        # One frame for a connection, naming each of its subscriptions.
        event = await plain.next(Kind.EVENT)
        assert sorted(event.all(Field.SUBSCRIPTION)) == [300, 301]
        assert (await plain.request(Kind.UNSUBSCRIBE, subscription=301)).kind == Kind.DONE
        assert (await publisher.publish("order.paid/x")).get(Field.RECIPIENTS) == 2
        assert (await plain.next(Kind.EVENT)).all(Field.SUBSCRIPTION) == [300]


async def test_a_publish_to_nobody_is_acknowledged_too(room):
    async with await Channel.open(room.url) as publisher:
        done = await publisher.publish("nobody.cares/x", b"?")
        assert done.kind == Kind.DONE and done.get(Field.RECIPIENTS, 0) == 0


async def test_a_publish_without_a_number_is_not_acknowledged(room):
    async with await Channel.open(room.url) as publisher:
        await publisher.subscribe(1, topic_type="quiet")
        await publisher.send(frame(Kind.PUBLISH, b"x", topic_type="quiet", source="s"))
        # On this channel a publisher that subscribes hears itself.
        assert (await publisher.next(Kind.EVENT)).payload == b"x"
        assert publisher.inbox == []


async def test_the_same_subscription_number_twice_is_refused_and_an_unknown_one_not_found(room):
    async with await Channel.open(room.url) as channel:
        assert (await channel.subscribe(1, topic_type="t")).kind == Kind.DONE
        assert (await channel.subscribe(1, topic_type="u")).fault == "conflict"
        assert (await channel.request(Kind.UNSUBSCRIBE, subscription=9)).fault == "not_found"


async def test_a_star_is_only_a_way_to_write_a_prefix(room):
    async with await Channel.open(room.url) as channel:
        assert (await channel.subscribe(1, topic_prefix="news.*")).kind == Kind.DONE
        assert (await channel.publish("news.tech/x")).get(Field.RECIPIENTS) == 1
        await channel.send(frame(Kind.PUBLISH, id=900, topic_type="news.*", source="x"))
        assert (await channel.next(Kind.FAULT)).fault == "invalid"


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
