"""What is promised of each message, with hosts and workers that die in between."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from history import End, check
from parlour_v1 import Channel, Field, Kind, frame
from room import eventually, soon, worker
from test_durable import ended, levels, look, send


def ready(room) -> bool:
    return room.http("GET", "/readyz").status == 200


# The same message, sent often (S3, S4)


def test_one_that_is_sent_a_hundred_times_at_once_before_and_after_a_restart_is_one(kept):
    room = kept()
    with ThreadPoolExecutor(20) as pool:
        first = list(pool.map(lambda _: send(room, idempotency_key="often"), range(100)))
        room.kill()
        room = kept()
        again = list(pool.map(lambda _: send(room, idempotency_key="often"), range(100)))
    assert all(answer == first[0] for answer in first + again)
    refused = send(room, body=b"other", expect=409, idempotency_key="often")
    # With what it was used for, and for what now.
    assert len(set(re.findall(r"\b[0-9a-f]{16}\b", refused["detail"]))) == 2
    eventually(lambda: ready(room))
    assert room.metric("parlour_deliveries_accepted_total") == 1


# Attempts (S5, D11)


async def test_failures_are_counted_through_restarts_and_the_last_is_the_end(kept):
    settings = {"durable__backoff_base": "1ms", "durable__max_attempts": 4}
    room = await asyncio.to_thread(kept, **settings)
    name = (await asyncio.to_thread(send, room, "poison/k"))["id"]
    for attempt in range(1, 5):
        async with await Channel.open(room.url) as channel:
            await channel.register("poison")
            call = await channel.next(Kind.CALL)
            assert call.get(Field.ATTEMPT) == attempt
            # Late enough for the host to die in between.
            fault = {"fault_kind": "agent_failed", "detail": f"no luck {attempt}", "may_have_run": 1}
            await channel.send(frame(Kind.FAULT, id=call.id, retry_after_ms=300, **fault))
            failed = lambda: look(room, name)["failed"] == attempt  # noqa: B023, E731
            await soon(failed, what="the failure is known")
            await asyncio.to_thread(room.kill)
        room = await asyncio.to_thread(kept, **settings)
    found = await asyncio.to_thread(look, room, name)
    assert (found["state"], found["attempt"], found["failed"], found["lost"]) == ("dead", 4, 4, 0)
    told = [step["fault"]["detail"] for step in found["steps"] if step["level"] in ("failed", "dead")]
    assert [text.rsplit(" ", 1)[1] for text in told] == ["1", "2", "3", "4"]


def test_a_worker_that_stood_still_for_too_long_changes_nothing_when_it_goes_on(start_room, tmp_path):
    room = start_room(timeouts__heartbeat="100ms", timeouts__grace="1ms", durable__backoff_base="1ms")
    begun = tmp_path / "begun"
    with worker(room.url, "job", "--", "sh", "-c", f"touch {begun}; sleep 0.2; echo first") as first:
        name = send(room, "job/k")["id"]
        eventually(begun.exists, what="the first attempt")
        first.send_signal(signal.SIGSTOP)
        eventually(lambda: look(room, name)["lost"] == 1, what="the loss")
        with worker(room.url, "job", "--", "echo", "second"):
            story = ended(room, name)
            first.send_signal(signal.SIGCONT)
            # It has come back and been told: its answer was to an attempt that is over.
            served = lambda: len(room.get("/v1/workers")["workers"]) == 2  # noqa: E731
            eventually(served, what="the first worker comes back")
            other = send(room, "job/k")["id"]
            ended(room, other)
    assert (story["state"], story["attempt"], story["lost"]) == ("completed", 2, 1)
    assert look(room, name) == story
    assert room.http("GET", f"/v1/deliveries/{name}/reply").body == b"second\n"


# Order (S9)


async def test_sixteen_workers_begin_what_two_hundred_keys_have_in_order_and_lose_nothing(start_room):
    room = start_room(timeouts__grace="1ms", durable__backoff_base="1ms")
    published, ran = [], []

    def publish(publisher):
        for number in range(5):
            for key in range(publisher, 200, 8):
                token = f"{key}-{number}"
                entry = {"token": token, "agent": f"list/{key}"}
                published.append({"op": "try", "seq": number, **entry})
                name = send(room, entry["agent"], token.encode())["id"]
                published.append({"op": "acked", "id": name, **entry})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(publish, range(8)))

    async def serve(number):
        luck, born = random.Random(number), 0
        while True:
            born += 1
            channel = await Channel.open(room.url)
            try:
                await channel.register("list")
                while luck.random() > 0.01:
                    call = await channel.next(Kind.CALL, 60)
                    key = call.get(Field.KEY)
                    ran.append(
                        {"id": call.get(Field.DELIVERY), "attempt": call.get(Field.ATTEMPT),
                         "agent": f"list/{key}", "token": call.payload.decode(),
                         "worker": f"{number}.{born}", "at": int(1000 * time.time())}
                    )  # fmt: skip
                    if luck.random() < 0.02:
                        fault = {"fault_kind": "agent_failed", "detail": "no luck", "may_have_run": 1}
                        await channel.send(frame(Kind.FAULT, id=call.id, **fault))
                    else:
                        await channel.reply(call, call.payload)
            finally:
                channel.kill()

    workers = [asyncio.create_task(serve(number)) for number in range(16)]
    ends = lambda: room.metric("parlour_deliveries_completed_total") == 1000  # noqa: E731
    await soon(ends, timeout=60, what="all are completed")
    for task in workers:
        task.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    end = End()
    for entry in published:
        if entry["op"] == "acked":
            found = await asyncio.to_thread(look, room, entry["id"])
            end.deliveries[entry["id"]] = {**found, "reply": entry["token"]}
    report = check(published, ran, end)
    assert report.is_clean() and report.duplicates, report


# Time (S10)


def test_what_is_to_come_later_comes_after_a_restart_and_not_sooner(kept):
    room = kept()
    soon = send(room, "late/1", parlour_delay_ms=50)["id"]
    later = send(room, "late/2", parlour_delay_ms=1500)["id"]
    short = send(room, "nobody/3", parlour_ttl_ms=50)["id"]
    long = send(room, "late/4", parlour_ttl_ms=60_000)["id"]
    before = look(room, later)
    room.kill()
    # Until the times of two of them have passed, so that they are late: there is no other way.
    time.sleep(0.1)
    room = kept()
    assert look(room, later) == before
    with worker(room.url, "late"):
        found = {name: ended(room, name, timeout=8) for name in (soon, later, short, long)}
    assert [found[name]["state"] for name in (soon, later, short, long)] == [
        "completed", "completed", "expired", "completed",
    ]  # fmt: skip
    begun = next(step for step in found[later]["steps"] if step["level"] == "dispatched")
    assert begun["at"] >= before["next_attempt_at"]
    assert levels(found[short]) == ["accepted", "expired"]


# Dead letters (D17)


def dead_letters(room, agent, count) -> list[str]:
    """So many messages that failed for good."""
    with worker(room.url, agent, "--", "sh", "-c", "exit 1"):
        with ThreadPoolExecutor(8) as pool:
            ask = lambda number: send(room, f"{agent}/{number}", parlour_max_attempts=1)["id"]  # noqa: E731
            names = list(pool.map(ask, range(count)))
        for name in names:
            assert ended(room, name)["state"] == "dead"
    return names


def test_dead_letters_that_are_sent_back_when_the_host_is_killed_are_in_one_place_each(kept):
    room = kept(timeouts__grace="1ms")
    left = set(dead_letters(room, "broken", 60))
    everyone = set(left)
    kills = 0
    while len(left) > 10:
        kills += 1
        answered, enough = set(), threading.Event()

        def redrive(name, room=room, answered=answered, enough=enough):
            try:
                if room.http("POST", f"/v1/dead-letters/{name}/redrive").status == 200:
                    answered.add(name)
            except OSError:
                pass
            if len(answered) >= 4:
                enough.set()

        with ThreadPoolExecutor(4) as pool:
            for name in sorted(left):
                pool.submit(redrive, name)
            enough.wait(10)
            room.kill()
        room = kept()
        eventually(lambda room=room: ready(room), what="the logs are read")
        listed = json.loads(room.http("GET", "/v1/dead-letters?limit=1000").body)["dead_letters"]
        dead = [letter["id"] for letter in listed]
        waits = {name for name in everyone if look(room, name)["state"] == "waiting"}
        assert len(dead) == len(set(dead)) and not set(dead) & waits
        assert set(dead) | waits == everyone
        assert answered and answered <= waits
        assert room.metric("parlour_deliveries_dead") == len(dead)
        left = set(dead)
    assert kills > 1


# What is kept


def test_retention_takes_nothing_that_has_not_ended(kept):
    settings = {"durable__retention_bytes": "1MiB", "durable__partitions": 1}
    room = kept(**settings)
    waiting = send(room, "nobody/k", body=b"waits")["id"]
    dead, *_ = dead_letters(room, "broken", 1)
    with worker(room.url, "echo"):
        with ThreadPoolExecutor(4) as pool:
            sent = list(pool.map(lambda n: send(room, f"echo/{n}", b"x" * 100_000)["id"], range(30)))
        for name in sent:
            ended(room, name)
    # Each start lets go of what is too much; what the next makes of the rest is seen at the one after.
    for _ in range(2):
        room.kill()
        room = kept(**settings)
        eventually(lambda room=room: ready(room), what="the log is read")
        assert send(room, "nobody/k")["ack"] == "durable"
    assert look(room, waiting)["state"] == "accepted"
    assert look(room, dead)["state"] == "dead"
    with worker(room.url, "nobody"):
        ended(room, waiting)
    assert room.http("GET", f"/v1/deliveries/{waiting}/reply").body == b"waits"


def test_the_control_of_that_what_has_ended_is_let_go(kept):
    settings = {"durable__retention_bytes": "1MiB", "durable__partitions": 1}
    room = kept(**settings)
    with worker(room.url, "echo"):
        sent = [send(room, f"echo/{n}", b"x" * 100_000)["id"] for n in range(30)]
        for name in sent:
            ended(room, name)
    room.kill()
    room = kept(**settings)
    gone = lambda: room.http("GET", f"/v1/deliveries/{sent[0]}").status == 404  # noqa: E731
    eventually(gone, what="the oldest is let go")
    assert room.http("GET", f"/v1/deliveries/{sent[-1]}").status == 200
