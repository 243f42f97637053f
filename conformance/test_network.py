"""Workers of the Rust SDK on a network that fails: half-open, one-way, flapping, slow, and a storm."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time

import pytest

from parlour_v1 import Channel, Field, Kind
from proxy import Proxy
from room import soon
from room import worker as room_worker

HEARTBEAT = "1s"


@contextlib.asynccontextmanager
async def worker(*arguments):
    """One beside other contexts that are asynchronous."""
    with room_worker(*arguments) as process:
        yield process


async def served(caller: Channel, agent: str, patience=20.0) -> float:
    """Calls until an answer comes. Returns how long that took."""
    began = time.monotonic()
    while (await caller.call(agent, b"x", timeout_ms=2000)).kind != Kind.REPLY:
        assert time.monotonic() - began < patience
        await asyncio.sleep(0.02)
    return time.monotonic() - began


@pytest.mark.parametrize("way", ["half-open", "one-way up", "one-way down"])
async def test_a_dead_network_is_found_within_two_heartbeats_by_both(start_room, say, way):
    """N1, N2: nobody sends a FIN or RST; what ran is heard of after the worker came back."""
    room = start_room(timeouts__heartbeat=HEARTBEAT, timeouts__grace="20s")
    async with (
        Proxy(room.address) as network,
        worker(network.url, "echo"),
        await Channel.open(room.url) as caller,
    ):
        await served(caller, "echo/k")
        links = network.opened
        network.silence(up=way != "one-way down", down=way != "one-way up")
        silent = time.monotonic()
        number = await caller.begin_call("echo/k", b"lost and found")
        # The one that notices first ends the connection; both can be that one.
        reply = await caller.answer(number, timeout=20)
        took = time.monotonic() - silent
        say(f"{way}: answered {took:.1f} s after the network died")
        assert (reply.kind, reply.payload) == (Kind.REPLY, b"lost and found")
        assert network.opened > links, "it went over another connection"
        assert room.metric("parlour_sessions_resumed_total") >= 1


async def test_a_client_without_sessions_is_told_at_once_when_its_worker_falls_silent(start_room):
    """The control: without a session to resume, silence for two heartbeats ends the call."""
    room = start_room(timeouts__heartbeat=HEARTBEAT)
    async with (
        Proxy(room.address) as network,
        await Channel.open(network.url) as silent,
        await Channel.open(room.url) as caller,
    ):
        await silent.register("silent")
        number = await caller.begin_call("silent/k")
        await silent.next(Kind.CALL)
        network.silence()
        fault = await caller.answer(number, timeout=20)
        assert fault.fault == "worker_lost"
        assert room.metric("parlour_missed_heartbeats_total") == 1


async def test_calls_go_on_over_a_flapping_link_and_no_session_is_left_over(start_room, say):
    """N8: the link is cut again and again; each call is answered once, by the one worker."""
    room = start_room()
    async with (
        Proxy(room.address) as network,
        worker(network.url, "flap", "--", "sh", "-c", "cat; echo +"),
        await Channel.open(room.url) as caller,
    ):
        await served(caller, "flap/k")
        over = asyncio.Event()
        answered = 0

        async def call(caller_number):
            nonlocal answered
            while not over.is_set():
                text = f"{caller_number}.{answered}".encode()
                reply = await caller.call("flap/k", text, timeout=30)
                assert reply.kind == Kind.REPLY, reply
                assert reply.payload == text + b"+\n"
                answered += 1

        callers = [asyncio.create_task(call(n)) for n in range(4)]
        cuts = 12
        for _ in range(cuts):
            await asyncio.sleep(random.uniform(0.05, 0.4))
            network.cut()
        over.set()
        await asyncio.gather(*callers)
        say(f"{answered} calls answered over {network.opened} connections, {cuts} cuts")
        assert network.opened > 3 and answered > 0
        assert room.metric("parlour_sessions_resumed_total") >= 1
        workers = room.get("/v1/workers")["workers"]
        assert len([w for w in workers if w["agent_types"]]) == 1


async def test_a_call_that_runs_through_a_cut_runs_once(room, tmp_path):
    """The worker keeps its memory, and so a call that is sent again does not run again."""
    log = tmp_path / "runs"
    script = f"read line; echo $line >> {log}; sleep 0.5; echo done"
    async with (
        Proxy(room.address) as network,
        worker(network.url, "once", "--", "sh", "-c", script),
        await Channel.open(room.url) as caller,
    ):
        await served(caller, "once/k")
        log.write_text("")
        for number in range(5):
            call = await caller.begin_call("once/k", f"{number}\n".encode())
            await asyncio.sleep(random.uniform(0.0, 0.6))
            network.cut()
            reply = await caller.answer(call, timeout=20)
            assert (reply.kind, reply.payload) == (Kind.REPLY, b"done\n"), reply
        assert log.read_text().split() == ["0", "1", "2", "3", "4"]


async def test_after_a_killed_host_every_worker_is_back_soon(start_room, say):
    """N5 in small: the host is killed and started again at the same address."""
    workers = 40
    first = start_room()
    async with contextlib.AsyncExitStack() as stack:
        for number in range(4):
            await stack.enter_async_context(worker(first.url, f"storm{number}"))
        sessions = [await Channel.open(first.url, name=f"c{n}") for n in range(workers - 4)]
        async with await Channel.open(first.url) as caller:
            for number in range(4):
                await served(caller, f"storm{number}/k")
        first.process.kill()
        first.process.wait()
        for session in sessions:
            await session.closed()
        began = time.monotonic()
        second = start_room(port=first.port)
        async with await Channel.open(second.url) as caller:
            for number in range(4):
                await served(caller, f"storm{number}/k", patience=30)
        say(f"4 workers were back {time.monotonic() - began:.1f} s after the host was")


async def test_a_slow_line_carries_heartbeats_beside_a_large_payload(start_room):
    """N7: a payload that takes longer than two heartbeats does not make its sender look dead."""
    room = start_room(timeouts__heartbeat="1500ms", timeouts__grace="100ms")
    async with Proxy(room.address) as network, await Channel.open(room.url) as caller:
        network.bytes_per_second = 250_000
        async with worker(network.url, "slowline"):
            await served(caller, "slowline/k")
            payload = bytes(1_000_000)
            began = time.monotonic()
            reply = await caller.call("slowline/k", payload, timeout=60)
            took = time.monotonic() - began
            assert (reply.kind, len(reply.payload)) == (Kind.REPLY, len(payload)), reply
            assert took > 6, "each way took longer than a silence may"
        assert room.metric("parlour_missed_heartbeats_total") == 0
        assert room.metric("parlour_sessions_resumed_total") == 0


async def test_a_killed_worker_is_given_up_after_the_grace_time(start_room, say):
    room = start_room(timeouts__grace="1s")
    async with (
        worker(room.url, "victim", "--", "sleep", "60") as process,
        await Channel.open(room.url) as caller,
    ):

        def one_of(key):
            return any(w[key] for w in room.get("/v1/workers")["workers"])

        await soon(lambda: one_of("agent_types"), what="the registration")
        number = await caller.begin_call("victim/k")
        await soon(lambda: one_of("in_flight"), what="the call")
        process.kill()
        killed = time.monotonic()
        fault = await caller.answer(number)
        say(f"told {time.monotonic() - killed:.2f} s after the kill, of which 1 s is grace")
        assert fault.fault == "worker_lost" and fault.get(Field.MAY_HAVE_RUN) == 1
