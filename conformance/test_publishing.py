"""Durable events over `parlour.v1`: kept before they are acknowledged, and published once."""

from __future__ import annotations

import asyncio
import json
import uuid

import pytest

from parlour_v1 import Channel, Field, Kind, Session, frame
from room import eventually, soon, worker
from test_durable import ended, parlour
from test_events import publish, subscribe, unsettled
from test_rest import Events
from test_text import Typist

SPLIT = True


async def subscribed(room, begin: str) -> str:
    """A name of that beginning, which no other test has: agents of this type are owed what is
    published to topics of this type."""
    name = f"{begin}-{uuid.uuid4().hex[:8]}"
    await asyncio.to_thread(subscribe, room, name, topic_type=name, agent_type=name)
    return name


async def owed(room, agent_type, count):
    """The deliveries to agents of this type, once there are so many."""
    found = lambda: (it := unsettled(room, agent_type)) and len(it) >= count and it
    deliveries = await soon(found, what=f"that {count} are owed to {agent_type}")
    assert len(deliveries) == count, deliveries
    return deliveries


async def test_what_a_channel_publishes_is_kept_and_delivered(room):
    name = await subscribed(room, "order")
    async with await Channel.open(room.url, feature=["deliveries"]) as channel:
        accepted = await channel.publish(
            f"{name}/shop", b"7", ack="durable", conversation="talk", message_id="m-7"
        )
        assert accepted.kind == Kind.ACCEPTED, accepted
        assert accepted.get(Field.RECIPIENTS) == 1 and accepted.get(Field.KNOWN) is None
        assert accepted.get(Field.ACK) == "memory", "a room without a disk"
        assert accepted.get(Field.CONVERSATION) == "talk"
        assert accepted.get(Field.MESSAGE_ID) == "m-7"
        assert accepted.get(Field.DELIVERY) is None
        # What need not be kept is not, and is answered as ever.
        for fields in ({}, {"ack": "memory"}):
            done = await channel.publish(f"{name}/shop", b"8", **fields)
            assert (done.kind, done.get(Field.RECIPIENTS)) == (Kind.DONE, 0)
        nobody = await channel.publish(f"not.{name}/shop", ack="durable")
        assert nobody.get(Field.RECIPIENTS) == 0
    (delivery,) = await owed(room, name, 1)
    assert (delivery["agent"], delivery["conversation"]) == (f"{name}/shop", "talk")
    with worker(room.url, name, "--", "sh", "-c", 'test "$(cat)" = 7'):
        found = await asyncio.to_thread(ended, room, delivery["id"])
    assert found["state"] == "completed", found


async def test_it_is_the_same_event_through_every_door(room):
    door = await subscribed(room, "door")
    key = uuid.uuid4().hex
    once = {"ack": "durable", "idempotency_key": key}
    async with await Channel.open(room.url) as channel, await Typist.open(room) as typist:
        first = await channel.publish(f"{door}/k", b"x", content_type="text/plain", **once)
        again = await channel.publish(f"{door}/k", b"x", content_type="text/plain", **once)
        name = first.get(Field.MESSAGE_ID)
        assert (again.get(Field.MESSAGE_ID), again.get(Field.KNOWN)) == (name, 1)
        posted = await asyncio.to_thread(
            publish, room, f"{door}/k", b"x", idempotency_key=key
        )
        assert (posted["id"], posted["recipients"]) == (name, 1)
        typed = await typist.say(
            kind="publish", id=1, topic_type=door, source="k", payload="x",
            content_type="text/plain", **once,
        )  # fmt: skip
        assert typed == {
            "kind": "accepted", "id": 1, "message_id": name, "ack": "memory", "recipients": 1,
            "conversation": first.get(Field.CONVERSATION), "known": True,
        }  # fmt: skip
        other = await channel.publish(f"{door}/k", b"y", content_type="text/plain", **once)
        assert other.fault == "conflict"
        # The control: without a key it is another event.
        once.pop("idempotency_key")
        await channel.publish(f"{door}/k", b"x", content_type="text/plain", **once)
    await owed(room, door, 2)


async def test_what_one_channel_publishes_is_accepted_in_its_order(room):
    topic = f"ordered-{uuid.uuid4().hex[:8]}"
    stream = await asyncio.to_thread(Events, room, f"/v1/topics/{topic}/events")
    async with await Channel.open(room.url) as channel:
        numbers = [channel.number() for _ in range(100)]
        fields = {"topic_type": topic, "content_type": "text/plain", "ack": "durable"}
        await channel.send(*(
            frame(Kind.PUBLISH, str(at).encode(), id=number, source=f"s{at % 3}", **fields)
            for at, number in enumerate(numbers)
        ))  # fmt: skip
        for number in numbers:
            assert (await channel.answer(number)).kind == Kind.ACCEPTED
    heard = [(await asyncio.to_thread(stream.next))["data"] for _ in numbers]
    assert heard == [str(at) for at in range(100)]
    stream.close()


async def test_what_is_wrong_is_refused_as_over_rest(start_room):
    room = await asyncio.to_thread(start_room, limits__fan_out=1)
    for agent_type in ("one", "two"):
        await asyncio.to_thread(
            subscribe, room, agent_type, topic_type="wide", agent_type=agent_type
        )
    async with await Channel.open(room.url) as channel:
        strange = await channel.publish("narrow/s", ack="always")
        assert strange.fault == "invalid" and "durable" in strange.get(Field.HINT)
        for kind in ("narrow/s", "wide/s"):
            much = await channel.publish(kind, bytes((1 << 20) + 1), ack="durable")
            assert much.fault == "too_large"
        wide = await channel.publish("wide/s", ack="durable")
        assert (wide.fault, wide.get(Field.CONFIG_KEY)) == ("too_large", "limits.fan_out")
        answer = await asyncio.to_thread(publish, room, "wide/s", expect=413)
        assert answer["detail"] == wide.get(Field.DETAIL)
        loop = await channel.publish("narrow/s", ack="durable", hops=17)
        assert loop.fault == "invalid"
        assert (await channel.publish("narrow/s", ack="durable")).kind == Kind.ACCEPTED


async def test_one_without_a_number_or_with_one_in_use_ends_the_channel(room):
    channel = await Channel.open(room.url)
    await channel.send(frame(Kind.PUBLISH, topic_type="t", source="s", ack="durable"))
    fault = await channel.next(Kind.FAULT)
    assert fault.fault == "invalid" and "PUBLISH needs `id`" in fault.get(Field.DETAIL)
    assert await channel.closed() == 1002

    channel = await Channel.open(room.url)
    accepted = await channel.send_durably("nobody/k")
    number, name = channel.number(), accepted.get(Field.DELIVERY)
    await channel.send(frame(Kind.WAIT, id=number, delivery=name, generation=1))
    fields = {"id": number, "topic_type": "t", "source": "s"}
    await channel.send(frame(Kind.PUBLISH, **fields))
    assert (await channel.answer(number)).kind == Kind.DONE, "the control: one that is not kept"
    await channel.send(frame(Kind.PUBLISH, ack="durable", **fields))
    assert await channel.closed() == 1002


# Crashes


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "the control: in memory"])
async def test_a_host_that_is_killed_behind_its_acknowledgement_has_kept_it(
    kept, start_room, keeps
):
    start = kept if keeps else start_room
    room = await asyncio.to_thread(start)
    name = await subscribed(room, "sink")
    channel = await Channel.open(room.url)
    fields = {"ack": "durable", "idempotency_key": "once"}
    accepted = await channel.publish(f"{name}/k", b"x", **fields)
    assert accepted.get(Field.ACK) == ("durable" if keeps else "memory")
    await asyncio.to_thread(room.kill)
    room = await asyncio.to_thread(start)
    async with await Channel.open(room.url) as channel:
        again = await channel.publish(f"{name}/k", b"x", **fields)
    is_same = again.get(Field.MESSAGE_ID) == accepted.get(Field.MESSAGE_ID)
    assert (is_same, again.get(Field.KNOWN) == 1, again.get(Field.RECIPIENTS)) == (
        (True, True, 1) if keeps else (False, False, 0)
    )
    if keeps:
        await owed(room, name, 1)


@pytest.mark.parametrize("resumes", [True, False], ids=["resumed", "the control: anew"])
async def test_a_session_that_goes_on_publishes_once(room, resumes):
    name = await subscribed(room, "again")
    session = Session()
    channel = await Channel.open(room.url, session=session)
    rounds = 10
    for at in range(rounds):
        number = channel.number()
        publish = frame(
            Kind.PUBLISH, id=number, topic_type=name, source=str(at), ack="durable"
        )  # fmt: skip
        await channel.send(publish)
        if at % 2:
            # The host has had it, and the acknowledgement is lost or is not.
            await soon(lambda: len(unsettled(room, name)) > at)
        channel.kill()
        await channel.closed()
        heard = channel.inbox
        if not resumes:
            session, heard = Session(), []
        channel = await Channel.open(room.url, session=session)
        assert bool(channel.welcome.get(Field.RESUMED)) == resumes
        channel.inbox[:0], channel._next_id = heard, number
        if not resumes:
            await channel.send(publish)
        accepted = await channel.answer(number)
        assert (accepted.kind, accepted.get(Field.RECIPIENTS)) == (Kind.ACCEPTED, 1)
    await channel.close()
    if resumes:
        await owed(room, name, rounds)
    else:
        assert await soon(lambda: len(unsettled(room, name)) > rounds)


# The command line


def test_the_command_line_publishes_what_is_kept(kept):
    room = kept()
    publish = ("publish", "paid/shop", "7", "--durable", "--idempotency-key", "k")
    lonely = parlour(room, "publish", "unheard/k", "x", "--durable")
    assert "recipients 0" in lonely.stdout and "nobody has subscribed" in lonely.stderr
    parlour(room, "subscriptions", "set", "mail", "paid", "mailer")
    first = json.loads(parlour(room, *publish, "--json").stdout)
    assert (first["ack"], first["recipients"], first["known"]) == ("durable", 1, False)
    room.kill()
    room = kept()
    again = json.loads(parlour(room, *publish, "--output", "jsonl").stdout)
    assert again == first | {"known": True}
    shown = parlour(room, *publish)
    lines = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines())
    assert lines == {"id": first["id"], "ack": "durable", "recipients": "1"}
    assert "published before" in shown.stderr
    other = parlour(room, *publish[:2], "8", *publish[3:], expect=5)
    assert "idempotency key" in other.stderr
    assert parlour(room, *publish, "--quiet").stderr == ""
    parlour(room, "publish", "paid/shop", "7", "--idempotency-key", "k", expect=2)
    script = 'test "$(cat)" = 7'
    with worker(room.url, "mailer", "--", "sh", "-c", script):
        eventually(lambda: room.metric("parlour_deliveries_completed_total") == 1)
    # The control: one that need not be kept is owed to nobody.
    assert parlour(room, "publish", "paid/shop", "7").stdout == "recipients 0\n"


def test_the_command_line_keeps_subscriptions(kept):
    room = kept()
    run = lambda *args, expect=0: parlour(room, "subscriptions", *args, expect=expect)
    empty = run("ls")
    assert "NAME" in empty.stdout and "set --help" in empty.stderr
    made = run("set", "audit", "order.*", "auditor", "--order", "strict")
    lines = [line.split(maxsplit=1) for line in made.stdout.replace("agent type", "agent").splitlines()]
    assert lines == [
        ["name", "audit"], ["topics", "order.*"], ["agent", "auditor"], ["order", "strict"], ["lag", "0"]
    ]  # fmt: skip
    run("set", "mail", "order.paid", "mailer")
    for topic in ("order.paid/k", "order.paid/k", "order.sent/k"):
        parlour(room, "publish", topic, "x", "--durable")
    eventually(lambda: json.loads(run("show", "audit", "--json").stdout)["lag"] == 3)
    room.kill()
    room = kept()
    listed = [json.loads(line) for line in run("ls", "--output", "jsonl").stdout.splitlines()]
    assert [(it["id"], it["lag"], it["order"]) for it in listed] == [
        ("audit", 3, "strict"), ("mail", 2, "relaxed")
    ]  # fmt: skip
    assert all(it["oldest_ms"] > 0 for it in listed)
    # Subscriptions of workers are not among them.
    with worker(room.url, "auditor", "--", "sh", "-c", "exit 1"):
        whole = json.loads(run("ls", "--json").stdout)
    assert [it["id"] for it in whole["subscriptions"]] == ["audit", "mail"]
    table = [line.split() for line in run("ls").stdout.splitlines()]
    assert table[0] == ["NAME", "TOPICS", "AGENT", "TYPE", "ORDER", "LAG", "OLDEST"]
    assert table[1][:5] == ["audit", "order.*", "auditor", "strict", "3"] and table[1][5][-1] == "s"
    # It is changed for what comes, and what it was owed stays.
    changed = json.loads(run("set", "mail", "order.sent", "mailer", "--json").stdout)
    assert (changed["topic_type"], changed["lag"]) == ("order.sent", 2)
    removed = run("rm", "mail")
    assert removed.stdout == "mail is removed\n" and "2 have not ended" in removed.stderr
    for args, code in {
        ("show", "mail"): 3,
        ("rm", "mail"): 3,
        ("show", "no name"): 1,
        ("set", "x", "no topic!", "a"): 2,
        ("set", "x", "topic", "no agent"): 2,
        ("set", "x", "topic", "a", "--order", "any"): 2,
        ("set", "x", "topic"): 2,
    }.items():
        assert "error:" in run(*args, expect=code).stderr, args
    gone = run("show", "mail", "--json", expect=3)
    assert json.loads(gone.stderr)["kind"] == "not_found"
