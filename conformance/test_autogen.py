"""Workers and callers of the unmodified PyPI package `autogen-http-runtime` 0.1.0, in processes of
their own, and its wire by hand where its client cannot misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from autogen_core import AgentId, TopicId

from autogen_agents import Text, runtime_at
from dialect import Dialect

PROGRAM = Path(__file__).with_name("autogen_agents.py")


class Worker:
    """A worker process that has said `ready`."""

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, room, *args):
        worker = cls()
        worker.process = await asyncio.create_subprocess_exec(
            sys.executable, PROGRAM, room.url, *args, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert await worker.line() == "ready"
            yield worker
        finally:
            with contextlib.suppress(ProcessLookupError):
                worker.process.kill()
            await worker.process.wait()

    async def line(self, timeout=30.0) -> str:
        line = await asyncio.wait_for(self.process.stdout.readline(), timeout)
        return line.decode().strip()

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)


@contextlib.asynccontextmanager
async def caller(room):
    runtime = runtime_at(room.url)
    await runtime.start()
    try:
        yield runtime
    finally:
        await runtime.stop()


async def ask(runtime, agent: str, content="", **options) -> str:
    reply = await runtime.send_message(Text(content), AgentId.from_str(agent), **options)
    return reply.content


async def until(check, timeout=10.0):
    """Asks again until the answer is a true one."""
    deadline = time.monotonic() + timeout
    while not (result := await check()):
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.02)
    return result


async def test_the_demo_of_the_package_prints_what_it_should(room):
    async with (
        Worker.running(room, "reverse=reverse"),
        Worker.running(room, "upper=upper"),
        caller(room) as runtime,
    ):
        text = "Hello distributed HTTP runtime!"
        # The page that describes the package prints this line wrongly.
        assert await ask(runtime, "reverse/default", text) == "!emitnur PTTH detubirtsid olleH"
        assert await ask(runtime, "upper/default", text) == "HELLO DISTRIBUTED HTTP RUNTIME!"


async def test_a_call_carries_the_key_and_only_a_source_that_the_caller_serves(room):
    async with Worker.running(room, "who=who"), caller(room) as runtime:
        assert await ask(runtime, "who/anna") == "who/anna for None"
        stolen = AgentId("who", "admin")
        assert await ask(runtime, "who/bert", sender=stolen) == "who/bert for None"
        await runtime.register_factory("mine", lambda: None)
        sender = AgentId("mine", "me")
        assert await ask(runtime, "who/bert", sender=sender) == "who/bert for mine/me"


async def test_the_text_of_an_agents_error_reaches_the_caller(room):
    async with Worker.running(room, "fail=fail"), caller(room) as runtime:
        with pytest.raises(RuntimeError, match="cannot do windows"):
            await ask(runtime, "fail/x", "windows")
        answer = await Dialect(room).call("fail/x", '{"content": "dishes"}')
        error = answer["error"]
        assert (error["code"], error["message"]) == (-32000, "cannot do dishes")
        assert error["data"]["kind"] == "agent_failed" and error["data"]["may_have_run"] is True


async def test_events_arrive_with_their_bodies_for_both_kinds_of_subscription(room):
    async with (
        Worker.running(room, "a=listen", "--subscribe", "weather:a") as _,
        Worker.running(room, "b=listen", "--subscribe-prefix", "wea:b") as _,
        caller(room) as runtime,
    ):
        await runtime.publish_message(Text("rain"), TopicId("weather", "north"))
        await runtime.publish_message(Text("quiet"), TopicId("weak", "north"))
        await runtime.publish_message(Text("lost"), TopicId("other", "north"))

        async def heard(agent, lines):
            return len((await ask(runtime, agent)).splitlines()) >= lines

        await until(lambda: heard("a/north", 1))
        await until(lambda: heard("b/north", 2))
        assert await ask(runtime, "a/north") == "weather/north: rain"
        both = set((await ask(runtime, "b/north")).splitlines())
        assert both == {"weather/north: rain", "weak/north: quiet"}
        # The topic's source is the key of the agent that hears it.
        assert await ask(runtime, "a/south") == ""


async def test_a_star_at_the_end_of_a_prefix_matches_any_rest(room):
    # The package's own worker would drop such an event on arrival, so the frame is looked at.
    async with Dialect(room) as worker:
        await worker.register("reader")
        subscription = {
            "id": "s1",
            "type_prefix_subscription": {"topic_type_prefix": "news.*", "agent_type": "reader"},
        }
        assert (await worker.rpc("runtime.add_subscription", subscription))["result"] == {
            "ok": True
        }
        assert "error" in await worker.rpc("runtime.add_subscription", subscription)
        publisher = Dialect(room)
        answer = await publisher.publish("news.tech/server", '{"headline": "42"}')
        assert answer["id"] is None and answer["result"] is None and not answer.get("error")
        event = await worker.next()
        assert event["type"] == "cloud_event"
        assert event["topic"] == {"type": "news.tech", "source": "server"}
        # 0.1.0 writes `data` and reads `payload`.
        assert event["data"] == event["payload"] == '{"headline": "42"}'
        assert (event["data_type"], event["data_content_type"]) == ("Text", "application/json")


async def test_a_publisher_gets_no_copy_of_its_own_event(room):
    both = [Dialect(room), Dialect(room)]
    async with both[0] as publisher, both[1] as other:
        for number, client in enumerate(both):
            await client.register(f"copy{number}")
            params = {"topic_type": "copies", "agent_type": f"copy{number}"}
            await client.rpc(
                "runtime.add_subscription", {"id": f"copy{number}", "type_subscription": params}
            )
        await publisher.publish("copies/x", '"over rpc"')
        await publisher.send(
            type="cloud_event",
            topic={"type": "copies", "source": "x"},
            sender=None,
            data_type="Text",
            data_content_type="application/json",
            payload='"over the socket"',
            id="2",
        )
        got = {(await other.next())["payload"], (await other.next())["payload"]}
        assert got == {'"over rpc"', '"over the socket"'}
        assert await publisher.silent()


async def test_an_agent_instance_registers_and_serves_its_own_key(room):
    async with (
        Worker.running(room, "--instance", "clerk/anna=reverse", "--instance", "clerk/bert=upper"),
        caller(room) as runtime,
    ):
        assert await ask(runtime, "clerk/anna", "loud") == "duol"
        assert await ask(runtime, "clerk/bert", "loud") == "LOUD"
        with pytest.raises(RuntimeError):
            await ask(runtime, "clerk/carl")


async def test_a_second_registration_is_refused_until_the_first_worker_is_dead(room):
    async with Worker.running(room, "only=upper") as first, caller(room) as runtime:
        second = Dialect(room)
        answer = await second.register("only")
        assert answer["error"]["code"] == -32000
        assert answer["error"]["data"]["kind"] == "conflict"
        first.kill()

        async def freed():
            return (await second.register("only")).get("result") == {"ok": True}

        await until(freed, 5)
        async with second:
            call = asyncio.create_task(ask(runtime, "only/x", "again"))
            await second.answer(await second.next(), '{"content": "AGAIN"}')
            assert await call == "AGAIN"


async def test_a_caller_learns_within_a_second_that_its_worker_was_killed(room, say):
    async with Worker.running(room, "hang=hang") as worker:
        call = asyncio.create_task(Dialect(room).call("hang/x", '{"content": ""}'))
        assert await worker.line() == "began"
        worker.kill()
        killed = time.monotonic()
        problem = (await call)["error"]["data"]
        took = time.monotonic() - killed
        say(f"told of a killed worker after {took * 1000:.0f} ms")
        assert problem["kind"] == "worker_lost" and problem["may_have_run"] is True
        # The promise is a second; the bound is for machines that are busy with other things.
        assert took < 5


async def test_500_calls_at_once_with_equal_request_ids_each_get_their_own_answer(room):
    async with Worker.running(room, "mirror=reverse"), contextlib.AsyncExitStack() as stack:
        # Each of these counts its requests from 1.
        callers = [await stack.enter_async_context(caller(room)) for _ in range(5)]
        texts = {(who, n): f"caller {who} call {n}" for who in range(5) for n in range(100)}
        replies = await asyncio.gather(
            *(ask(callers[who], "mirror/m", text) for (who, _), text in texts.items())
        )
        assert [reply[::-1] for reply in replies] == list(texts.values())


async def test_a_stranger_cannot_settle_a_call(room):
    async with Dialect(room) as worker, Dialect(room) as stranger:
        await worker.register("vault")
        call = asyncio.create_task(Dialect(room).call("vault/x"))
        request = await worker.next()
        await stranger.answer(request, '"forged"')
        # The stranger's own call is behind the forgery on its socket, so the forgery was handled.
        await stranger.send(
            type="request", request_id="mine", target={"type": "nobody", "key": "x"}, data=""
        )
        assert (await stranger.next())["request_id"] == "mine"
        await worker.answer(request, '"honest"')
        assert (await call)["result"]["data"] == '"honest"'


async def test_calls_wait_for_a_worker_that_has_registered_and_not_yet_connected(room):
    worker = Dialect(room)
    await worker.register("late")
    call = asyncio.create_task(Dialect(room).call("late/x"))
    done, _ = await asyncio.wait([call], timeout=0.3)
    assert not done
    async with worker:
        await worker.answer(await worker.next(), '"here"')
        assert (await call)["result"]["data"] == '"here"'


async def test_a_worker_whose_socket_never_comes_is_forgotten(start_room):
    room = start_room(timeouts__attach="300ms")
    await Dialect(room).register("ghost")

    async def forgotten():
        return "result" in await Dialect(room).register("ghost")

    await until(forgotten, 5)


async def test_a_call_to_an_agent_that_nobody_serves_fails_at_once(room):
    begun = time.monotonic()
    problem = (await Dialect(room).call("nobody/x"))["error"]["data"]
    assert problem["kind"] == "unknown_agent" and problem["may_have_run"] is False
    assert problem["hint"]
    assert time.monotonic() - begun < 5


async def test_a_message_whose_frame_old_workers_would_refuse_is_too_large(room):
    async with Dialect(room) as worker:
        await worker.register("small")
        # Every quote becomes two bytes in the frame, which then exceeds 1 MiB.
        begun = time.monotonic()
        answer = await asyncio.to_thread(
            room.http, "POST", "/v1/agents/small/x/call", b'"' * 600_000
        )
        problem = json.loads(answer.body)
        assert problem["kind"] == "too_large" and problem["may_have_run"] is False
        assert time.monotonic() - begun < 5, "told at once, not when something else happens"
        assert await worker.silent()
        call = asyncio.create_task(Dialect(room).call("small/x", "a" * 900_000))
        request = await worker.next()
        assert request["data"] == "a" * 900_000
        await worker.answer(request)
        assert "result" in await call


async def test_a_worker_of_this_dialect_is_not_asked_to_describe_itself(room):
    async with Dialect(room) as worker:
        assert "result" in await worker.register("plain")
        page = await asyncio.to_thread(room.get, "/v1/agents/plain")
        assert page["type"] == "plain" and page["description"] is None and page["undescribed"]
        assert await worker.silent()


async def test_a_response_needs_no_original_sender(room):
    async with Dialect(room) as worker:
        await worker.register("curt")
        call = asyncio.create_task(Dialect(room).call("curt/x"))
        request = await worker.next()
        await worker.send(
            type="response", request_id=request["request_id"], error="Failed to deserialize"
        )
        assert (await call)["error"]["message"] == "Failed to deserialize"


async def test_a_request_over_the_socket_gets_its_response_there_and_once(room):
    async with Dialect(room) as worker, Dialect(room) as client:
        await worker.register("desk")
        await client.send(
            type="request",
            request_id="7",
            target={"type": "desk", "key": "k"},
            source=None,
            data_type="Text",
            data_content_type="application/json",
            data='"question"',
        )
        request = await worker.next()
        assert request["target"] == {"type": "desk", "key": "k"}
        assert request["data"] == '"question"' and "original_sender" in request
        # Answered twice: the second goes nowhere.
        await worker.answer(request, '"answer"')
        await worker.answer(request, '"answer"')
        response = await client.next()
        assert (response["type"], response["request_id"]) == ("response", "7")
        assert (response["error"], response["data"]) == ("", '"answer"')
        assert await client.silent()


async def test_a_response_that_nobody_waits_for_is_ignored(room):
    async with Dialect(room) as worker:
        await worker.register("chatty")
        await worker.answer({"request_id": "999999"})
        await worker.send(type="gossip")
        call = asyncio.create_task(Dialect(room).call("chatty/x"))
        await worker.answer(await worker.next(), '"still here"')
        assert (await call)["result"]["data"] == '"still here"'


async def test_subscriptions_are_listed_and_removed_in_the_packages_forms(room):
    async with Dialect(room) as client:
        await client.register("list")
        wanted = [
            {"id": "l1", "type_subscription": {"topic_type": "t", "agent_type": "list"}},
            {
                "id": "l2",
                "type_prefix_subscription": {"topic_type_prefix": "p.", "agent_type": "list"},
            },
        ]
        for subscription in wanted:
            await client.rpc("runtime.add_subscription", subscription)
        listed = (await client.rpc("runtime.get_subscriptions"))["result"]["subscriptions"]
        assert (
            sorted((s for s in listed if s["id"] in ("l1", "l2")), key=lambda s: s["id"]) == wanted
        )
        assert (await client.rpc("runtime.remove_subscription", {"id": "l1"}))["result"] == {
            "ok": True
        }
        error = (await client.rpc("runtime.remove_subscription", {"id": "l1"}))["error"]
        assert error["code"] == -32000
        listed = (await client.rpc("runtime.get_subscriptions"))["result"]["subscriptions"]
        assert wanted[0] not in listed and wanted[1] in listed


async def test_a_dead_workers_subscriptions_die_with_it(room):
    worker = await Dialect(room).open()
    await worker.register("brief")
    params = {"topic_type": "brief", "agent_type": "brief"}
    await worker.rpc("runtime.add_subscription", {"id": "brief", "type_subscription": params})
    worker.socket.transport.abort()

    async def gone():
        listed = (await Dialect(room).rpc("runtime.get_subscriptions"))["result"]["subscriptions"]
        return all(s["id"] != "brief" for s in listed)

    await until(gone)


def test_a_request_without_a_client_id_is_an_error_of_json_rpc(room):
    body = json.dumps({"jsonrpc": "2.0", "method": "runtime.get_subscriptions", "id": 1})
    answer = room.http("POST", "/rpc", body, {"content-type": "application/json"})
    assert answer.status == 200
    assert json.loads(answer.body)["error"]["code"] == -32000


@pytest.mark.parametrize("content_type", ["text/plain", "application/xml", None])
def test_another_content_type_is_answered_with_415(room, content_type):
    headers = {"x-client-id": "c"} | ({"content-type": content_type} if content_type else {})
    answer = room.http("POST", "/rpc", b"{}", headers)
    assert answer.status == 415
    problem = json.loads(answer.body)
    assert problem["kind"] == "invalid" and problem["hint"]


def test_a_content_type_with_a_charset_is_taken(room):
    body = json.dumps({"jsonrpc": "2.0", "method": "runtime.get_subscriptions", "id": 1})
    headers = {"x-client-id": "c", "content-type": "Application/JSON; charset=utf-8"}
    answer = json.loads(room.http("POST", "/rpc", body, headers).body)
    assert "subscriptions" in answer["result"] and answer["id"] == 1
