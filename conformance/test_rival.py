"""What users of AGNTCY SLIM 3.4 run into, and do not run into here: a test for each of the failures
that were met while it was measured, each with a control that shows the other outcome."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal

from parlour_v1 import Channel, Field, Kind, Session
from proxy import Proxy
from raw import Raw, request
from room import Room, eventually, worker

# It never answers, and ends with the worker that started it.
STUCK = ("--", "sh", "-c", "while kill -0 $PPID 2>/dev/null; do sleep 0.1; done")
PATIENT = 100_000
"""A deadline, in milliseconds, that no test lives to see."""


def workers(room: Room, name: str) -> list[dict]:
    """The workers of that name that have a socket."""
    known = room.get("/v1/workers")["workers"]
    return [one for one in known if one["name"] == name and one["connected"]]


async def until(holds, what: str):
    return await asyncio.to_thread(eventually, holds, 30, what)


async def there(room: Room, agent_type: str, count=1):
    await until(lambda: len(workers(room, agent_type)) == count, f"{count} workers of {agent_type}")


async def stuck_call(room: Room, caller: Channel, agent_type: str, **fields) -> int:
    """A call that its worker has, and does not answer."""
    number = await caller.begin_call(f"{agent_type}/k", b"x", **fields)
    running = lambda: any(one["in_flight"] for one in workers(room, agent_type))  # noqa: E731
    await until(running, "the call reaching its worker")
    return number


# A call to a name that nobody serves waits for its deadline.


async def test_a_call_to_a_name_that_nobody_serves_ends_at_once(room):
    async with await Channel.open(room.url) as caller:
        fault = await caller.call("nobody/k", timeout_ms=PATIENT)
        assert fault.fault == "unknown_agent"
        assert not fault.get(Field.MAY_HAVE_RUN) and fault.get(Field.HINT)


async def test_control_a_call_that_nobody_answers_ends_at_its_deadline_and_says_so(room):
    async with await Channel.open(room.url) as caller, await Channel.open(room.url) as silent:
        await silent.register("silent")
        fault = await caller.call("silent/k", timeout_ms=200)
        assert fault.fault == "deadline_exceeded" and fault.get(Field.MAY_HAVE_RUN)


# A worker that is killed in the middle is noticed only at the deadline.


async def test_a_worker_that_is_killed_in_the_middle_ends_its_calls_long_before_their_deadline(
    start_room,
):
    room = start_room(timeouts__grace="300ms")
    with worker(room.url, "doomed", *STUCK) as process:
        await there(room, "doomed")
        async with await Channel.open(room.url) as caller:
            number = await stuck_call(room, caller, "doomed", timeout_ms=PATIENT)
            process.kill()
            fault = await caller.answer(number)
            assert fault.fault == "worker_lost" and fault.get(Field.MAY_HAVE_RUN)


async def test_control_a_worker_that_is_stopped_and_not_killed_is_not_noticed_so_soon(start_room):
    room = start_room(timeouts__grace="300ms")
    with worker(room.url, "frozen", *STUCK) as process:
        await there(room, "frozen")
        async with await Channel.open(room.url) as caller:
            number = await stuck_call(room, caller, "frozen", timeout_ms=1500)
            process.send_signal(signal.SIGSTOP)
            assert (await caller.answer(number)).fault == "deadline_exceeded"


# A kept channel stays pinned to the dead worker: every call fails though a new one is there.


async def test_a_kept_connection_reaches_the_worker_that_came_after_a_dead_one(start_room):
    room = start_room(timeouts__grace="300ms")
    async with await Channel.open(room.url) as caller:
        with worker(room.url, "phoenix", *STUCK) as process:
            await there(room, "phoenix")
            number = await stuck_call(room, caller, "phoenix", timeout_ms=PATIENT)
            process.kill()
            assert (await caller.answer(number)).fault == "worker_lost"
            # The control: with no new worker there is nobody to call.
            assert (await caller.call("phoenix/k")).fault == "unknown_agent"
        with worker(room.url, "phoenix"):
            await there(room, "phoenix")
            answers = [await caller.call(f"phoenix/{n}", b"hello") for n in range(21)]
            assert [answer.payload for answer in answers] == [b"hello"] * 21


async def test_a_new_worker_need_not_wait_until_the_dead_one_is_given_up(start_room):
    # Longer than any test: what is there to wait for is not waited for.
    room = start_room(timeouts__grace="100s")
    async with await Channel.open(room.url) as caller:
        with worker(room.url, "heir", *STUCK) as process:
            await there(room, "heir")
            number = await stuck_call(room, caller, "heir", timeout_ms=PATIENT)
            process.kill()
            await there(room, "heir", 0)
            with worker(room.url, "heir"):
                assert (await caller.answer(number)).fault == "worker_lost"
                answers = [await caller.call(f"heir/{n}", b"hello") for n in range(21)]
                assert [answer.payload for answer in answers] == [b"hello"] * 21


# The first message after the kill is acknowledged though it was never received.


async def test_the_first_call_after_a_kill_is_not_acknowledged(start_room):
    room = start_room(timeouts__grace="300ms")
    with worker(room.url, "gone") as process:
        await there(room, "gone")
        async with await Channel.open(room.url) as caller:
            # The control: before the kill it is.
            assert (await caller.call("gone/k", b"before")).payload == b"before"
            process.kill()
            fault = await caller.call("gone/k", b"after", timeout_ms=PATIENT)
            assert fault.fault in ("worker_lost", "unknown_agent")


async def test_an_event_for_a_subscriber_that_broke_off_counts_as_received_by_nobody(start_room):
    room = start_room()
    async with await Channel.open(room.url) as publisher:
        subscriber = await Channel.open(room.url)
        await subscriber.subscribe(1, topic_type="news")
        # The control: while it is there it counts, and has it.
        assert (await publisher.publish("news/now", b"1")).get(Field.RECIPIENTS) == 1
        assert (await subscriber.next(Kind.EVENT)).payload == b"1"
        subscriber.kill()
        await until(lambda: room.metric("parlour_channels") == 1, "the host noticing")
        assert (await publisher.publish("news/now", b"2")).get(Field.RECIPIENTS, 0) == 0


# After `kill -9` of the node and a restart, 24 of 24 clients give up reconnecting.


async def test_24_workers_are_back_after_kill_9_of_the_host(start_room):
    first = start_room()
    async with Proxy(first.address) as network:
        with contextlib.ExitStack() as stack:
            for number in range(24):
                stack.enter_context(worker(network.url, f"loyal-{number}"))
            await until(lambda: len(first.get("/v1/agents")["agents"]) == 24, "24 agents")
            # The control: one that does not connect again, and that the new host does not know of.
            fickle = await Channel.open(network.url)
            await fickle.register("fickle")

            first.signal(signal.SIGKILL)
            await asyncio.to_thread(first.process.wait)
            await fickle.closed()
            second = start_room()
            network.address = second.address
            await until(lambda: len(second.get("/v1/agents")["agents"]) == 24, "24 agents again")
            async with await Channel.open(second.url) as caller:
                for number in range(24):
                    answer = await caller.call(f"loyal-{number}/k", b"hello", timeout_ms=PATIENT)
                    assert answer.payload == b"hello"
                assert (await caller.call("fickle/k")).fault == "unknown_agent"


# Nothing is kept for a receiver that is away.


async def test_a_call_for_a_worker_that_is_away_waits_until_it_is_back(room):
    session = Session()
    away = await Channel.open(room.url, name="away", session=session)
    await away.register("away")
    async with await Channel.open(room.url) as caller:
        away.kill()
        await there(room, "away", 0)
        number = await caller.begin_call("away/k", b"kept", timeout_ms=PATIENT)
        back = await Channel.open(room.url, name="away", session=session)
        call = await back.next(Kind.CALL)
        await back.reply(call, b"had it")
        assert (call.payload, (await caller.answer(number)).payload) == (b"kept", b"had it")
        await back.close()


async def test_control_a_worker_that_stays_away_loses_the_call_and_its_caller_is_told(start_room):
    room = start_room(timeouts__grace="1s")
    away = await Channel.open(room.url, name="away", session=Session())
    await away.register("away")
    async with await Channel.open(room.url) as caller:
        away.kill()
        await there(room, "away", 0)
        fault = await caller.call("away/k", b"kept", timeout_ms=PATIENT)
        assert fault.fault == "worker_lost" and not fault.get(Field.MAY_HAVE_RUN)


# There are no dead letters: what nobody took is lost without a word.


async def test_a_publisher_is_told_who_did_not_take_an_event(start_room):
    room = start_room(limits__queue_messages="64", timeouts__stalled_write="60s")
    async with await Channel.open(room.url) as publisher:
        with Raw(room, receive_buffer=4096) as slow:
            slow.send(request("GET", "/v1/topics/busy/events", "localhost"))
            assert slow.answer(head_only=True).status == 200
            # The control: as long as there is room, nobody is named.
            assert not (await publisher.publish("busy/s", b"small")).all(Field.DROPPED)
            # The sockets between take some megabytes before the queue fills.
            for _ in range(500):
                done = await publisher.publish("busy/s", bytes(64 << 10))
                if done.all(Field.DROPPED):
                    break
            assert done.all(Field.DROPPED)
            assert room.metric("parlour_events_dropped_total") >= 1


# There is no door for HTTP.


async def test_an_agent_is_called_and_a_topic_is_followed_by_plain_http(room):
    async with await Channel.open(room.url) as serving:
        await serving.register("plain")
        asking = asyncio.create_task(
            asyncio.to_thread(room.http, "POST", "/v1/agents/plain/k/call", b"hello")
        )
        await serving.reply(await serving.next(Kind.CALL), b"world")
        answer = await asking
        assert (answer.status, answer.body) == (200, b"world")
        # The control: of an agent that is not there HTTP says so.
        answer = await asyncio.to_thread(room.http, "POST", "/v1/agents/nowhere/k/call", b"hello")
        assert (answer.status, json.loads(answer.body)["kind"]) == (404, "unknown_agent")


# There are no topics that one can subscribe to oneself.


async def test_anyone_subscribes_to_topics_without_an_agent(room):
    async with await Channel.open(room.url) as listener, await Channel.open(room.url) as publisher:
        await listener.subscribe(7, topic_prefix="weather.")
        # The control: another topic does not arrive, and counts nobody.
        assert (await publisher.publish("tides.sea/now", b"no")).get(Field.RECIPIENTS, 0) == 0
        assert (await publisher.publish("weather.rain/now", b"yes")).get(Field.RECIPIENTS) == 1
        event = await listener.next(Kind.EVENT)
        assert (event.payload, event.all(Field.SUBSCRIPTION)) == (b"yes", [7])
