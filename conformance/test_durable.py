"""Messages that are accepted for later: what is promised of them, through REST and `parlour.v1`."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import subprocess
import threading
import time

import pytest

from kill import Storm, killed
from parlour_v1 import Channel, Field, Kind, frame
from room import BINARY, eventually, worker


def send(room, agent="echo/k", body=b"hello", expect=202, **headers) -> dict:
    """Has a message accepted. Headers are written with `_` for `-`."""
    headers = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    answer = room.http("POST", f"/v1/agents/{agent}/deliveries", body, headers)
    assert answer.status == expect, (answer.status, answer.body)
    found = json.loads(answer.body)
    if expect == 202:
        assert answer.getheader("location") == f"/v1/deliveries/{found['id']}"
    return found


def look(room, name, query="", expect=200) -> dict:
    answer = room.http("GET", f"/v1/deliveries/{name}{query}", timeout=40)
    assert answer.status == expect, (answer.status, answer.body)
    return json.loads(answer.body)


def ended(room, name, timeout=20.0) -> dict:
    """The delivery, once it has ended."""
    until, seen = time.monotonic() + timeout, 0
    while time.monotonic() < until:
        found = look(room, name, f"?after={seen}&wait=5s")
        if found["state"] in ("completed", "dead", "cancelled", "expired"):
            return look(room, name)
        seen = found["generation"]
    raise AssertionError(f"not ended: {found}")


def levels(found) -> list[str]:
    return [step["level"] for step in found["steps"]]


# A life


def test_a_message_waits_for_a_worker_and_its_reply_for_whoever_asks(room):
    accepted = send(room, content_type="text/x-greeting", body="grüß".encode())
    assert accepted["ack"] == "memory" and accepted["generation"] == 1
    waits = look(room, accepted["id"])
    assert (waits["state"], waits["agent"], waits["attempt"]) == ("accepted", "echo/k", 0)
    assert waits["conversation"] == accepted["conversation"]
    missing = room.http("GET", f"/v1/deliveries/{accepted['id']}/reply")
    assert missing.status == 404 and b"no reply yet" in missing.body

    with worker(room.url, "echo"):
        found = ended(room, accepted["id"])
    assert found["state"] == "completed" and found["attempt"] == 1
    assert levels(found) == ["accepted", "dispatched", "received", "completed"]
    assert [step["generation"] for step in found["steps"]] == [1, 2, 3, 4]
    assert found["steps"][1]["worker"] == "echo"
    reply = room.http("GET", f"/v1/deliveries/{accepted['id']}/reply")
    assert (reply.status, reply.body.decode()) == (200, "grüß")
    assert reply.getheader("content-type") == "text/x-greeting"
    assert reply.getheader("parlour-conversation") == accepted["conversation"]


def test_who_waits_for_the_next_step_gets_it_when_it_happens(room):
    name = send(room, "steps/k")["id"]
    assert look(room, name, "?after=1&wait=1ms")["steps"] == []
    answers = []
    waits = threading.Thread(target=lambda: answers.append(look(room, name, "?after=1&wait=30s")))
    waits.start()
    with worker(room.url, "steps"):
        waits.join()
    assert answers[0]["generation"] > 1
    assert answers[0]["steps"][0]["level"] == "dispatched"


def test_an_agent_that_fails_is_asked_again_until_no_attempt_is_left(start_room):
    room = start_room(durable__backoff_base="1ms", durable__max_attempts=3)
    with worker(room.url, "broken", "--", "sh", "-c", "echo no luck >&2; exit 1"):
        found = ended(room, send(room, "broken/k")["id"])
        twice = ended(room, send(room, "broken/k", parlour_max_attempts=2)["id"])
    assert (found["state"], found["attempt"], found["failed"], found["lost"]) == ("dead", 3, 3, 0)
    assert (twice["attempt"], twice["max_attempts"]) == (2, 2)
    faults = [step["fault"] for step in found["steps"] if step["level"] in ("failed", "dead")]
    assert len(faults) == 3 and all("no luck" in fault["detail"] for fault in faults)
    assert found["fault"]["kind"] == "agent_failed"
    # The reply of what has none is why.
    reply = room.http("GET", f"/v1/deliveries/{found['id']}/reply")
    assert reply.status == 502 and json.loads(reply.body)["kind"] == "agent_failed"


async def test_an_attempt_is_told_which_it_is_and_a_lost_worker_leaves_it_to_the_next(start_room):
    room = start_room(durable__backoff_base="1ms", timeouts__grace="1ms")
    accepted = await asyncio.to_thread(send, room, "job/k")
    seen = []
    for attempt in (1, 2):
        async with await Channel.open(room.url) as channel:
            await channel.register("job")
            call = await channel.next(Kind.CALL)
            seen.append((call.get(Field.DELIVERY), call.get(Field.ATTEMPT)))
            if attempt == 1:
                channel.kill()
                continue
            await channel.send(
                frame(Kind.RECEIVED, id=call.id),
                frame(Kind.RECEIVED, id=call.id),
                frame(Kind.PROGRESS, b"half way", id=call.id),
                frame(Kind.REPLY, b"done", id=call.id),
            )
            found = await asyncio.to_thread(ended, room, accepted["id"])
    assert seen == [(accepted["id"], 1), (accepted["id"], 2)]
    assert (found["state"], found["failed"], found["lost"]) == ("completed", 0, 1)
    after = ["dispatched", "received", "processing", "completed"]
    assert levels(found) == ["accepted", "dispatched", "failed", *after]
    assert found["steps"][2]["fault"]["kind"] == "worker_lost"
    assert found["steps"][5]["details"] == "half way"


async def test_an_invalid_message_is_not_tried_twice_and_one_that_did_not_run_costs_no_attempt(
    start_room,
):
    room = start_room(durable__backoff_base="1ms")
    async with await Channel.open(room.url) as channel:
        await channel.register("job")
        name = (await asyncio.to_thread(send, room, "job/k"))["id"]
        for kind, ran in (("overloaded", 0), ("overloaded", 0), ("invalid", 1)):
            call = await channel.next(Kind.CALL)
            assert call.get(Field.ATTEMPT) == 1
            await channel.send(
                frame(Kind.FAULT, id=call.id, fault_kind=kind, detail="no", may_have_run=ran)
            )
        found = await asyncio.to_thread(ended, room, name)
    assert (found["state"], found["attempt"], found["failed"]) == ("dead", 1, 1)


async def test_what_is_cancelled_is_taken_from_its_worker_and_a_late_reply_changes_nothing(room):
    async with await Channel.open(room.url) as channel:
        await channel.register("job")
        name = (await asyncio.to_thread(send, room, "job/k"))["id"]
        call = await channel.next(Kind.CALL)
        path = f"/v1/deliveries/{name}/cancel?reason=enough"
        answer = await asyncio.to_thread(room.http, "POST", path)
        assert (answer.status, json.loads(answer.body)["state"]) == (200, "cancelled")
        assert (await channel.next(Kind.CANCEL)).id == call.id
        await channel.send(frame(Kind.REPLY, b"late", id=call.id))
        await channel.request(Kind.UNREGISTER, agent_type="job")
        found = await asyncio.to_thread(look, room, name)
        again = await asyncio.to_thread(room.http, "POST", path)
    assert (found["state"], found["steps"][-1]["details"]) == ("cancelled", "enough")
    assert again.status == 404


def test_what_is_to_come_later_comes_then_and_what_is_too_late_does_not(room):
    with worker(room.url, "later"):
        later = send(room, "later/k", parlour_delay_ms=300)["id"]
        waits = look(room, later)
        assert waits["next_attempt_at"] > waits["accepted_at"]
        found = ended(room, later)
        begun = next(step for step in found["steps"] if step["level"] == "dispatched")
        assert begun["at"] >= waits["next_attempt_at"]
    short = send(room, "nobody/k", parlour_ttl_ms=50)["id"]
    found = ended(room, short)
    assert found["state"] == "expired" and levels(found) == ["accepted", "expired"]


async def test_messages_for_one_agent_begin_in_the_order_in_which_they_were_accepted(room):
    for number in range(50):
        await asyncio.to_thread(send, room, "list/k", str(number).encode())
    async with await Channel.open(room.url) as channel:
        await channel.register("list")
        calls = [await channel.next(Kind.CALL) for _ in range(50)]
        assert [call.payload for call in calls] == [str(number).encode() for number in range(50)]
        await channel.send(*(frame(Kind.REPLY, id=call.id) for call in calls))
        last = calls[-1].get(Field.DELIVERY)
        assert (await asyncio.to_thread(ended, room, last))["state"] == "completed"


# The same message twice


def test_the_same_key_is_accepted_once_however_often_it_is_sent(kept):
    room = kept()
    answers = []
    ask = lambda: answers.append(send(room, idempotency_key="order-7"))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answer == answers[0] for answer in answers) and len(answers) == 20
    refused = send(room, body=b"other", expect=409, idempotency_key="order-7")
    assert refused["kind"] == "conflict" and "idempotency key" in refused["detail"]
    # The key is that of one target: another one's is another.
    assert send(room, "echo/other", idempotency_key="order-7")["id"] != answers[0]["id"]
    room.kill()
    room = kept()
    assert send(room, idempotency_key="order-7") == answers[0]
    with worker(room.url, "echo"):
        assert ended(room, answers[0]["id"])["attempt"] == 1
        assert send(room, idempotency_key="order-7") == answers[0]
    send(room, body=b"other", expect=409, idempotency_key="order-7")


# Crashes


def test_nothing_that_was_acknowledged_is_lost_when_the_host_is_killed_at_any_time(tmp_path, say):
    seed = random.randrange(1 << 30)
    storm = Storm(tmp_path, seed, tmp_path / "data")
    report = storm.run([killed] * 25)
    say(f"seed {seed}, 25 kills, {storm.struck} with requests under way: {report}")
    assert report.is_clean() and storm.struck and report.duplicates, report


def test_the_control_of_that_a_host_that_keeps_nothing_loses_it(tmp_path):
    report = Storm(tmp_path, 1, data=None).run([killed] * 2)
    assert report.anomalies["lost"], report


async def test_a_killed_host_does_not_forget_how_often_it_tried(kept):
    room = kept(durable__backoff_base="1ms", durable__max_lost=3)
    name = (await asyncio.to_thread(send, room, "job/k"))["id"]
    for lost in (1, 2, 3):
        async with await Channel.open(room.url) as channel:
            await channel.register("job")
            call = await channel.next(Kind.CALL)
            assert call.get(Field.ATTEMPT) == lost
            await asyncio.to_thread(room.kill)
        room = await asyncio.to_thread(kept, durable__backoff_base="1ms", durable__max_lost=3)
    found = await asyncio.to_thread(look, room, name)
    assert (found["state"], found["lost"], found["failed"]) == ("dead", 3, 0)
    assert "the host stopped" in found["fault"]["detail"]


def test_what_waited_and_what_has_ended_is_there_after_a_restart(kept, tmp_path):
    room = kept()
    with worker(room.url, "echo"):
        done = send(room, body=b"done")["id"]
        story = ended(room, done)
    waiting = send(room, "nobody/k", parlour_delay_ms=60_000)["id"]
    assert send(room)["ack"] == "durable"
    assert room.stop() == 0
    room = kept()
    assert look(room, done) == story
    assert room.http("GET", f"/v1/deliveries/{done}/reply").body == b"done"
    assert look(room, waiting)["state"] == "accepted"
    # The view of what has ended can be made again.
    room.kill()
    files = list((tmp_path / "data").glob("view.db*"))
    assert files
    for file in files:
        file.unlink()
    room = kept()
    assert look(room, done) == story


def test_ids_of_another_life_of_the_room_name_nothing(kept, tmp_path):
    room = kept()
    name = send(room)["id"]
    room.kill()
    for file in (tmp_path / "data").iterdir():
        file.unlink()
    room = kept()
    assert send(room)["id"] != name
    look(room, name, expect=404)


# The data directory


def serve(*args) -> subprocess.CompletedProcess:
    command = [BINARY, "serve", "--listen", "127.0.0.1:0", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_a_data_directory_has_one_host(kept, tmp_path):
    kept()
    second = serve(f"--data={tmp_path / 'data'}")
    assert second.returncode == 75 and "another host uses" in second.stderr
    assert "hint:" in second.stderr


def test_a_data_directory_that_cannot_be_used_is_said_with_its_remedy(tmp_path):
    file = tmp_path / "file"
    file.write_text("not a directory")
    refused = serve(f"--data={file}")
    assert refused.returncode == 74 and str(file) in refused.stderr
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with sqlite3.connect(foreign / "parlour.db") as other:
        other.execute("CREATE TABLE theirs (x)")
    refused = serve(f"--data={foreign}")
    assert refused.returncode == 78 and "no database of Parlour" in refused.stderr


def test_a_directory_of_a_later_version_or_of_other_partitions_is_left_alone(kept, tmp_path):
    room = kept()
    send(room)
    assert room.stop() == 0
    refused = serve(f"--data={tmp_path / 'data'}", "--set=durable.partitions=4")
    assert refused.returncode == 78 and "16 partitions" in refused.stderr
    with sqlite3.connect(tmp_path / "data" / "parlour.db") as database:
        database.execute("PRAGMA user_version = 99")
    refused = serve(f"--data={tmp_path / 'data'}")
    assert refused.returncode == 78 and "format 99" in refused.stderr


def test_an_operator_can_look_inside_with_stock_tools(kept, tmp_path):
    room = kept()
    accepted = send(room, body=b"findable")
    with sqlite3.connect(f"file:{tmp_path / 'data' / 'parlour.db'}?mode=ro", uri=True) as database:
        rows = database.execute("SELECT id & 0xffff, id >> 16, commit_bytes FROM commits")
        found = [(p, n) for p, n, commit in rows.fetchall() if b"findable" in commit]
    assert [str(p) for p, _ in found] == [accepted["id"].split("-")[0]]


# Bad input


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({"parlour_max_attempts": 0}, "never be tried"),
        ({"parlour_max_attempts": "many"}, "whole number"),
        ({"parlour_delay_ms": 5, "parlour_deliver_at": 5}, "both given"),
        ({"parlour_delay_ms": 50, "parlour_ttl_ms": 50}, "expires before"),
        ({"parlour_ttl_ms": -1}, "whole number"),
        ({"idempotency_key": "k" * 1025}, "longer than"),
    ],
)
def test_a_message_that_makes_no_sense_is_refused_with_what_to_change(room, headers, says):
    refused = send(room, expect=400, **headers)
    assert refused["kind"] == "invalid" and says in refused["detail"] and refused["retryable"] is False


def test_names_that_are_none_and_waits_that_are_none_are_refused(room):
    assert look(room, "not-an-id", expect=400)["kind"] == "invalid"
    assert look(room, "0-00000000-1", expect=404)["kind"] == "not_found"
    assert look(room, "999-00000000-1", expect=404)["kind"] == "not_found"
    name = send(room)["id"]
    assert "no time" in look(room, name, "?wait=soon", expect=400)["detail"]
    assert room.http("GET", f"/v1/deliveries/{name}?after=x").status == 400
    assert room.http("DELETE", f"/v1/deliveries/{name}").status == 405
    too_large = room.http("POST", "/v1/agents/echo/k/deliveries", b"x" * ((1 << 20) + 1))
    assert too_large.status == 413
    assert send(room, "no%20type/k", expect=400)["kind"] == "invalid"


# Dead letters


def dead(room, agent="broken/k", body=b"x") -> str:
    """A message that fails for good."""
    name = send(room, agent, body, parlour_max_attempts=1)["id"]
    with worker(room.url, agent.split("/")[0], "--", "sh", "-c", "echo no luck >&2; exit 1"):
        assert ended(room, name)["state"] == "dead"
    # What is sent back must not go to a worker that is being lost.
    types = f"/v1/agents/{agent.split('/')[0]}"
    eventually(lambda: room.http("GET", types).status == 404, what="no worker")
    return name


def post(room, path, expect=200) -> dict:
    answer = room.http("POST", path)
    assert answer.status == expect, (answer.status, answer.body)
    return json.loads(answer.body)


def test_a_dead_letter_has_its_whole_story_and_what_was_to_be_delivered(kept):
    room = kept(timeouts__grace="1ms")
    name = dead(room, body=b"\xff not text")
    assert room.stop() == 0
    room = kept()
    eventually(lambda: room.http("GET", "/readyz").status == 200, what="the logs are read")
    listed = json.loads(room.http("GET", "/v1/dead-letters?agent_type=broken").body)
    assert [letter["id"] for letter in listed["dead_letters"]] == [name] and listed["next"] is None
    assert json.loads(room.http("GET", "/v1/dead-letters?agent_type=other").body)["dead_letters"] == []
    letter = json.loads(room.http("GET", f"/v1/dead-letters/{name}").body)
    assert letter["message"]["content"]["data_base64"] == "/yBub3QgdGV4dA=="
    assert "no luck" in letter["steps"][-1]["fault"]["detail"]
    assert room.metric("parlour_deliveries_dead") == 1


def test_what_is_sent_back_has_all_its_attempts_again_also_after_a_crash(kept):
    room = kept(timeouts__grace="1ms")
    name = dead(room)
    post(room, f"/v1/dead-letters/{name}/redrive")
    assert look(room, name)["state"] == "waiting"
    post(room, f"/v1/dead-letters/{name}/redrive", expect=409)
    room.kill()
    room = kept()
    with worker(room.url, "broken"):
        found = ended(room, name)
    assert (found["state"], found["attempt"]) == ("completed", 1)
    assert "redriven" in levels(found)


def test_what_is_discarded_is_gone_from_the_dead_and_counted(kept):
    room = kept(timeouts__grace="1ms")
    name = dead(room)
    post(room, f"/v1/deliveries/{name}/cancel", expect=409)
    post(room, f"/v1/dead-letters/{name}/discard?reason=a%20test")
    assert json.loads(room.http("GET", "/v1/dead-letters").body)["dead_letters"] == []
    assert room.http("GET", f"/v1/dead-letters/{name}").status == 404
    assert look(room, name)["steps"][-1]["level"] == "discarded"
    post(room, f"/v1/dead-letters/{name}/redrive", expect=404)
    waiting = send(room, "nobody/k")["id"]
    post(room, f"/v1/dead-letters/{waiting}/discard", expect=409)
    names = ("accepted", "completed", "cancelled", "expired", "discarded", "dead", "waiting", "in_flight")
    accepted, *rest = (
        room.metric(f"parlour_deliveries_{name}" + ("_total" if number < 5 else ""))
        for number, name in enumerate(names)
    )
    assert accepted == 2 == sum(rest)
    # And after a restart.
    room.kill()
    room = kept()
    eventually(lambda: room.http("GET", "/readyz").status == 200, what="the logs are read")
    assert room.metric("parlour_deliveries_accepted_total") == 2
    assert room.metric("parlour_deliveries_discarded_total") == 1


def test_a_list_has_pages(room):
    names = [send(room, f"paged/{number}")["id"] for number in range(7)]
    seen, after = [], ""
    while after is not None:
        path = f"/v1/deliveries?agent_type=paged&state=accepted&limit=3{after}"
        page = json.loads(room.http("GET", path).body)
        seen += [found["id"] for found in page["deliveries"]]
        after = page["next"] and f"&after={page['next']}"
    assert sorted(seen) == sorted(names) and len(seen) == 7
    for query in ("state=done", "limit=0", "limit=5000", "after=x", "agent_type=a%20b", "other=1"):
        assert room.http("GET", f"/v1/deliveries?{query}").status == 400, query


def test_steps_stream_and_resume_without_a_gap(room):
    name = send(room, "streamed/k")["id"]

    def stream(last=None):
        command = ["curl", "-sN", "--max-time", "20", f"{room.url}/v1/deliveries/{name}/events"]
        command += [] if last is None else ["-H", f"Last-Event-ID: {last}"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def steps(text):
        blocks = [dict(line.split(": ", 1) for line in it.splitlines()) for it in text.split("\n\n") if it]
        return [(int(block["id"]), json.loads(block["data"])["level"]) for block in blocks]

    follows = stream()
    with worker(room.url, "streamed"):
        text, _ = follows.communicate(timeout=30)
    whole = steps(text)
    assert whole == [(1, "accepted"), (2, "dispatched"), (3, "received"), (4, "completed")]
    resumed, _ = stream(last=2).communicate(timeout=30)
    assert steps(resumed) == whole[2:]


# The command line


def parlour(room, *args, expect=0, stdin=None) -> subprocess.CompletedProcess:
    command = [BINARY, *args, "--url", room.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, input=stdin)
    assert done.returncode == expect, done
    return done


def test_the_command_line_sends_waits_and_tells(kept):
    room = kept(timeouts__grace="1ms")
    name = parlour(room, "send", "echo/k", "hello", "--key", "k").stdout.strip()
    assert parlour(room, "send", "echo/k", "hello", "--key", "k").stdout.strip() == name
    refused = parlour(room, "send", "echo/k", "other", "--key", "k", expect=5)
    assert "idempotency key" in refused.stderr
    assert name in parlour(room, "deliveries", "ls").stdout
    late = parlour(room, "deliveries", "wait", name, "--timeout", "10ms", expect=6)
    assert f"parlour deliveries wait {name}" in late.stderr
    with worker(room.url, "echo"):
        assert parlour(room, "deliveries", "wait", name).stdout == "hello"
        assert parlour(room, "send", "echo/k", "again", "--wait", "30s").stdout == "again"
    shown = parlour(room, "deliveries", "show", name).stdout
    assert "completed" in shown and "dispatched" in shown
    assert json.loads(parlour(room, "deliveries", "show", name, "--json").stdout)["id"] == name
    gone = parlour(room, "send", "nobody/k", "x", "--delay", "1h").stdout.strip()
    assert "cancelled" in parlour(room, "deliveries", "cancel", gone, "--reason", "twice").stdout
    parlour(room, "deliveries", "wait", gone, expect=1)
    parlour(room, "deliveries", "show", "0-00000000-7", expect=3)


def test_the_command_line_sends_dead_letters_back(kept):
    room = kept(timeouts__grace="1ms")
    first, second = dead(room, body=b"one"), dead(room, body=b"two")
    table = parlour(room, "dead-letters", "ls").stdout
    assert first in table and second in table and "no luck" in table
    assert "one" in parlour(room, "dead-letters", "show", first).stdout
    assert parlour(room, "dead-letters", "redrive", first).stdout.strip() == first
    partly = parlour(room, "dead-letters", "discard", first, second, expect=8)
    assert partly.stdout.strip() == second
    with worker(room.url, "broken"):
        assert parlour(room, "deliveries", "wait", first).stdout == "one"
    assert first not in parlour(room, "dead-letters", "ls").stdout
