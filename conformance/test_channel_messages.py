"""The worker channel `parlour.v1`, frame by frame: calls, events, and who sent them."""

from __future__ import annotations

import asyncio
import contextlib
import time

from websockets.exceptions import ConnectionClosed

from parlour_v1 import Channel, Field, Kind, frame, pair

# Calls

# Every test runs over a network that delivers byte by byte, too.
SPLIT = True


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
        await worker.reply(
            call, b"\0\xff", content_type="x/y", data_type="Out", metadata={"m": "1"}
        )
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
