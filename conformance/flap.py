#!/usr/bin/env python3
"""N8: a link that is up for a second and down for a second, for as long as it is told.

The workers are processes of the built binary. While their link is down it either breaks, and lets no
new connection through, or falls silent without a word. Every call must be answered, and run once;
sessions, descriptors and memory of the host must not grow. The control, at the beginning, is a host that
gives no time to come back: there calls must be lost.

    scripts/torture flap [--minutes M]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from parlour_v1 import Channel, Kind
from proxy import Proxy
from room import Room, worker

CALLERS = 4
# Every fifth time it is down for longer than the host and its workers wait for a word.
HEARTBEAT, SHORT, LONG = "1s", 1.0, 3.0
# Memory that a host may take beyond what it has after the first minute.
GROWTH = 16 * 1024 * 1024


class Failed(Exception):
    """Something did not hold."""


def must(holds, what):
    if not holds:
        raise Failed(what)


class Flap:
    """A room whose workers are behind a link that comes and goes."""

    def __init__(self, room, log):
        self.room, self.log = room, log
        self.over = asyncio.Event()
        self.answered = self.lost = self.downs = 0
        self.counted: list[str] = []

    async def run(self, seconds, minutely=None):
        script = f"read line; echo $line >> {self.log}; echo $line"
        async with (
            Proxy(self.room.address) as link,
            contextlib.AsyncExitStack() as stack,
        ):
            stack.enter_context(worker(link.url, "echo"))
            stack.enter_context(worker(link.url, "count", "--", "sh", "-c", script))
            callers = [
                await stack.enter_async_context(await Channel.open(self.room.url))
                for _ in range(CALLERS + 1)
            ]
            for agent in ("echo/k", "count/k"):
                await served(callers[0], agent)
            Path(self.log).write_text("")
            tasks = [
                asyncio.create_task(self.call(number, caller))
                for number, caller in enumerate(callers[1:])
            ]
            tasks.append(asyncio.create_task(self.count(callers[0])))
            try:
                await self.flap(link, seconds, minutely)
                self.over.set()
                await asyncio.wait_for(asyncio.gather(*tasks), 60)
            finally:
                self.over.set()
                for task in tasks:
                    task.cancel()
        return link

    async def flap(self, link, seconds, minutely):
        began, minute = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            self.downs += 1
            down = LONG if self.downs % 5 == 0 else SHORT
            link.refusing = True
            if random.random() < 0.5:
                link.cut()
            else:
                link.silence()
            await asyncio.sleep(down)
            link.refusing = False
            link.resume()
            before = self.answered
            await asyncio.sleep(SHORT)
            if minutely is not None:
                await self.goes_on(before)
                if time.monotonic() - began >= 60 * (minute + 1):
                    minute += 1
                    minutely(minute, link)

    async def goes_on(self, before):
        """While the link is up, calls are answered: those who come back wait a little in between."""
        patience = time.monotonic() + 15
        while self.answered == before:
            must(time.monotonic() < patience, "no call was answered, though the link is up")
            await asyncio.sleep(0.05)

    async def call(self, number, caller):
        while not self.over.is_set():
            text = f"{number} {self.answered} {random.random()}".encode()
            reply = await caller.call("echo/k", text, timeout=60)
            if reply.kind != Kind.REPLY:
                self.lost += 1
                await asyncio.sleep(0.05)
                continue
            must(reply.payload == text, f"{text} got {reply.payload}")
            self.answered += 1
            await asyncio.sleep(0.01)

    async def count(self, caller):
        """Calls that leave a trace where they run."""
        number = 0
        while not self.over.is_set():
            number += 1
            reply = await caller.call("count/k", f"{number}\n".encode(), timeout=60)
            if reply.kind == Kind.REPLY:
                must(reply.payload == f"{number}\n".encode(), f"{number} got {reply.payload}")
                self.counted.append(str(number))
            else:
                self.lost += 1
            await asyncio.sleep(0.1)

    def runs(self):
        return Path(self.log).read_text().split()


async def served(caller, agent):
    patience = time.monotonic() + 20
    while (await caller.call(agent, b"x\n", timeout_ms=2000)).kind != Kind.REPLY:
        must(time.monotonic() < patience, f"nobody serves {agent}")
        await asyncio.sleep(0.05)


def descriptors(room):
    return len(os.listdir(f"/proc/{room.pid}/fd"))


async def control(log):
    room = Room(timeouts__heartbeat=HEARTBEAT, timeouts__grace="50ms")
    try:
        flap = Flap(room, log)
        await flap.run(15)
        print(f"control, a host without patience: {flap.answered} calls answered, {flap.lost} lost")
        must(flap.lost > 0, "the control lost no call: the link does not do what it is for")
    finally:
        room.stop()


async def main(minutes):
    with tempfile.TemporaryDirectory() as directory:
        log = os.path.join(directory, "runs")
        await control(log)
        room = Room(timeouts__heartbeat=HEARTBEAT, timeouts__grace="15s")
        try:
            await torture(room, log, minutes)
        finally:
            code = room.stop()
        must(code == 0, f"the host ended with {code}")


async def torture(room, log, minutes):
    first = None
    flap = Flap(room, log)

    def minutely(minute, link):
        nonlocal first
        now = descriptors(room), room.rss()
        first = first or now
        resumed = int(room.metric("parlour_sessions_resumed_total"))
        print(
            f"minute {minute}: {flap.answered} calls answered, {flap.downs} times down, "
            f"{link.opened} connections, {resumed} sessions resumed, {now[0]} descriptors, "
            f"{now[1] // 1024} KiB",
            flush=True,
        )
        must(flap.lost == 0, f"{flap.lost} calls were lost")
        # A worker that just comes back has two sockets for a moment.
        must(now[0] <= first[0] + 8, "descriptors are left over")
        must(now[1] <= first[1] + GROWTH, "memory grows")
        clients = room.get("/v1/workers")["workers"]
        # Beside the workers and callers, a socket can be there that has not said for whom it is.
        must(len(clients) <= CALLERS + 1 + 2 + 2, f"{len(clients)} sessions are there")

    link = await flap.run(60 * minutes, minutely)
    must(flap.lost == 0, f"{flap.lost} calls were lost")
    must(flap.runs() == flap.counted, f"runs and answers differ: {flap.runs()} {flap.counted}")
    must(room.metric("parlour_sessions_resumed_total") >= flap.downs / 4, "few sessions resumed")
    must(link.opened > flap.downs / 4, "the link was hardly ever down")
    print(
        f"flap: {minutes:g} minutes, {flap.downs} times down, {flap.answered} calls answered, "
        f"{len(flap.counted)} of them counted where they ran: each once; none lost"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    try:
        asyncio.run(main(parser.parse_args().minutes))
    except Failed as failure:
        sys.exit(f"flap: FAILED: {failure}")
