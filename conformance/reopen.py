#!/usr/bin/env python3
"""O2: how long a host with a million messages that wait takes to start, and how much memory.

The messages come through the door, over many connections, and the host is killed. Then it is started on
what is left, with the files in the page cache and out of it.

    scripts/torture reopen [--pending N] [--bytes N] [--keep DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from room import Room, eventually

CONNECTIONS, BATCH = 64, 100
# What must hold for a million: seconds until it is ready, and bytes.
SECONDS, BYTES = 10, 500 << 20


async def fill(room: Room, pending: int, size: int):
    """Has so many messages accepted."""
    left = iter(range(0, pending, BATCH))

    async def send():
        reader, writer = await asyncio.open_connection(*room.address)
        for first in left:
            count = min(BATCH, pending - first)
            # One after the other to the host, and at once for us.
            for number in range(first, first + count):
                head = f"POST /v1/agents/pending/{number % 1000}/deliveries HTTP/1.1\r\nhost: localhost\r\n"
                writer.write(f"{head}content-length: {size}\r\n\r\n".encode() + b"x" * size)
            answers = b""
            while answers.count(b"HTTP/1.1 ") < count or not answers.endswith(b"}"):
                if not (more := await reader.read(1 << 16)):
                    raise ConnectionError("the host closed the connection")
                answers += more
            if answers.count(b"HTTP/1.1 202") != count:
                raise AssertionError(answers[:2000].decode())
        writer.close()

    await asyncio.gather(*(send() for _ in range(CONNECTIONS)))


def reopen(data: Path, pending: int) -> tuple[float, float, int, int]:
    """Seconds until it listens and until it is ready, bytes of memory then and at the most."""
    began = time.monotonic()
    room = Room(data=data)
    try:
        listens = time.monotonic() - began
        eventually(lambda: room.http("GET", "/readyz").status == 200, timeout=120, what="the host is ready")
        ready = time.monotonic() - began
        rss = room.rss()
        status = Path(f"/proc/{room.pid}/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
        waiting = room.metric("parlour_deliveries_waiting")
        if waiting != pending:
            sys.exit(f"reopen: FAILED: {waiting:.0f} of {pending} wait")
        return listens, ready, rss, peak
    finally:
        room.kill()


def forget(data: Path):
    """Has the kernel read these files from the disk when they are next asked for."""
    for path in data.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(options, data: Path) -> bool:
    if not data.exists():
        room, began = Room(data=data), time.monotonic()
        try:
            asyncio.run(fill(room, options.pending, options.bytes))
        finally:
            room.kill()
        seconds = time.monotonic() - began
        print(f"{options.pending} accepted in {seconds:.0f} s, {options.pending / seconds:.0f} a second")
    size = sum(path.stat().st_size for path in data.iterdir())
    print(f"{size >> 20} MiB of files", flush=True)
    holds = True
    for state in ("after a kill", "once more", "out of a cold page cache"):
        if "cold" in state:
            forget(data)
        listens, ready, rss, peak = reopen(data, options.pending)
        print(
            f"{state}: listens after {listens:.2f} s, ready after {ready:.2f} s, "
            f"{rss >> 20} MiB of memory, {peak >> 20} MiB at the most",
            flush=True,
        )
        holds &= ready <= SECONDS and peak <= BYTES
    return holds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pending", type=int, default=1_000_000)
    parser.add_argument("--bytes", type=int, default=256)
    parser.add_argument("--keep", type=Path, help="make the data here, or use what is here already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if not run(options, options.keep or Path(directory) / "data"):
            sys.exit(f"reopen: FAILED: more than {SECONDS} s or {BYTES >> 20} MiB")


if __name__ == "__main__":
    main()
