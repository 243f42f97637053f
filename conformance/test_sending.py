"""Durable messages over `parlour.v1`: sent, waited for, cancelled, and what a late worker is told."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from parlour_v1 import Channel, Field, Kind, Session, frame, pair, raw_frame, write_field
from room import Room, eventually, soon, worker
from test_text import Typist

SPLIT = True
LATE_WORKER = Path(__file__).parent / "late_worker.py"


def name_of(accepted) -> str:
    assert accepted.kind == Kind.ACCEPTED, accepted
    return accepted.get(Field.DELIVERY)


async def ended(channel, name, timeout=20.0):
    """What is known of a delivery once it has ended."""
    return await channel.wait(name, timeout, level="completed")


@pytest.fixture
def kept(tmp_path):
    """Opens hosts on one data directory and one port, one after the other."""
    rooms = []

    def start(**settings):
        port = rooms[0].port if rooms else 0
        rooms.append(Room(port=port, data=tmp_path / "data", **settings))
        return rooms[-1]

    yield start
    for room in rooms:
        if room.process.poll() is None:
            assert room.stop() == 0, "".join(room.stderr)


# A life


async def test_a_message_is_accepted_before_there_is_a_worker_and_its_reply_waited_for(room):
    async with await Channel.open(room.url, feature=["deliveries"]) as sender:
        assert sender.welcome.all(Field.FEATURE) == ["deliveries"]
        async with await Channel.open(room.url) as older:
            assert older.welcome.all(Field.FEATURE) == []
        accepted = await sender.send_durably(
            "later/k", b"hello", data_type="Greeting", metadata={"a": "b"}, conversation="talk"
        )
        name = name_of(accepted)
        assert accepted.get(Field.ACK) == "memory" and accepted.get(Field.GENERATION) == 1
        assert accepted.get(Field.CONVERSATION) == "talk" and accepted.get(Field.KNOWN) is None
        begun = await sender.wait(name, timeout_ms=0)
        assert (begun.kind, begun.get(Field.STATE)) == (Kind.DELIVERY, "accepted")
        assert (begun.get(Field.GENERATION), begun.all(Field.LEVEL)) == (1, ["accepted"])

        async with await Channel.open(room.url) as served:
            await served.register("later")
            call = await served.next(Kind.CALL)
            assert (call.payload, call.metadata) == (b"hello", {"a": "b"})
            assert call.get(Field.DELIVERY) == name and call.get(Field.CONVERSATION) == "talk"
            await served.send(frame(Kind.RECEIVED, id=call.id))
            received = await sender.wait(name, level="received")
            assert received.get(Field.STATE) == "received"
            await served.send(frame(Kind.PROGRESS, b"half of it", id=call.id))
            news = await sender.wait(name, generation=received.get(Field.GENERATION))
            assert (news.get(Field.STATE), news.get(Field.DETAILS)) == ("processing", "half of it")
            assert news.all(Field.LEVEL) == ["processing"]
            await served.reply(call, b"HELLO", data_type="Answer", metadata={"c": "d"})
            found = await ended(sender, name)
    assert (found.get(Field.STATE), found.payload) == ("completed", b"HELLO")
    assert (found.get(Field.DATA_TYPE), found.metadata) == ("Answer", {"c": "d"})
    assert found.get(Field.ATTEMPT) == 1 and found.get(Field.FAULT_KIND) is None
    levels = ["accepted", "dispatched", "received", "processing", "completed"]
    assert found.all(Field.LEVEL) == levels


async def test_it_is_the_same_delivery_through_every_door(room):
    key = uuid.uuid4().hex
    async with await Channel.open(room.url) as sender, await Typist.open(room) as typist:
        name = name_of(await sender.send_durably("doors/k", b"hello", idempotency_key=key))
        again = await asyncio.to_thread(
            room.http, "POST", "/v1/agents/doors/k/deliveries", b"hello", {"idempotency-key": key}
        )
        assert again.status == 202 and name in again.getheader("location")
        typed = await typist.say(
            kind="send", id=1, agent_type="doors", key="k", idempotency_key=key, payload="hello"
        )
        assert (typed["kind"], typed["delivery"], typed["known"]) == ("accepted", name, True)
        with worker(room.url, "doors"):
            found = await typist.say(kind="wait", id=1, delivery=name, level="completed")
        assert (found["state"], found["payload"]) == ("completed", "hello")
        gone = await typist.say(kind="cancel_delivery", id=2, delivery=name)
        assert (gone["kind"], gone["fault_kind"]) == ("fault", "not_found")


async def test_the_same_key_is_accepted_once_and_another_message_under_it_is_a_conflict(room):
    key = uuid.uuid4().hex
    async with await Channel.open(room.url) as sender:
        first = await sender.send_durably("once/k", b"a", idempotency_key=key)
        again = await sender.send_durably("once/k", b"a", idempotency_key=key)
        assert name_of(again) == name_of(first)
        assert (first.get(Field.KNOWN), again.get(Field.KNOWN)) == (None, 1)
        assert again.get(Field.CONVERSATION) == first.get(Field.CONVERSATION)
        assert (await sender.send_durably("once/k", b"b", idempotency_key=key)).fault == "conflict"
        # The control: without a key it is another message.
        assert name_of(await sender.send_durably("once/k", b"a")) != name_of(first)


async def test_one_that_fails_for_good_says_why(start_room):
    room = start_room(durable__backoff_base="1ms")
    async with await Channel.open(room.url) as sender:
        name = name_of(await sender.send_durably("broken/k", max_attempts=2))
        with worker(room.url, "broken", "--", "sh", "-c", "echo no luck >&2; exit 1"):
            found = await ended(sender, name)
    assert (found.get(Field.STATE), found.get(Field.ATTEMPT)) == ("dead", 2)
    assert found.get(Field.FAULT_KIND) == "agent_failed" and "no luck" in found.get(Field.DETAIL)


async def test_what_is_sent_for_later_comes_then_and_what_is_too_late_does_not(room):
    async with await Channel.open(room.url) as sender:
        later = name_of(await sender.send_durably("clock/k", delay_ms=300))
        waits = await asyncio.to_thread(room.get, f"/v1/deliveries/{later}")
        # It counts from the arrival of the frame.
        assert waits["next_attempt_at"] <= waits["accepted_at"] + 300
        with worker(room.url, "clock"):
            await ended(sender, later)
        story = await asyncio.to_thread(room.get, f"/v1/deliveries/{later}")
        begun = next(step for step in story["steps"] if step["level"] == "dispatched")
        assert begun["at"] >= waits["next_attempt_at"]
        short = name_of(await sender.send_durably("nobody/k", ttl_ms=50))
        assert (await ended(sender, short)).get(Field.STATE) == "expired"
        far = name_of(await sender.send_durably("nobody/k", deliver_at=1 << 42))
        assert (await sender.wait(far, timeout_ms=0)).get(Field.STATE) == "accepted"


async def test_what_one_channel_sends_is_accepted_in_its_order(room):
    async with pair(room, "ordered") as (sender, served):
        numbers = [sender.number() for _ in range(100)]
        await sender.send(*(
            frame(Kind.SEND, str(at).encode(), id=number, agent_type="ordered", key="k")
            for at, number in enumerate(numbers)
        ))  # fmt: skip
        for number in numbers:
            name_of(await sender.answer(number))
        calls = [await served.next(Kind.CALL) for _ in numbers]
        assert [call.payload for call in calls] == [str(at).encode() for at in range(100)]
        await served.send(*(frame(Kind.REPLY, id=call.id) for call in calls))
        await ended(sender, calls[-1].get(Field.DELIVERY))


# Giving up


async def test_a_delivery_is_cancelled_and_its_worker_told(room):
    async with pair(room, "cancels") as (sender, served):
        name = name_of(await sender.send_durably("cancels/k"))
        call = await served.next(Kind.CALL)
        done = await sender.request(Kind.CANCEL_DELIVERY, delivery=name, details="enough")
        assert done.kind == Kind.DONE
        assert (await served.next(Kind.CANCEL)).id == call.id
        found = await ended(sender, name)
        assert (found.get(Field.STATE), found.get(Field.DETAILS)) == ("cancelled", "enough")
        again = await sender.request(Kind.CANCEL_DELIVERY, delivery=name)
        assert again.fault == "not_found"


async def test_a_wait_that_is_given_up_ends_and_the_delivery_goes_on(room):
    async with await Channel.open(room.url) as sender:
        name = name_of(await sender.send_durably("nobody/k"))
        number = sender.number()
        await sender.send(frame(Kind.WAIT, id=number, delivery=name, generation=1))
        await sender.send(frame(Kind.CANCEL, id=number), frame(Kind.CANCEL, id=number))
        assert (await sender.answer(number)).fault == "cancelled"
        # Its number is free again.
        await sender.send(frame(Kind.WAIT, id=number, delivery=name, timeout_ms=0))
        assert (await sender.answer(number)).get(Field.STATE) == "accepted"


async def test_nothing_waits_for_longer_than_the_host_allows(start_room):
    room = start_room(durable__longest_wait="50ms")
    async with await Channel.open(room.url) as sender:
        name = name_of(await sender.send_durably("nobody/k"))
        for patience in ({}, {"timeout_ms": 3_600_000}):
            found = await sender.wait(name, generation=1, **patience)
            assert (found.get(Field.STATE), found.all(Field.LEVEL)) == ("accepted", [])


# Crashes


async def test_a_host_that_is_killed_between_send_and_wait_has_kept_it(kept):
    room = await asyncio.to_thread(kept)
    sender = await Channel.open(room.url)
    accepted = await sender.send_durably("echo/k", b"hello", idempotency_key="k")
    assert accepted.get(Field.ACK) == "durable"
    await asyncio.to_thread(room.kill)
    room = await asyncio.to_thread(kept)
    async with await Channel.open(room.url) as sender:
        again = await sender.send_durably("echo/k", b"hello", idempotency_key="k")
        assert (name_of(again), again.get(Field.KNOWN)) == (name_of(accepted), 1)
        with worker(room.url, "echo"):
            found = await ended(sender, name_of(accepted))
        assert (found.get(Field.STATE), found.payload) == ("completed", b"hello")


async def test_the_control_of_that_a_host_that_keeps_nothing_does_not_know_it(start_room):
    room = await asyncio.to_thread(start_room)
    sender = await Channel.open(room.url)
    name = name_of(await sender.send_durably("echo/k", b"hello"))
    await asyncio.to_thread(room.kill)
    room = await asyncio.to_thread(start_room)
    async with await Channel.open(room.url) as sender:
        assert (await sender.wait(name)).fault == "not_found"


async def test_a_session_that_goes_on_hears_what_it_asked_over_its_earlier_socket(room):
    session = Session()
    first = await Channel.open(room.url, session=session)
    name = name_of(await first.send_durably("resumed/k", b"hello"))
    number = first.number()
    await first.send(frame(Kind.WAIT, id=number, delivery=name, level="completed"))
    first.kill()
    async with await Channel.open(room.url, session=session) as second:
        assert second.welcome.get(Field.RESUMED) == 1
        with worker(room.url, "resumed"):
            found = await second.answer(number, 20)
    assert (found.get(Field.STATE), found.payload) == ("completed", b"hello")


# Late workers


async def test_a_reply_of_an_attempt_that_is_over_is_stale_and_changes_nothing(start_room):
    room = start_room(
        durable__attempt_timeout="50ms", durable__backoff_base="1ms", durable__max_attempts=1000
    )
    async with pair(room, "slow") as (sender, served):
        name = name_of(await sender.send_durably("slow/k"))
        first = await served.next(Kind.CALL)
        second = await served.next(Kind.CALL)
        attempts = [call.get(Field.ATTEMPT) for call in (first, second)]
        assert attempts == [1, 2]
        named = {"delivery": name, "attempt": 1}
        await served.reply(first, b"late", **named)
        stale = await served.next(Kind.STALE)
        assert (stale.id, stale.get(Field.DELIVERY), stale.get(Field.ATTEMPT)) == (first.id, name, 1)
        # Under the number of the attempt that runs it is as little.
        await served.send(frame(Kind.FAULT, id=second.id, fault_kind="invalid", **named))
        assert (await served.next(Kind.STALE)).id == second.id
        assert (await sender.wait(name, timeout_ms=0)).get(Field.STATE) != "completed"
        last = second
        while True:
            await served.reply(last, b"in time", delivery=name, attempt=last.get(Field.ATTEMPT))
            found = await sender.wait(name, level="completed", timeout_ms=500)
            if found.get(Field.STATE) == "completed":
                break
            last = await served.next(Kind.CALL)
        assert found.payload == b"in time"


# Two seconds of silence end a session, and with it what its worker was lent.
LEASE = {"timeouts__heartbeat": "1s", "timeouts__grace": "1ms", "durable__backoff_base": "1ms"}


def late_worker(room, name) -> subprocess.Popen:
    """A worker that answers its first call when it is told so on standard input."""
    return subprocess.Popen(
        [sys.executable, LATE_WORKER, room.url, name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(LATE_WORKER.parent)},
    )  # fmt: skip


def says(process) -> str:
    return process.stdout.readline().strip()


@pytest.mark.parametrize("paused", [True, False], ids=["paused", "the control: not paused"])
async def test_what_a_worker_answers_that_was_paused_past_its_lease_is_refused(start_room, paused):
    room = start_room(**LEASE)
    late = late_worker(room, "job")
    try:
        assert await asyncio.to_thread(says, late) == "registered"
        async with await Channel.open(room.url) as sender:
            name = name_of(await sender.send_durably("job/k", b"hello"))
            assert await asyncio.to_thread(says, late) == f"has {name} 1"
            if paused:
                late.send_signal(signal.SIGSTOP)
                with worker(room.url, "job"):
                    found = await ended(sender, name, 30)
                assert (found.get(Field.ATTEMPT), found.payload) == (2, b"hello")
                late.send_signal(signal.SIGCONT)
            late.stdin.write("answer\n")
            late.stdin.flush()
            told = await asyncio.to_thread(says, late)
            found = await ended(sender, name)
            story = await asyncio.to_thread(room.get, f"/v1/deliveries/{name}")
        counted = [step["level"] for step in story["steps"]].count("completed")
        assert counted == 1 and room.metric("parlour_deliveries_completed_total") == 1
        if paused:
            assert told == f"stale {name} 1"
            assert (found.payload, story["lost"]) == (b"hello", 1)
        else:
            assert told == "nothing"
            assert (found.payload, story["lost"]) == (b"late", 0)
    finally:
        late.kill()
        late.wait()


async def test_a_worker_of_the_sdk_that_was_paused_past_its_lease_does_not_count_and_serves_on(
    start_room, tmp_path
):
    room, gate = start_room(**LEASE), tmp_path / "gate"
    program = f"cat > /dev/null; while [ ! -e {gate} ]; do sleep 0.02; done; echo late"
    async with await Channel.open(room.url) as sender:
        name = name_of(await sender.send_durably("both/k", b"hello"))
        with worker(room.url, "both", "--", "sh", "-c", program) as late:
            assert (await sender.wait(name, level="received")).get(Field.STATE) == "received"
            late.send_signal(signal.SIGSTOP)
            with worker(room.url, "both"):
                found = await ended(sender, name, 30)
            assert (found.get(Field.ATTEMPT), found.payload) == (2, b"hello")
            gate.touch()
            late.send_signal(signal.SIGCONT)
            # It is back, and what it is given from now on counts.
            second = name_of(await sender.send_durably("both/k"))
            assert (await ended(sender, second, 30)).payload == b"late\n"
        found = await ended(sender, name)
        story = await asyncio.to_thread(room.get, f"/v1/deliveries/{name}")
    assert (found.payload, story["lost"], story["failed"]) == (b"hello", 1, 0)
    assert [step["level"] for step in story["steps"]].count("completed") == 1


# What nobody should send


async def test_what_cannot_be_meant_is_refused_and_the_channel_goes_on(room):
    async with await Channel.open(room.url) as sender:
        name = name_of(await sender.send_durably("nobody/k"))
        for refused, fields in (
            ("would never be tried", {"max_attempts": 0}),
            ("both given", {"delay_ms": 5, "deliver_at": 5}),
            ("expires before", {"delay_ms": 50, "ttl_ms": 50}),
            ("messages deep", {"hops": 200}),
        ):
            answer = await sender.send_durably("nobody/k", **fields)
            assert answer.fault == "invalid" and refused in answer.get(Field.DETAIL)
        large = await sender.send_durably("nobody/k", b"x" * ((1 << 20) + 1))
        assert large.fault == "too_large"
        unheard = await sender.wait(name, level="done")
        assert unheard.fault == "invalid" and "received" in unheard.get(Field.HINT)
        for unknown in ("0-00000000-1", "9999-00000000-1", name + "0"):
            assert (await sender.wait(unknown, timeout_ms=0)).fault == "not_found"
            done = await sender.request(Kind.CANCEL_DELIVERY, delivery=unknown)
            assert done.fault == "not_found"
        # Times beyond the end of time are only long.
        huge = {"delay_ms": 1 << 62, "max_attempts": 1 << 60}
        assert name_of(await sender.send_durably("nobody/k", **huge))
        assert (await sender.wait(name, generation=1 << 63, timeout_ms=1)).kind == Kind.DELIVERY


@pytest.mark.parametrize(
    "broken",
    [
        frame(Kind.SEND, id=1, agent_type="a"),
        frame(Kind.SEND, agent_type="a", key="k"),
        frame(Kind.SEND, id=0, agent_type="a", key="k"),
        frame(Kind.SEND, id=1, agent_type="a b", key="k"),
        frame(Kind.SEND, id=1, agent_type="a", key="k", delay_ms="soon"),
        frame(Kind.SEND, id=1, agent_type="a", key="k", idempotency_key="x" * 1025),
        frame(Kind.WAIT, id=1),
        frame(Kind.WAIT, id=1, delivery="../../etc"),
        frame(Kind.WAIT, id=1, delivery="1-2-3"),
        frame(Kind.WAIT, delivery="0-00000000-1"),
        frame(Kind.WAIT, id=1, delivery="0-00000000-1", level="x" * 1025),
        frame(Kind.CANCEL_DELIVERY, id=1, delivery="0-00000000-1", details="x" * 1025),
        frame(Kind.CANCEL_DELIVERY, id=1, delivery=7),
        frame(Kind.REPLY, id=1, delivery="x", attempt=1),
        raw_frame(Kind.SEND, write_field(Field.ID, 1), b"")[:-1],
        # What only a host says.
        frame(Kind.ACCEPTED, id=1, delivery="0-00000000-1", conversation="c", ack="durable"),
        frame(Kind.DELIVERY, id=1, delivery="0-00000000-1", state="completed"),
        frame(Kind.STALE, id=1, delivery="0-00000000-1", attempt=1),
    ],
    ids=lambda broken: broken[:24].hex(),
)
async def test_a_frame_that_is_broken_ends_the_channel_with_a_word(room, broken):
    async with await Channel.open(room.url) as sender:
        await sender.send(broken)
        fault = await sender.next(Kind.FAULT)
        assert (fault.id, fault.fault) == (0, "invalid")
        assert await sender.closed() == 1002


async def test_a_number_in_use_is_not_taken_twice(room):
    async with await Channel.open(room.url) as sender:
        name = name_of(await sender.send_durably("nobody/k"))
        await sender.send(
            frame(Kind.WAIT, id=7, delivery=name, generation=1),
            frame(Kind.CALL, id=7, agent_type="nobody", key="k"),
        )
        assert (await sender.next(Kind.FAULT)).id == 0
        assert await sender.closed() == 1002


async def test_a_channel_may_wait_for_so_many_deliveries_and_the_limit_is_named(start_room):
    room = start_room(limits__caller_waits=3)
    async with await Channel.open(room.url) as sender:
        name = name_of(await sender.send_durably("nobody/k"))
        wait = lambda id: frame(Kind.WAIT, id=id, delivery=name, generation=1)  # noqa: E731
        await sender.send(*(wait(id) for id in range(101, 105)))
        refused = await sender.answer(104)
        assert (refused.fault, refused.get(Field.CONFIG_KEY)) == ("overloaded", "limits.caller_waits")
        assert refused.get(Field.LIMIT) == 3 and refused.get(Field.MAY_HAVE_RUN) == 0
        assert room.limit_hits("limits.caller_waits") == 1
        # One that is given up makes room; so does a connection that ends.
        await sender.send(frame(Kind.CANCEL, id=101))
        await sender.answer(101)
        await sender.send(wait(105))
        await sender.request(Kind.CANCEL_DELIVERY, delivery=name)
        for id in (102, 103, 105):
            assert (await sender.answer(id)).get(Field.STATE) == "cancelled"


async def test_a_reply_that_a_slow_reader_has_no_room_for_is_refused_and_can_be_asked_for_again(
    start_room,
):
    room, session = start_room(limits__queue_bytes="1MiB"), Session()
    async with await Channel.open(room.url, session=session, window_messages=1) as sender:
        with worker(room.url, "large"):
            name = name_of(await sender.send_durably("large/k", b"x" * 700_000))
            assert (await ended(sender, name)).get(Field.STATE) == "completed"
        # One has the whole window, one may have the queue, and for the last there is no room.
        sender.acks = False
        await sender.send(*(frame(Kind.WAIT, id=id, delivery=name) for id in (101, 102, 103)))
        full = "limits.queue_bytes"
        await soon(lambda: room.limit_hits(full) >= 1, what="a full queue")
        sender.acks = True
        await sender.acknowledge()
        answers = [await sender.answer(id) for id in (101, 102, 103)]
        refused = [it for it in answers if it.kind == Kind.FAULT]
        told = [len(it.payload) for it in answers if it.kind == Kind.DELIVERY]
        assert refused and told and told == [700_000] * (3 - len(refused))
        assert {(it.fault, it.get(Field.CONFIG_KEY)) for it in refused} == {("overloaded", full)}
        assert len((await sender.wait(name)).payload) == 700_000


async def test_messages_that_are_not_accepted_yet_count_as_calls_in_flight(start_room):
    room = start_room(limits__caller_in_flight=1)
    async with await Channel.open(room.url) as sender:
        call = sender.number()
        async with await Channel.open(room.url) as served:
            await served.register("held")
            await sender.send(
                frame(Kind.CALL, id=call, agent_type="held", key="k"),
                frame(Kind.SEND, id=call + 100, agent_type="held", key="k"),
            )
            refused = await sender.answer(call + 100)
        assert refused.get(Field.CONFIG_KEY) == "limits.caller_in_flight"


def test_who_waits_and_goes_leaves_nothing_behind(room):
    async def come_and_go():
        async with await Channel.open(room.url) as sender:
            name = name_of(await sender.send_durably("nobody/k"))
            waits = (frame(Kind.WAIT, id=id, delivery=name, generation=1) for id in range(100, 1100))
            await sender.send(*waits)
            await sender.wait(name, timeout_ms=0)
            return name

    name = asyncio.run(come_and_go())
    eventually(lambda: room.metric("parlour_channels") == 0, what="the end of the channel")
    answer = room.http("POST", f"/v1/deliveries/{name}/cancel")
    assert answer.status == 200
