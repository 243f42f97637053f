"""What a room asks for the deliveries to agents of one type: set over REST, kept until it is changed."""

from __future__ import annotations

import asyncio
import json
import resource
import sqlite3

import pytest

from parlour_v1 import Channel, Field, Kind, frame
from room import Room, eventually, worker
from test_durable import ended, kept, look, parlour, send  # noqa: F401


def ask(room, method, path, body=None, expect=200) -> dict:
    body = json.dumps(body) if isinstance(body, (dict, list)) else body
    answer = room.http(method, path, body)
    assert answer.status == expect, (answer.status, answer.body)
    return json.loads(answer.body)


def configure(room, agent_type, expect=200, **settings) -> dict:
    return ask(room, "PATCH", f"/v1/agents/{agent_type}/settings", settings, expect)


def settings(room, agent_type) -> dict:
    return ask(room, "GET", f"/v1/agents/{agent_type}/settings")


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
    assert settings(room, "report") == said
    assert ask(room, "GET", "/v1/settings")["agents"] == [said]
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


# The log


def test_the_log_of_the_room_holds_a_few_commits_and_says_all_in_the_last(kept, tmp_path):  # noqa: F811
    room = kept()
    for number in range(1, 50):
        configure(room, "report", concurrency=number)
    configure(room, "report", concurrency=49)
    with sqlite3.connect(f"file:{tmp_path / 'data' / 'parlour.db'}?mode=ro", uri=True) as database:
        rows = database.execute("SELECT count(*) FROM commits WHERE id >> 48 = 16").fetchone()
    assert 0 < rows[0] <= 17
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
    parlour(room, "agents", "reset", "report")
    assert parlour(room, "agents", "settings").stdout.splitlines()[1:] == []
