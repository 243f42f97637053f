"""Events that are kept until all who subscribed have had them."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import sqlite3
import subprocess

from parlour_v1 import Channel, Field, Kind, frame
from room import BINARY, eventually, worker
from test_durable import ended
from test_rest import Events


def publish(room, topic="news/s", body=b"hello", expect=202, **headers) -> dict:
    """Publishes a durable event. Headers are written with `_` for `-`."""
    headers = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    headers = {"parlour-ack": "durable", "content-type": "text/plain"} | headers
    answer = room.http("POST", f"/v1/topics/{topic}", body, headers)
    assert answer.status == expect, (answer.status, answer.body)
    return json.loads(answer.body)


def ask(room, method, path, body=None, expect=200) -> dict:
    body = None if body is None else json.dumps(body).encode()
    answer = room.http(method, path, body)
    assert answer.status == expect, (answer.status, answer.body)
    return json.loads(answer.body)


def subscribe(room, name, expect=201, **wanted) -> dict:
    return ask(room, "PUT", f"/v1/subscriptions/{name}", wanted, expect)


def unsettled(room, agent_type) -> list[dict]:
    return ask(room, "GET", f"/v1/deliveries?agent_type={agent_type}")["deliveries"]


def test_a_durable_subscription_gets_what_is_published_while_no_worker_is_there(kept, tmp_path):
    room = kept()
    made = subscribe(room, "mail", topic_type="order.paid", agent_type="mailer")
    assert (made["durable"], made["lag"], made["order"]) == (True, 0, "relaxed")
    published = publish(room, "order.paid/shop%207", b"paid")
    assert (published["ack"], published["recipients"]) == ("durable", 1)
    eventually(lambda: ask(room, "GET", "/v1/subscriptions/mail")["lag"] == 1)
    room.kill()
    checked = subprocess.run([BINARY, "verify", f"--data={tmp_path / 'data'}"], capture_output=True)
    assert checked.returncode == 0, checked
    room = kept()
    listed = ask(room, "GET", "/v1/subscriptions")["subscriptions"]
    assert [(it["id"], it["lag"], it["oldest_ms"] > 0) for it in listed] == [("mail", 1, True)]
    waits = unsettled(room, "mailer")
    assert [it["agent"] for it in waits] == ["mailer/shop 7"]
    script = 'test "$(cat)" = paid && test "$PARLOUR_TOPIC_TYPE" = order.paid'
    with worker(room.url, "mailer", "--", "sh", "-c", script):
        found = ended(room, waits[0]["id"])
    assert found["state"] == "completed", found
    assert ask(room, "GET", "/v1/subscriptions/mail")["lag"] == 0


def test_an_event_is_owed_to_each_subscription_and_to_each_agent_once(room):
    for name, wanted in {
        "one.exact": {"topic_type": "owed.paid", "agent_type": "exact"},
        "one.prefix": {"topic_type_prefix": "owed.", "agent_type": "prefix"},
        "one.other": {"topic_type": "owed.sent", "agent_type": "other"},
    }.items():
        subscribe(room, name, **wanted)
    assert publish(room, "owed.paid/k")["recipients"] == 2
    eventually(lambda: len(unsettled(room, "exact")) == 1 == len(unsettled(room, "prefix")))
    assert unsettled(room, "other") == []
    # What is removed is owed nothing more; what it was owed stays.
    removed = ask(room, "DELETE", "/v1/subscriptions/one.exact")
    assert removed["lag"] == 1
    assert publish(room, "owed.paid/k")["recipients"] == 1
    ask(room, "GET", "/v1/subscriptions/one.exact", expect=404)
    assert len(unsettled(room, "exact")) == 1


def test_a_subscription_that_was_removed_is_not_there_after_a_restart(kept):
    room = kept()
    for name in ("stays", "goes"):
        subscribe(room, name, topic_type="come.go", agent_type=name)
    ask(room, "DELETE", "/v1/subscriptions/goes")
    room.kill()
    room = kept()
    assert [it["id"] for it in ask(room, "GET", "/v1/subscriptions")["subscriptions"]] == ["stays"]
    assert publish(room, "come.go/k")["recipients"] == 1


async def test_a_worker_that_subscribed_acknowledges_an_event_by_its_reply(room):
    async with await Channel.open(room.url) as agents:
        await agents.request(Kind.REGISTER, agent_type="reader")
        wanted = {"topic_type": "read.me", "agent_type": "reader"}
        await agents.request(Kind.SUBSCRIBE, subscription=1, **wanted)
        published = await asyncio.to_thread(publish, room, "read.me/k", b"news")
        assert published["recipients"] == 1
        call = await agents.next(Kind.CALL)
        assert (call.get(Field.TOPIC_TYPE), call.get(Field.SOURCE)) == ("read.me", "k")
        assert (call.payload, call.get(Field.ATTEMPT)) == (b"news", 1)
        assert call.get(Field.CONVERSATION) == published["conversation"]
        name = call.get(Field.DELIVERY)
        await agents.send(frame(Kind.REPLY, id=call.id))
        found = await asyncio.to_thread(ended, room, name)
        assert (found["state"], found["agent"]) == ("completed", "reader/k")
    # Without the worker its subscription has ended too.
    gone = lambda: publish(room, "read.me/k")["recipients"] == 0
    await asyncio.to_thread(eventually, gone)


def test_what_a_killed_host_had_published_is_delivered_once_to_each(kept):
    room = kept()
    subscribe(room, "all", topic_type="burst", agent_type="sink")
    sent = 0
    for _ in range(4):
        for number in range(25):
            publish(room, f"burst/{number}", str(sent).encode())
            sent += 1
        room.kill()
        room = kept()
    eventually(lambda: ask(room, "GET", "/v1/subscriptions/all")["lag"] == sent)
    assert room.metric("parlour_deliveries_accepted_total") == sent
    with worker(room.url, "sink", "--", "true"):
        eventually(lambda: ask(room, "GET", "/v1/subscriptions/all")["lag"] == 0, timeout=30)
    assert room.metric("parlour_deliveries_completed_total") == sent
    assert room.metric("parlour_deliveries_owed") == 0


def test_the_same_key_publishes_once_also_after_a_restart(kept):
    room = kept()
    subscribe(room, "once", topic_type="keyed", agent_type="sink")
    first = publish(room, "keyed/k", b"x", idempotency_key="k1")
    room.kill()
    room = kept()
    again = publish(room, "keyed/k", b"x", idempotency_key="k1")
    assert again == first
    other = publish(room, "keyed/k", b"y", expect=409, idempotency_key="k1")
    assert other["kind"] == "conflict"
    eventually(lambda: len(unsettled(room, "sink")) == 1)


def test_in_strict_order_an_agent_gets_one_at_a_time(start_room):
    room = start_room(durable__backoff_base="1ms", durable__backoff_cap="2ms")
    subscribe(room, "line", topic_type="row", agent_type="rower", order="strict")
    for number in range(5):
        publish(room, "row/boat", str(number).encode())
    eventually(lambda: len(unsettled(room, "rower")) == 5)
    names = [it["id"] for it in unsettled(room, "rower")]
    # Each fails once. Out of order, others would begin before the first is there again.
    script = 'test "$PARLOUR_ATTEMPT" = 2'
    with worker(room.url, "rower", "--", "sh", "-c", script):
        found = [ended(room, name) for name in names]
    steps = [(step["at"], step["level"]) for it in found for step in it["steps"]]
    assert all(it["state"] == "completed" and it["attempt"] == 2 for it in found)
    begun = [it["steps"][1]["at"] for it in found]
    over = [it["steps"][-1]["at"] for it in found]
    assert all(end <= begin for end, begin in zip(over, begun[1:])), steps


# Streams


def test_a_stream_goes_on_where_it_was_and_misses_nothing(kept):
    room = kept()
    stream = Events(room, "/v1/topics/tick/events")
    publish(room, "tick/a", b"0")
    assert stream.next()["data"] == "0"
    first = stream.place
    stream.close()
    for number in range(1, 5):
        publish(room, "tick/a", str(number).encode())
        publish(room, "tock/a", b"another topic")
    room.kill()
    room = kept()
    stream = Events(room, "/v1/topics/tick/events", **{"Last-Event-ID": first})
    assert [stream.next()["data"] for _ in range(4)] == ["1", "2", "3", "4"]
    publish(room, "tick/a", b"5")
    room.http("POST", "/v1/topics/tick/a", b"6", {"content-type": "text/plain"})
    assert {stream.next()["data"], stream.next()["data"]} == {"5", "6"}
    stream.close()


def test_a_stream_without_an_id_begins_now_and_one_of_many_types_has_no_ids(room):
    publish(room, "later.x/a", b"before")
    stream, many = (Events(room, f"/v1/topics/{it}/events") for it in ("later.x", "later.*"))
    publish(room, "later.x/a", b"after")
    assert [it.next()["data"] for it in (stream, many)] == ["after", "after"]
    assert stream.place and many.place is None
    refused = room.http("GET", "/v1/topics/later.*/events", headers={"Last-Event-ID": stream.place})
    assert refused.status == 400 and b"by itself" in refused.body
    for it in (stream, many):
        it.close()


def test_what_is_gone_from_the_log_is_not_passed_over(start_room):
    room = start_room(durable__retention_age="1s", durable__partitions=1)
    stream = Events(room, "/v1/topics/old/events")
    publish(room, "old/a", b"0")
    stream.next()
    place = stream.place
    stream.close()
    _, epoch, position, offset = place.split("-")
    other = f"{int(epoch, 16) ^ 1:08x}"
    refused = {"x": 400, "0-1": 400, f"0-{epoch}-{position}-x": 400, f"0-{epoch}-{int(position) + 99}-0": 410}
    # What another owner wrote in that place, before the log was restored.
    refused[f"0-{other}-{position}-{offset}"] = 410
    for bad, status in refused.items():
        # Not read any further, as a stream has no end.
        with contextlib.closing(http.client.HTTPConnection(*room.address, timeout=10)) as connection:
            connection.request("GET", "/v1/topics/old/events", headers={"Last-Event-ID": bad})
            assert connection.getresponse().status == status, bad


def test_bad_input_is_told_what_to_change(room):
    assert "durable" in publish(room, expect=400, parlour_ack="always")["hint"]
    for name, wanted, says in [
        ("n", {"agent_type": "a"}, "needed"),
        ("n", {"agent_type": "a", "topic_type": "t", "topic_type_prefix": "t"}, "needed"),
        ("n", {"agent_type": "a b", "topic_type": "t"}, "agent type"),
        ("n", {"agent_type": "a", "topic_type": "t t"}, "topic type"),
        ("n", {"agent_type": "a", "topic_type": "t", "order": "any"}, "order"),
        ("n", {"agent_type": "a", "topic_type": "t", "colour": 1}, "colour"),
        ("no%20name", {"agent_type": "a", "topic_type": "t"}, "name"),
    ]:
        refused = subscribe(room, name, expect=400, **wanted)
        assert says in refused["detail"], refused
    assert room.http("PUT", "/v1/subscriptions/n", b"{").status == 400
    # The fields of an object, without their names.
    assert "an array" in ask(room, "PUT", "/v1/subscriptions/n", ["t", None, "a", None], 400)["detail"]
    assert ask(room, "DELETE", "/v1/subscriptions/n", expect=404)["kind"] == "not_found"


def test_a_large_event_for_many_is_spread_over_commits_and_reaches_all(kept, tmp_path):
    room = kept()
    for number in range(60):
        subscribe(room, f"s{number}", topic_type_prefix="", agent_type="archive")
    body = b"x" * 1_000_000
    assert publish(room, "news/s", body)["recipients"] == 60
    eventually(lambda: len(unsettled(room, "archive")) == 60, what="all are accepted")
    room.kill()
    with sqlite3.connect(tmp_path / "data" / "parlour.db") as database:
        (longest,) = database.execute("SELECT max(length(commit_bytes)) FROM commits").fetchone()
    assert len(body) < longest < 6 * len(body)
    room = kept()
    with worker(room.url, "archive", "--", "sh", "-c", 'test "$(wc -c)" = 1000000'):
        eventually(lambda: not unsettled(room, "archive"), timeout=60, what="all are delivered")
    assert room.metric("parlour_deliveries_dead") == 0


def test_keys_of_events_are_bounded_with_those_of_messages(start_room):
    room = start_room(durable__idempotency_keys=2, durable__partitions=1)
    first = publish(room, idempotency_key="a")
    publish(room, idempotency_key="b")
    refused = publish(room, idempotency_key="c", expect=429)
    assert refused["config_key"] == "durable.idempotency_keys"
    # What was published is answered as before, and without a key there is room.
    assert publish(room, idempotency_key="a")["id"] == first["id"]
    publish(room)


def test_an_event_that_is_owed_to_more_than_fit_is_not_asked_for_again(start_room):
    room = start_room(durable__owed=2)
    for name in ("a", "b", "c"):
        subscribe(room, name, topic_type="t", agent_type=name)
    refused = publish(room, "t/s", expect=413)
    assert (refused["kind"], refused["config_key"]) == ("too_large", "durable.owed")
    assert "raise the limit" in refused["hint"] and "retry_after_ms" not in refused
    # The control: as many as fit.
    ask(room, "DELETE", "/v1/subscriptions/c")
    assert publish(room, "t/s")["recipients"] == 2


def test_there_are_no_more_subscriptions_than_the_limit(start_room):
    room = start_room(durable__subscriptions=2)
    for name in ("a", "b"):
        subscribe(room, name, topic_type="t", agent_type="x")
    refused = subscribe(room, "c", expect=429, topic_type="t", agent_type="x")
    assert refused["config_key"] == "durable.subscriptions"
    subscribe(room, "b", expect=200, topic_type="t", agent_type="y")
    assert room.limit_hits("durable.subscriptions") == 1
