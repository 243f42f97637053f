"""What a room asks for the deliveries to agents of one type: set over REST, kept until it is changed."""

from __future__ import annotations

import asyncio
import collections
import http.client
import json
import random
import resource
import sqlite3
import threading
import time

import pytest

from parlour_v1 import Channel, Field, Kind, frame
from room import Room, eventually, soon, worker
from test_durable import ended, look, parlour, send


def ask(room, method, path, body=None, expect=200) -> dict:
    body = json.dumps(body) if isinstance(body, (dict, list)) else body
    answer = room.http(method, path, body)
    assert answer.status == expect, (answer.status, answer.body)
    return json.loads(answer.body)


def configure(room, agent_type, expect=200, **settings) -> dict:
    return ask(room, "PATCH", f"/v1/agents/{agent_type}/settings", settings, expect)


def settings(room, agent_type) -> dict:
    return ask(room, "GET", f"/v1/agents/{agent_type}/settings")


def without_counts(said) -> dict:
    return {name: value for name, value in said.items() if name != "deliveries"}


def paused(room, agent_type) -> float:
    return room.metric(rf'parlour_agent_paused{{agent_type="{agent_type}"}}')


# A pause


def test_what_is_accepted_for_a_paused_type_waits_until_it_is_resumed(room):
    with worker(room.url, "report"), worker(room.url, "other"):
        eventually(lambda: len(room.get("/v1/agents")["agents"]) == 2, what="both workers are there")
        assert ask(room, "POST", "/v1/agents/report/pause")["paused"] is True
        waits = send(room, "report/k")["id"]
        # The type beside it goes on, and what came to it later has ended.
        assert ended(room, send(room, "other/k")["id"])["state"] == "completed"
        assert look(room, waits)["state"] == "accepted"
        listed = {it["type"]: it["paused"] for it in room.get("/v1/agents")["agents"]}
        assert listed == {"report": True, "other": False}
        assert (paused(room, "report"), paused(room, "other")) == (1, 0)
        assert ask(room, "POST", "/v1/agents/report/resume")["paused"] is False
        assert ended(room, waits)["state"] == "completed"
        assert paused(room, "report") == 0


def test_the_control_of_that_without_a_pause_it_does_not_wait(room):
    with worker(room.url, "report"):
        assert ended(room, send(room, "report/k")["id"])["state"] == "completed"


def test_a_pause_and_every_setting_outlive_that_the_host_is_killed(kept):  # noqa: F811
    room = kept()
    wanted = {
        "concurrency": 2, "rate": 0.5, "burst": 3, "order": "strict", "max_attempts": 7,
        "max_lost": 8, "backoff_base": "5ms", "backoff_cap": "2m", "attempt_timeout": "3h",
        "max_dead": 9,
    }  # fmt: skip
    configure(room, "report", **wanted)
    ask(room, "POST", "/v1/agents/report/pause")
    said = settings(room, "report")
    assert {name: said[name] for name in wanted} == wanted and said["paused"] is True
    waits = send(room, "report/k")["id"]
    room.kill()
    room = kept()
    again = settings(room, "report")
    assert without_counts(again) == without_counts(said)
    assert (said["deliveries"]["waiting"], again["deliveries"]["waiting"]) == (0, 1)
    assert ask(room, "GET", "/v1/settings")["agents"] == [again]
    assert look(room, waits)["max_attempts"] == 7
    with worker(room.url, "report"), worker(room.url, "other"):
        assert ended(room, send(room, "other/k")["id"])["state"] == "completed"
        assert look(room, waits)["state"] == "accepted"
        assert paused(room, "report") == 1
        assert ask(room, "DELETE", "/v1/agents/report/settings")["paused"] is False
        assert ended(room, waits)["state"] == "completed"
    assert ask(room, "GET", "/v1/settings")["agents"] == []
    assert room.stop() == 0
    room = kept()
    assert ask(room, "GET", "/v1/settings")["agents"] == []


def test_the_control_of_that_a_host_that_keeps_nothing_forgets_it(start_room):
    room = start_room()
    ask(room, "POST", "/v1/agents/report/pause")
    room.kill()
    assert settings(start_room(), "report")["paused"] is False


def test_a_purge_cancels_what_waits_and_nothing_else(kept):  # noqa: F811
    room = kept()
    ask(room, "POST", "/v1/agents/report/pause")
    waits = [send(room, f"report/{key % 40}")["id"] for key in range(300)]
    later = send(room, "report/k", parlour_delay_ms=60_000)["id"]
    other = send(room, "other/k")["id"]
    purged = ask(room, "POST", "/v1/agents/report/purge?reason=a%20mistake")
    assert purged == {"type": "report", "cancelled": 301, "in_flight": 0}
    for name in (waits[0], waits[-1], later):
        found = look(room, name)
        assert (found["state"], found["steps"][-1]["details"]) == ("cancelled", "a mistake")
    assert look(room, other)["state"] == "accepted"
    assert ask(room, "POST", "/v1/agents/report/purge")["cancelled"] == 0
    assert room.metric("parlour_deliveries_cancelled_total") == 301
    room.kill()
    room = kept()
    assert room.get("/v1/deliveries")["deliveries"][0]["id"] == other
    assert look(room, waits[7])["state"] == "cancelled"


def test_a_purge_lets_be_what_is_in_flight(room):
    with worker(room.url, "slow", "--", "sh", "-c", "sleep 1; echo done"):
        running = send(room, "slow/k")["id"]
        eventually(lambda: look(room, running)["state"] in ("dispatched", "received"))
        ask(room, "POST", "/v1/agents/slow/pause")
        waits = send(room, "slow/k")["id"]
        assert ask(room, "POST", "/v1/agents/slow/purge") == {
            "type": "slow", "cancelled": 1, "in_flight": 1,
        }  # fmt: skip
        assert ended(room, running)["state"] == "completed"
        assert look(room, waits)["state"] == "cancelled"
        ask(room, "DELETE", "/v1/agents/slow/settings")


# Retries


def test_a_type_has_a_retry_policy_of_its_own(room):
    configure(room, "broken", max_attempts=2, backoff_base="1ms", backoff_cap="2ms")
    with worker(room.url, "broken", "--", "sh", "-c", "exit 1"):
        found = ended(room, send(room, "broken/k")["id"])
        asked = ended(room, send(room, "broken/k", parlour_max_attempts=1)["id"])
    assert (found["state"], found["failed"]) == ("dead", 2)
    assert asked["failed"] == 1
    failed = next(step for step in found["steps"] if step["level"] == "failed")
    begun = [step for step in found["steps"] if step["level"] == "dispatched"]
    assert begun[1]["at"] - failed["at"] < 1000
    configure(room, "broken", max_attempts=None)
    assert settings(room, "broken")["in_force"]["max_attempts"] == 5


# Limits


async def more(channel, quiet=0.2) -> list:
    """The calls that come until none has come for a while."""
    calls = []
    while True:
        try:
            calls.append(await asyncio.wait_for(channel.next(Kind.CALL), quiet))
        except TimeoutError:
            return calls


async def test_a_type_has_no_more_at_once_than_it_may_also_after_a_crash(kept):  # noqa: F811
    room = await asyncio.to_thread(kept)
    await asyncio.to_thread(lambda: configure(room, "job", concurrency=3, backoff_base="1ms"))
    names = [(await asyncio.to_thread(send, room, f"job/{key}"))["id"] for key in range(24)]
    async with await Channel.open(room.url) as channel:
        await channel.register("job")
        for _ in range(3):
            await channel.next(Kind.CALL)
        assert await more(channel) == []
        await asyncio.to_thread(room.kill)
    room = await asyncio.to_thread(kept)
    async with await Channel.open(room.url) as channel:
        await channel.register("job")
        done = 0
        while done < len(names):
            calls = [await channel.next(Kind.CALL), *await more(channel)]
            assert len(calls) <= 3
            assert await asyncio.to_thread(room.metric, "parlour_deliveries_in_flight") <= 3
            await channel.send(*(frame(Kind.REPLY, id=call.id) for call in calls))
            done += len(calls)
        for name in names:
            assert (await asyncio.to_thread(ended, room, name))["state"] == "completed"


async def test_the_control_of_that_without_a_limit_all_begin_at_once(room):
    for key in range(24):
        await asyncio.to_thread(send, room, f"many/{key}")
    async with await Channel.open(room.url) as channel:
        await channel.register("many")
        calls = [await channel.next(Kind.CALL) for _ in range(24)]
        await channel.send(*(frame(Kind.REPLY, id=call.id) for call in calls))
        await asyncio.to_thread(ended, room, calls[-1].get(Field.DELIVERY))


# Full stores


def refused(room, agent, status, kind, key, limit, **headers) -> dict:
    found = send(room, agent, expect=status, **headers)
    assert (found["kind"], found["config_key"], found["limit"]) == (kind, key, limit)
    assert room.limit_hits(key) > 0
    return found


def fail(room, agent_type, names):
    with worker(room.url, agent_type, "--", "sh", "-c", "exit 1"):
        for name in names:
            assert ended(room, name)["state"] == "dead"


def test_many_dead_letters_refuse_new_work_for_their_type_alone_and_none_is_dropped(kept):  # noqa: F811
    room = kept(durable__dead_letters=5, timeouts__grace="1ms")
    ask(room, "POST", "/v1/agents/broken/pause")
    names = [send(room, f"broken/{key}", parlour_max_attempts=1)["id"] for key in range(8)]
    ask(room, "POST", "/v1/agents/broken/resume")
    # What is in flight still ends as dead.
    fail(room, "broken", names)
    assert room.metric("parlour_deliveries_dead") == 8
    full = ("broken/k", 507, "storage_full", "durable.dead_letters", 5)
    why = refused(room, *full)
    assert "8 dead letters" in why["detail"] and "parlour dead-letters ls" in why["hint"]
    assert room.metric(r'parlour_limit{key="durable.dead_letters"}') == 5
    send(room, "other/k")
    room.kill()
    room = kept(durable__dead_letters=5, timeouts__grace="1ms")
    refused(room, *full)
    assert len(room.get("/v1/dead-letters")["dead_letters"]) == 8
    # What makes room: discarding, sending back, or a higher limit.
    for name in names[:3]:
        ask(room, "POST", f"/v1/dead-letters/{name}/discard")
    refused(room, *full)
    ask(room, "POST", f"/v1/dead-letters/{names[3]}/redrive")
    send(room, "broken/k")
    with worker(room.url, "broken"):
        assert ended(room, names[3])["state"] == "completed"
    configure(room, "broken", max_dead=4)
    refused(room, *full[:4], 4)
    configure(room, "broken", max_dead=100)
    assert settings(room, "broken")["deliveries"]["dead"] == 4
    send(room, "broken/k")


def test_the_bytes_of_dead_letters_are_bounded_too(start_room):
    room = start_room(durable__dead_letter_bytes="10KiB", timeouts__grace="1ms")
    name = send(room, "broken/k", b"x" * 20_000, parlour_max_attempts=1)["id"]
    fail(room, "broken", [name])
    assert settings(room, "broken")["deliveries"]["dead_bytes"] > 20_000
    refused(room, "broken/k", 507, "storage_full", "durable.dead_letter_bytes", 10_240)
    ask(room, "POST", f"/v1/dead-letters/{name}/discard")
    assert settings(room, "broken")["deliveries"]["dead_bytes"] == 0
    send(room, "broken/k")


def test_what_waits_and_is_in_flight_is_bounded_by_type(kept):  # noqa: F811
    room = kept(durable__unsettled=6)
    names = [send(room, f"slow/{key}", idempotency_key=str(key))["id"] for key in range(6)]
    full = ("slow/k", 429, "overloaded", "durable.unsettled", 6)
    found = refused(room, *full)
    assert found["retry_after_ms"] > 0 and "start more workers" in found["hint"]
    ask(room, "POST", "/v1/agents/slow/pause")
    assert "parlour agents resume" in refused(room, *full)["hint"]
    ask(room, "POST", "/v1/agents/slow/resume")
    # The same once more is no more, and another type is another.
    assert send(room, "slow/3", idempotency_key="3")["id"] == names[3]
    send(room, "other/k")
    room.kill()
    room = kept(durable__unsettled=6)
    eventually(lambda: room.http("GET", "/readyz").status == 200, what="the logs are read")
    refused(room, *full)
    ask(room, "POST", f"/v1/deliveries/{names[0]}/cancel")
    send(room, "slow/k")
    refused(room, *full)


def test_idempotency_keys_are_bounded_and_free_again_when_their_window_is_over(start_room):
    room = start_room(durable__idempotency_keys=5, durable__idempotency_window="3s")
    first = [send(room, f"job/{key}", idempotency_key="k")["id"] for key in range(5)]
    full = ("job/9", 429, "overloaded", "durable.idempotency_keys", 5)
    why = refused(room, *full, idempotency_key="k")
    assert 0 < why["retry_after_ms"] <= 3000
    assert room.metric("parlour_idempotency_keys") == 5
    # Those that are known are answered, and what has none is accepted.
    assert send(room, "job/2", idempotency_key="k")["id"] == first[2]
    send(room, "job/9")
    eventually(lambda: room.metric("parlour_idempotency_keys") == 0, what="the keys are free")
    assert send(room, "job/2", idempotency_key="k")["id"] != first[2]


# Many dead letters at once


async def many_dead(room, agent_type, count) -> list[str]:
    """So many messages that failed for good, of agents in all partitions."""

    def publish(part):
        return [send(room, f"{agent_type}/{key}")["id"] for key in range(part, count, 8)]

    parts = await asyncio.gather(*(asyncio.to_thread(publish, part) for part in range(8)))
    async with await Channel.open(room.url) as channel:
        await channel.register(agent_type)
        for _ in range(count):
            call = await channel.next(Kind.CALL)
            await channel.send(frame(Kind.FAULT, id=call.id, fault_kind="invalid", may_have_run=1))
        await soon(lambda: settings(room, agent_type)["deliveries"]["dead"] == count, what="the end")
    return sorted(name for part in parts for name in part)


async def test_all_dead_letters_of_a_type_are_sent_back_or_given_up_at_once(room):
    names = await many_dead(room, "many", 50)
    other = (await many_dead(room, "few", 1))[0]

    def steps():
        some = ask(room, "POST", "/v1/dead-letters/redrive", {"agent_type": "many", "limit": 8})
        assert some == {"agent_type": "many", "redriven": 8, "left": 42}
        reason = {"agent_type": "many", "limit": 2, "reason": "a test"}
        some = ask(room, "POST", "/v1/dead-letters/discard", reason)
        assert some == {"agent_type": "many", "discarded": 2, "left": 40}
        rest = ask(room, "POST", "/v1/dead-letters/redrive", {"agent_type": "many"})
        assert rest == {"agent_type": "many", "redriven": 40, "left": 0}
        assert ask(room, "POST", "/v1/dead-letters/redrive", {"agent_type": "many"})["redriven"] == 0
        with worker(room.url, "many"):
            states = sorted(ended(room, name)["steps"][-1]["level"] for name in names)
        assert states == ["completed"] * 48 + ["discarded"] * 2
        assert look(room, other)["state"] == "dead"
        ask(room, "POST", "/v1/dead-letters/discard", {"agent_type": "few"})
        assert look(room, other)["steps"][-1]["level"] == "discarded"

    await asyncio.to_thread(steps)


async def test_a_redrive_that_a_crash_cuts_short_leaves_each_in_one_place(kept):  # noqa: F811
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    random.seed(seed)
    room = await asyncio.to_thread(kept, durable__dead_letters=1000)
    names = await many_dead(room, "many", 400)

    def listed(door, key) -> set[str]:
        found = room.get(f"/v1/{door}?agent_type=many&limit=1000")[key]
        assert len({it["id"] for it in found}) == len(found)
        return {it["id"] for it in found}

    def places():
        dead = listed("dead-letters", "dead_letters")
        waiting = listed("deliveries", "deliveries") - dead
        assert sorted(dead | waiting) == names and not dead & waiting
        assert room.metric("parlour_deliveries_accepted_total") == len(names)
        assert room.metric("parlour_deliveries_dead") == len(dead)
        assert room.metric("parlour_deliveries_waiting") == len(waiting)
        return len(dead)

    def crash() -> int:
        nonlocal room
        done = []

        def redrive():
            try:
                body = {"agent_type": "many"}
                done.append(ask(room, "POST", "/v1/dead-letters/redrive", body)["redriven"])
            except (OSError, http.client.HTTPException):
                pass

        thread = threading.Thread(target=redrive)
        thread.start()
        # Not to wait for anything: the kill comes at any time.
        time.sleep(random.uniform(0, 0.03))
        room.kill()
        thread.join()
        room = kept(durable__dead_letters=1000)
        eventually(lambda: room.http("GET", "/readyz").status == 200, what="the logs are read")
        left = places()
        # What was answered for is done.
        assert not done or left == 0
        return left

    left = [await asyncio.to_thread(crash)]
    while left[-1] > 0:
        left.append(await asyncio.to_thread(crash))
    print(f"left after each crash: {left}")
    assert left == sorted(left, reverse=True)

    def finish():
        with worker(room.url, "many"):
            for name in names:
                found = ended(room, name)
                assert found["state"] == "completed"
                assert [step["level"] for step in found["steps"]].count("redriven") == 1

    await asyncio.to_thread(finish)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "missing field `agent_type`"),
        ({"agent_type": "no type"}, "agent type"),
        ({"agent_type": "many", "limit": 0}, "`limit` is 0"),
        ({"agent_type": "many", "limit": -1}, "invalid value"),
        ({"agent_type": "many", "reason": 7}, "invalid type"),
        ({"agent_type": "many", "all": True}, "unknown field `all`"),
        (["many", 1, None], "an array"),
        ("", "EOF"),
    ],
)
def test_a_request_about_many_that_makes_no_sense_is_refused(room, body, says):
    for action in ("redrive", "discard"):
        refused = ask(room, "POST", f"/v1/dead-letters/{action}", body, expect=400)
        assert refused["kind"] == "invalid" and says in refused["detail"], refused
    too_long = {"agent_type": "many", "reason": "r" * 2000}
    refused = ask(room, "POST", "/v1/dead-letters/discard", too_long, expect=400)
    assert "2000 bytes" in refused["detail"]
    assert room.http("GET", "/v1/dead-letters/redrive").status == 405


# Order


async def order(room, agent_type, keys=200, each=5, workers=4) -> int:
    """Has messages of many keys delivered by several workers that fail and die. Returns how often one
    came although an earlier one of its key had not ended."""
    most, random_ = 4, random.Random(7)

    def publish(part):
        for number in range(each):
            for key in range(part, keys, 8):
                send(room, f"{agent_type}/{key}", str(number).encode(), parlour_max_attempts=most)

    await asyncio.gather(*(asyncio.to_thread(publish, part) for part in range(8)))
    # By key, how many have ended.
    done = dict.fromkeys((str(key) for key in range(keys)), 0)
    failures = collections.Counter()
    inversions = 0

    async def serve(lives):
        nonlocal inversions
        for life in range(lives):
            async with await Channel.open(room.url) as channel:
                await channel.register(agent_type)
                while sum(done.values()) < keys * each:
                    try:
                        call = await asyncio.wait_for(channel.next(Kind.CALL), 0.5)
                    except TimeoutError:
                        continue
                    key, number = call.get(Field.KEY), int(call.payload)
                    inversions += number > done[key]
                    if life + 1 < lives and random_.random() < 0.02:
                        channel.kill()
                        break
                    if random_.random() < 0.2:
                        fault = {"fault_kind": "agent_failed", "detail": "no", "may_have_run": 1}
                        await channel.send(frame(Kind.FAULT, id=call.id, **fault))
                        failures[key, number] += 1
                        is_over = failures[key, number] == most
                    else:
                        await channel.send(frame(Kind.REPLY, id=call.id))
                        is_over = True
                    if is_over:
                        done[key] = max(done[key], number + 1)

    await asyncio.gather(*(serve(3) for _ in range(workers)))
    return inversions


async def test_under_strict_order_none_begins_before_the_one_before_it_has_ended(start_room):
    room = start_room(durable__backoff_base="5ms", durable__max_lost=1000, timeouts__grace="1ms")
    await asyncio.to_thread(lambda: configure(room, "strict", order="strict"))
    assert await order(room, "strict") == 0


async def test_the_control_of_that_without_it_one_that_waits_lets_later_ones_pass(start_room):
    room = start_room(durable__backoff_base="5ms", durable__max_lost=1000, timeouts__grace="1ms")
    assert await order(room, "relaxed", keys=40) > 0


async def test_one_that_waits_for_its_next_attempt_lets_later_ones_pass_unless_they_are_strict(room):
    await asyncio.to_thread(lambda: configure(room, "first", order="strict"))
    for agent_type in ("first", "any"):
        names = []
        for text in (b"one", b"two"):
            accepted = await asyncio.to_thread(send, room, f"{agent_type}/k", text)
            names.append(accepted["id"])
        async with await Channel.open(room.url) as channel:
            await channel.register(agent_type)
            call = await channel.next(Kind.CALL)
            assert call.payload == b"one"
            fault = {"fault_kind": "agent_failed", "detail": "later", "retry_after_ms": 3_600_000}
            await channel.send(frame(Kind.FAULT, id=call.id, **fault))
            if agent_type == "first":
                assert await more(channel) == []
                cancel = f"/v1/deliveries/{names[0]}/cancel"
                await asyncio.to_thread(ask, room, "POST", cancel)
            call = await channel.next(Kind.CALL)
            assert call.payload == b"two"
            await channel.send(frame(Kind.REPLY, id=call.id))
            assert (await asyncio.to_thread(ended, room, names[1]))["state"] == "completed"


# The log


def test_the_log_of_the_room_holds_a_few_commits_and_says_all_in_the_last(kept, tmp_path):  # noqa: F811
    room = kept()
    for number in range(1, 50):
        configure(room, "report", concurrency=number)
    configure(room, "report", concurrency=49)
    file = f"file:{tmp_path / 'data' / 'parlour.db'}?mode=ro"

    def commits() -> int:
        with sqlite3.connect(file, uri=True) as database:
            query = "SELECT count(*) FROM commits WHERE id & 0xffff = 16"
            return database.execute(query).fetchone()[0]

    # Deleting is done when there is nothing else to do.
    eventually(lambda: 0 < commits() <= 17, what="older commits are let go")
    assert settings(room, "report")["concurrency"] == 49


def test_settings_that_are_too_much_are_refused_with_the_limit_and_can_be_reset(start_room):
    room = start_room(limits__room_bytes="4KiB")
    refused = None
    for number in range(200):
        answer = room.http("POST", f"/v1/agents/{'t' * 90}{number}/pause")
        if answer.status != 200:
            refused = json.loads(answer.body)
            break
    assert refused and refused["status"] == 413 and refused["kind"] == "too_large"
    assert refused["config_key"] == "limits.room_bytes" and refused["limit"] == 4096
    assert room.limit_hits("limits.room_bytes") == 1
    assert len(ask(room, "GET", "/v1/settings")["agents"]) == number
    ask(room, "DELETE", f"/v1/agents/{'t' * 90}0/settings")
    ask(room, "POST", "/v1/agents/short/pause")


def test_a_full_disk_refuses_a_change_and_what_was_set_holds(tmp_path):
    room = Room(data=tmp_path / "data")
    try:
        ask(room, "POST", "/v1/agents/report/pause")
        resource.prlimit(room.pid, resource.RLIMIT_FSIZE, (1 << 16, -1))
        last = room.http("POST", "/v1/agents/other/pause")
        for number in range(200):
            if last.status != 200:
                break
            last = room.http("POST", f"/v1/agents/other{number}/pause")
        refused = json.loads(last.body)
        assert (last.status, refused["kind"]) == (507, "storage_full") and refused["hint"]
        assert settings(room, "report")["paused"] is True
        resource.prlimit(room.pid, resource.RLIMIT_FSIZE, (-1, -1))
        before = ask(room, "GET", "/v1/settings")
        eventually(lambda: room.http("POST", "/v1/agents/late/pause").status == 200)
        room.kill()
        room = Room(data=tmp_path / "data")
        assert len(ask(room, "GET", "/v1/settings")["agents"]) == len(before["agents"]) + 1
    finally:
        room.kill()


# Bad input


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"concurrency": 0}, "`concurrency` cannot be 0"),
        ({"concurrency": -1}, "`concurrency` cannot be -1"),
        ({"concurrency": 1.5}, "`concurrency` cannot be 1.5"),
        ({"concurrency": 10_000_001}, "`concurrency`"),
        ({"concurrency": True}, "`concurrency`"),
        ({"rate": 0}, "`rate` cannot be 0"),
        ({"rate": 1e300}, "`rate`"),
        ({"rate": "fast"}, "`rate`"),
        ({"burst": 5}, "there is a `burst`, and no `rate`"),
        ({"rate": 1, "burst": 0}, "`burst` cannot be 0"),
        ({"order": "stricter"}, "`order`"),
        ({"paused": "yes"}, "`paused`"),
        ({"max_attempts": 0}, "`max_attempts`"),
        ({"backoff_base": 5}, "`backoff_base`"),
        ({"backoff_base": "10m", "backoff_cap": "1m"}, "longer than `backoff_cap`"),
        ({"attempt_timeout": "0s"}, "`attempt_timeout`"),
        ({"attempt_timeout": "9999999h"}, "`attempt_timeout`"),
        ({"pausd": True}, "no setting `pausd`"),
        ([], "invalid type"),
        ("{", "EOF"),
        ('{"a":' * 100 + "1" + "}" * 100, "nests deeper"),
        (b"\xff", "UTF-8"),
        ("", "EOF"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name_and_change_nothing(room, body, says):
    body = json.dumps(body) if isinstance(body, (dict, list)) else body
    answer = room.http("PATCH", "/v1/agents/strange/settings", body)
    refused = json.loads(answer.body)
    assert (answer.status, refused["kind"]) == (400, "invalid"), refused
    assert says in refused["detail"] and refused["hint"]
    assert settings(room, "strange")["concurrency"] is None
    assert all(it["type"] != "strange" for it in ask(room, "GET", "/v1/settings")["agents"])


def test_one_bad_field_leaves_the_good_ones_unset_too(room):
    refused = configure(room, "partly", expect=400, concurrency=3, order="odd")
    assert "`order`" in refused["detail"] and "strict" in refused["hint"]
    assert settings(room, "partly")["concurrency"] is None


def test_doors_that_do_not_fit_say_so(room):
    for method, path in (
        ("PUT", "/v1/agents/a/settings"), ("POST", "/v1/settings"), ("GET", "/v1/agents/a/pause"),
        ("DELETE", "/v1/agents/a/purge"),
    ):  # fmt: skip
        assert room.http(method, path).status == 405, path
    for door in ("pause", "resume", "purge"):
        refused = ask(room, "POST", f"/v1/agents/no%20type/{door}", expect=400)
        assert refused["kind"] == "invalid" and "agent type" in refused["detail"]
    assert room.http("POST", "/v1/agents/a/purge?cause=x").status == 400
    # An agent whose key is the name of a door is an agent as any other.
    assert look(room, send(room, "report/settings")["id"])["agent"] == "report/settings"
    too_large = room.http("PATCH", "/v1/agents/a/settings", b" " * ((1 << 20) + 1))
    assert too_large.status == 413 and b"limits.json_body_bytes" in too_large.body


# The command line


def test_the_command_line_pauses_sets_and_purges(kept):  # noqa: F811
    room = kept()
    assert "paused" in parlour(room, "agents", "pause", "report").stdout
    parlour(room, "send", "report/k", "x")
    assert "1 that waited" in parlour(room, "agents", "purge", "report", "--reason", "a test").stdout
    assert "again" in parlour(room, "agents", "resume", "report").stdout
    shown = parlour(room, "agents", "set", "report", "concurrency=2", "rate=0.5", "order=strict").stdout
    row = next(line.split() for line in shown.splitlines() if line.startswith("concurrency"))
    assert row == ["concurrency", "2", "2"]
    said = json.loads(parlour(room, "agents", "settings", "report", "--json").stdout)
    assert (said["rate"], said["burst"], said["order"]) == (0.5, 1, "strict")
    table = parlour(room, "agents", "settings").stdout
    assert "report" in table and "concurrency=2" in table
    parlour(room, "agents", "set", "report", "rate=", "order=")
    assert json.loads(parlour(room, "agents", "settings", "report", "--json").stdout)["rate"] is None
    wrong = parlour(room, "agents", "set", "report", "concurrency=none", expect=1)
    assert "`concurrency`" in wrong.stderr
    parlour(room, "agents", "set", "report", expect=2)
    sent_back = parlour(room, "dead-letters", "redrive", "--agent-type", "report", "--limit", "5")
    assert sent_back.stdout == "0 of report are attempted again, 0 are left\n"
    given_up = parlour(room, "dead-letters", "discard", "--type", "report", "--json")
    assert json.loads(given_up.stdout)["discarded"] == 0
    parlour(room, "dead-letters", "redrive", expect=2)
    parlour(room, "dead-letters", "redrive", "0-00000000-1", "--agent-type", "report", expect=2)
    parlour(room, "agents", "reset", "report")
    assert parlour(room, "agents", "settings").stdout.splitlines()[1:] == []
