"""Sessions that outlive a socket, credit, and progress, as `docs/protocol.md` has them."""

from __future__ import annotations

import asyncio
import signal
import socket
import struct

import pytest
from websockets.exceptions import InvalidStatus

from parlour_v1 import (
    Channel,
    Field,
    Kind,
    Session,
    frame,
    raw_frame,
    varint,
    write_field,
)
from proxy import Proxy
from raw import Raw, request
from room import soon

# Every test runs over a network that delivers byte by byte, too.
SPLIT = True


async def serving(room, agent_type: str, url=None, **fields):
    """A worker that can resume, and its session."""
    session = Session()
    fields = {"name": agent_type} | fields
    worker = await Channel.open(url or room.url, session=session, **fields)
    assert (await worker.register(agent_type)).kind == Kind.DONE
    return worker, session


def named(room, name):
    """What the host says of the workers of this name."""
    return [w for w in room.get("/v1/workers")["workers"] if w["name"] == name]


def seen(room, name):
    """The same of the one worker of this name."""
    (worker,) = named(room, name)
    return worker


async def back(room, worker, session):
    """The worker again, after its socket broke."""
    worker.kill()
    await worker.closed()
    return await Channel.open(room.url, name="back", session=session)


async def test_the_host_says_how_a_session_is_resumed_to_those_who_can(room):
    worker, session = await serving(room, "hello-session")
    welcome = worker.welcome
    assert welcome.all(Field.FEATURE) == ["resume"]
    assert session.name and welcome.get(Field.SESSION) == session.name
    assert welcome.get(Field.GRACE_MS) == 5000
    assert welcome.get(Field.WINDOW_MESSAGES) > 0 and welcome.get(Field.WINDOW_BYTES) > 0
    await worker.close()
    async with await Channel.open(room.url) as simple:
        for absent in (Field.FEATURE, Field.SESSION, Field.GRACE_MS, Field.WINDOW_MESSAGES):
            assert simple.welcome.get(absent) is None


async def test_a_reply_finds_its_caller_over_another_socket(room):
    worker, session = await serving(room, "over")
    async with await Channel.open(room.url) as caller:
        number = await caller.begin_call("over/k", b"one")
        call = await worker.next(Kind.CALL)
        worker = await back(room, worker, session)
        assert worker.welcome.get(Field.RESUMED) == 1
        await worker.reply(call, b"ONE")
        assert (await caller.answer(number)).payload == b"ONE"
        again = await caller.begin_call("over/k", b"two")
        call = await worker.next(Kind.CALL)
        assert call.payload == b"two" and not call.get(Field.RESENT), "the first is not sent again"
        await worker.reply(call)
        assert (await caller.answer(again)).kind == Kind.REPLY
    await worker.close()


async def test_a_session_leaves_a_socket_that_the_host_still_has(room):
    former, session = await serving(room, "moves")
    async with (
        await Channel.open(room.url, name="back", session=session) as worker,
        await Channel.open(room.url) as caller,
    ):
        assert worker.welcome.get(Field.RESUMED) == 1
        await former.closed()
        number = await caller.begin_call("moves/k", b"one")
        await worker.reply(await worker.next(Kind.CALL), b"ONE")
        assert (await caller.answer(number)).payload == b"ONE"


async def test_a_call_that_did_not_arrive_is_sent_again_and_marked(room):
    async with Proxy(room.address) as network, await Channel.open(room.url) as caller:
        worker, session = await serving(room, "again", network.url)
        network.silence(up=False)
        number = await caller.begin_call("again/k", b"lost")
        await soon(lambda: network.held, what="the fault")
        assert worker.inbox == []
        network.cut()
        await worker.closed()
        worker = await Channel.open(room.url, session=session)
        call = await worker.next(Kind.CALL)
        assert (call.payload, call.get(Field.RESENT)) == (b"lost", 1)
        await worker.reply(call, b"found")
        assert (await caller.answer(number)).payload == b"found"
        await worker.close()


async def test_a_reply_that_did_not_arrive_is_sent_again(room):
    async with Proxy(room.address) as network, await Channel.open(room.url) as caller:
        worker, session = await serving(room, "unheard", network.url)
        number = await caller.begin_call("unheard/k")
        call = await worker.next(Kind.CALL)
        network.silence(down=False)
        await worker.reply(call, b"heard")
        await soon(lambda: network.held, what="the fault")
        assert caller.inbox == []
        network.cut()
        await worker.closed()
        worker = await Channel.open(room.url, session=session)
        assert (await caller.answer(number)).payload == b"heard"
        await worker.close()


@pytest.mark.parametrize("resets", [True, False], ids=["reset", "control: end"])
async def test_what_the_host_counted_before_a_socket_broke_it_has_heard(start_room, resets):
    """The reply and the end of its socket are there at once when the host looks."""
    room = start_room()
    worker, session = await serving(room, "last-words")
    async with await Channel.open(room.url) as caller:
        number = await caller.begin_call("last-words/k")
        call = await worker.next(Kind.CALL)
        room.signal(signal.SIGSTOP)
        try:
            await worker.reply(call, b"last")
            if resets:
                end = struct.pack("ii", 1, 0)
                wire = worker.websocket.transport.get_extra_info("socket")
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, end)
            worker.kill()
            await worker.closed()
        finally:
            room.signal(signal.SIGCONT)
        await soon(lambda: not seen(room, "last-words")["connected"], what="the loss")
        worker = await Channel.open(room.url, session=session)
        assert worker.welcome.get(Field.RECEIVED) == 2, "registration and reply are not sent again"
        assert (await caller.answer(number)).payload == b"last"
        await worker.close()


async def test_a_session_goes_on_while_the_host_drains(start_room):
    room = start_room()
    worker, session = await serving(room, "drained")
    async with await Channel.open(room.url) as caller:
        number = await caller.begin_call("drained/k")
        call = await worker.next(Kind.CALL)
        room.signal()
        await worker.next(Kind.DRAIN)
        with pytest.raises(InvalidStatus):
            await Channel.open(room.url)
        worker = await back(room, worker, session)
        assert worker.welcome.get(Field.RESUMED) == 1
        await worker.reply(call, b"done")
        assert (await caller.answer(number)).payload == b"done"
    assert room.wait() == 0


async def test_a_caller_hears_of_its_calls_over_another_socket(room):
    worker, _ = await serving(room, "patient-caller")
    session = Session()
    caller = await Channel.open(room.url, session=session)
    number = await caller.begin_call("patient-caller/k")
    call = await worker.next(Kind.CALL)
    caller = await back(room, caller, session)
    await worker.reply(call, b"here")
    assert (await caller.answer(number)).payload == b"here"
    await caller.close()
    await worker.close()


async def test_calls_wait_for_a_worker_in_grace(room):
    worker, session = await serving(room, "waiting")
    worker.kill()
    await worker.closed()
    async with await Channel.open(room.url) as caller:
        number = await caller.begin_call("waiting/k", b"later")
        short = await caller.call("waiting/k", timeout_ms=100)
        assert short.fault == "deadline_exceeded" and short.get(Field.MAY_HAVE_RUN) == 0
        worker = await Channel.open(room.url, session=session)
        call = await worker.next(Kind.CALL)
        assert call.payload == b"later" and not call.get(Field.RESENT)
        await worker.reply(call)
        assert (await caller.answer(number)).kind == Kind.REPLY
    await worker.close()


async def test_after_the_grace_time_calls_end_and_say_whether_they_may_have_run(start_room):
    room = start_room(timeouts__grace="300ms")
    worker, session = await serving(room, "gone")
    async with await Channel.open(room.url) as caller:
        ran = await caller.begin_call("gone/k")
        await worker.next(Kind.CALL)
        worker.kill()
        await worker.closed()
        waited = await caller.begin_call("gone/k")
        fault = await caller.answer(ran)
        assert fault.fault == "worker_lost" and fault.get(Field.MAY_HAVE_RUN) == 1
        fault = await caller.answer(waited)
        assert fault.get(Field.MAY_HAVE_RUN) == 0, fault
        worker = await Channel.open(room.url, session=session)
        assert not worker.welcome.get(Field.RESUMED)
        await worker.close()


async def test_at_the_end_of_grace_calls_that_were_not_sent_go_to_another_worker(start_room):
    room = start_room(timeouts__grace="2s")
    worker, _ = await serving(room, "movable")
    worker.kill()
    await worker.closed()
    async with await Channel.open(room.url) as caller:
        number = await caller.begin_call("movable/k")
        other, _ = await serving(room, "movable", name="another")
        call = await other.next(Kind.CALL)
        await other.reply(call, b"moved")
        assert (await caller.answer(number)).payload == b"moved"
        await other.close()


async def test_a_goodbye_leaves_no_grace(start_room):
    room = start_room(timeouts__grace="10m")
    worker, session = await serving(room, "polite")
    async with await Channel.open(room.url) as caller:
        number = await caller.begin_call("polite/k")
        await worker.next(Kind.CALL)
        await worker.close()
        assert (await caller.answer(number)).fault == "worker_lost"
    worker = await Channel.open(room.url, session=session)
    assert not worker.welcome.get(Field.RESUMED)
    await worker.close()


async def test_a_worker_that_is_started_anew_takes_over_from_its_former_self(room):
    worker, _ = await serving(room, "reborn")
    async with await Channel.open(room.url) as caller:
        ran = await caller.begin_call("reborn/k")
        await worker.next(Kind.CALL)
        worker.kill()
        await worker.closed()
        waited = await caller.begin_call("reborn/k")
        worker, _ = await serving(room, "reborn")
        assert (await caller.answer(ran)).fault == "worker_lost"
        await worker.reply(await worker.next(Kind.CALL))
        assert (await caller.answer(waited)).kind == Kind.REPLY
    await worker.close()


async def test_a_worker_takes_over_from_sessions_alone(start_room):
    """A client of the older dialect that waits for its socket is nobody's former self."""
    room = start_room()
    registered = room.rpc("runtime.register_agent", {"type": "older-dialect"}, client="waits")
    assert registered["result"]
    workers = room.get("/v1/workers")["workers"]
    name = next(w["name"] for w in workers if "older-dialect" in w["agent_types"])
    former, _ = await serving(room, "former", name=name)
    former.kill()
    await former.closed()
    await soon(lambda: not any(w["connected"] for w in named(room, name)), what="the loss")
    worker, _ = await serving(room, "former", name=name)
    await soon(lambda: len(named(room, name)) == 2, what="the end of the former session")
    assert "older-dialect" in [agent["type"] for agent in room.get("/v1/agents")["agents"]]
    await worker.close()


async def test_a_session_that_is_not_known_begins_anew(room):
    session = Session(name="0123456789abcdef", received=3)
    worker = await Channel.open(room.url, session=session)
    assert not worker.welcome.get(Field.RESUMED) and session.name != "0123456789abcdef"
    assert (await worker.register("anew")).kind == Kind.DONE
    await worker.close()


@pytest.mark.parametrize("received", [100, 2**63])
async def test_a_count_that_cannot_be_ends_the_session(room, received):
    worker, session = await serving(room, "miscounted")
    await worker.send(frame(Kind.ACK, received=received))
    fault = await worker.take(lambda f: f.kind == Kind.FAULT and f.id == 0)
    assert fault.fault == "invalid"
    assert await worker.closed() == 1002
    worker = await Channel.open(room.url, session=session)
    assert not worker.welcome.get(Field.RESUMED)
    await worker.close()


async def test_one_that_gives_no_credit_is_told_of_its_breach(room):
    worker, session = await serving(room, "breaching", window_messages=1)
    worker.acks = False
    async with await Channel.open(room.url) as caller:
        for _ in range(2):
            await caller.begin_call("breaching/k")
        await soon(lambda: seen(room, "breaching")["queued"], what="a call that waits for credit")
        assert seen(room, "breaching")["credit"] == 0
        await worker.send(frame(Kind.ACK, received=100))
        fault = await worker.next(Kind.FAULT)
        assert (fault.id, fault.fault) == (0, "invalid")
        assert await worker.closed() == 1002


async def test_a_session_has_the_credit_that_it_began_with(room):
    worker, session = await serving(room, "unchanging", window_messages=7)
    worker.kill()
    await worker.closed()
    worker = await Channel.open(room.url, session=session, window_messages=5)
    assert worker.welcome.get(Field.RESUMED) == 1
    assert worker.welcome.get(Field.WINDOW_MESSAGES) == 7
    await worker.close()


async def test_no_more_is_sent_than_there_is_credit_for(room):
    worker, session = await serving(room, "thrifty", window_messages=2)
    worker.acks = False
    async with await Channel.open(room.url) as caller:
        for _ in range(4):
            await caller.begin_call("thrifty/k")
        await worker.next(Kind.CALL)
        await worker.next(Kind.CALL)
        shown = await soon(lambda: (one := seen(room, "thrifty"))["queued"] == 2 and one)
        assert (shown["credit"], worker.inbox) == (0, [])
        await worker.send(frame(Kind.ACK, received=session.received))
        await worker.next(Kind.CALL)
        await worker.next(Kind.CALL)
    await worker.close()


async def test_credit_is_in_bytes_too(room):
    worker, session = await serving(room, "narrow", window_bytes=1000)
    worker.acks = False
    async with await Channel.open(room.url) as caller:
        # One that is larger than the window goes out, and uses it up.
        for payload in (bytes(100_000), b"x", b"y"):
            await caller.begin_call("narrow/k", payload)
        await worker.next(Kind.CALL)
        shown = await soon(lambda: (one := seen(room, "narrow"))["queued"] == 2 and one)
        assert (shown["credit"], worker.inbox) == (0, [])
        worker.acks = True
        await worker.acknowledge()
        await worker.next(Kind.CALL)
        await worker.next(Kind.CALL)
    await worker.close()


async def test_one_that_acknowledges_nothing_is_cut(start_room):
    room = start_room(timeouts__stalled_write="300ms")
    worker, _ = await serving(room, "mute", window_messages=1)
    worker.acks = False
    async with await Channel.open(room.url) as caller:
        first, second = await caller.begin_call("mute/k"), await caller.begin_call("mute/k")
        for number in (first, second):
            assert (await caller.answer(number)).fault in ("worker_lost", "unknown_agent")
    await worker.closed()
    assert room.metric("parlour_stalled_writes_total") == 1


async def test_the_host_acknowledges_before_its_window_is_used_up(start_room):
    room = start_room(limits__queue_messages=8)
    session = Session()
    caller = await Channel.open(room.url, session=session)
    window = caller.welcome.get(Field.WINDOW_MESSAGES)
    assert window == 8
    for _ in range(3 * window):
        assert (await caller.call("nobody/k")).fault == "unknown_agent"
        assert len(session.kept) < window
    await caller.close()


async def test_a_caller_hears_of_progress_if_it_asks(room):
    worker, _ = await serving(room, "talker")
    async with await Channel.open(room.url) as caller:
        for asks in (True, False):
            number = await caller.begin_call("talker/k", progress=asks)
            call = await worker.next(Kind.CALL)
            assert bool(call.get(Field.PROGRESS)) is asks
            for text in (b"one", b"two"):
                await worker.send(frame(Kind.PROGRESS, text, id=call.id, data_type="Token"))
            await worker.reply(call, b"three")
            assert (await caller.answer(number)).payload == b"three"
            told = [f for f in caller.inbox if f.kind == Kind.PROGRESS]
            caller.inbox.clear()
            assert [(f.id, f.payload) for f in told] == (
                [(number, b"one"), (number, b"two")] if asks else []
            )
    await worker.close()


async def test_progress_for_one_that_reads_none_of_it_over_http_is_bounded_in_bytes(start_room):
    room = start_room()
    before = room.rss()
    payload = b"x" * 1_000_000
    async with await Channel.open(room.url) as worker:
        await worker.register("verbose")
        with Raw(room, receive_buffer=4096) as reader:
            accept = "Accept: text/event-stream"
            path = "/v1/agents/verbose/k/call"
            reader.send(request("POST", path, reader.host, b"x", accept))
            call = await worker.next(Kind.CALL)
            # Fewer messages than may wait, and many times the bytes.
            for _ in range(100):
                await worker.send(frame(Kind.PROGRESS, payload, id=call.id))
            await worker.next(Kind.CANCEL)
            assert room.limit_hits("limits.queue_bytes") == 1
            assert room.rss() - before <= 48 << 20


async def test_progress_of_calls_that_are_not_in_flight_is_dropped(room):
    worker, _ = await serving(room, "babbler")
    async with await Channel.open(room.url) as caller:
        number = await caller.begin_call("babbler/k", progress=1)
        call = await worker.next(Kind.CALL)
        await worker.reply(call)
        await worker.send(frame(Kind.PROGRESS, b"late", id=call.id))
        await worker.send(frame(Kind.PROGRESS, b"invented", id=999))
        assert (await caller.answer(number)).kind == Kind.REPLY
        # The host has heard all that, and then writes all that it has for the caller.
        assert (await worker.call("nobody/k")).fault == "unknown_agent"
        assert (await caller.call("nobody/k")).fault == "unknown_agent"
        assert caller.inbox == []
    await worker.close()


@pytest.mark.parametrize("limit", [4, 16_000], ids=["limited", "control: not"])
async def test_no_more_sessions_wait_than_there_may_be_connections(start_room, limit):
    room = start_room(limits__connections=limit, timeouts__grace="1m")
    for number in range(12):
        worker, _ = await serving(room, f"waits-{number}")
        worker.kill()
        await worker.closed()
        await soon(lambda: room.metric("parlour_channels") == 0, what="the loss")
    waiting = min(limit, 12)
    await soon(lambda: len(room.get("/v1/workers")["workers"]) == waiting, what="the others' end")
    assert room.limit_hits("limits.connections") == 12 - waiting


async def test_sessions_are_not_kept_for_ever(start_room):
    room = start_room(timeouts__grace="100ms")
    for _ in range(20):
        worker, _ = await serving(room, "leaver")
        worker.kill()
        await worker.closed()
    await soon(lambda: room.get("/v1/workers")["workers"] == [], what="the end of all of them")


# Versions


async def test_a_newer_client_and_this_host_agree(room):
    """Everything that a later version may bring is skipped, and what is skipped still counts."""
    session = Session()
    unknown = raw_frame(200, write_field(900, 7) + write_field(901, "new"), b"payload")
    newer = {"feature": ["teleport", "resume"]}
    worker = await Channel.open(room.url, versions=(1, 2, 9), session=session, hello=False)
    hello = frame(Kind.HELLO, name="newer", version=[1, 2, 9], **newer)
    length, header = hello[1], hello[2:-1]
    header += write_field(900, 1)
    await worker.send(bytes([Kind.HELLO]) + varint(len(header)) + header + b"\0")
    assert length < 128, "its length is one byte"
    welcome = await worker.next(Kind.WELCOME)
    assert (welcome.get(Field.VERSION), welcome.all(Field.FEATURE)) == (1, ["resume"])
    await worker.send(unknown, frame(Kind.REGISTER, id=1, agent_type="newer"), unknown)
    assert (await worker.answer(1)).kind == Kind.DONE
    worker.kill()
    await worker.closed()
    worker = await Channel.open(room.url, session=session)
    assert worker.welcome.get(Field.RECEIVED) == 3
    await worker.close()


async def test_an_older_client_and_this_host_agree(room):
    """One that knows neither sessions nor progress is served as before they were there."""
    async with await Channel.open(room.url) as worker, await Channel.open(room.url) as caller:
        await worker.register("older")
        number = await caller.begin_call("older/k")
        await worker.reply(await worker.next(Kind.CALL))
        assert (await caller.answer(number)).kind == Kind.REPLY
        for channel in (worker, caller):
            assert [f for f in channel.inbox if f.kind > Kind.DRAIN] == []
