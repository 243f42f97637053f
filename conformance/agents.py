"""A worker on a thread of its own, for tests that block: it serves a few agent types and remembers
what it saw."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading

from parlour_v1 import Channel, Field, Frame, Kind, frame

TYPES = ("echo", "fail", "hang")


class Agents:
    """`echo` answers with what it got, `fail` with a fault, `hang` not at all.

    Every call and cancellation is put into `seen`.
    """

    def __init__(self, url: str, headers=None):
        self.seen: queue.Queue[Frame] = queue.Queue()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(url, headers)))
        self._thread.daemon = True
        self._thread.start()
        assert self._ready.wait(10)

    async def _main(self, url, headers):
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with await Channel.open(url, name="agents", headers=headers) as channel:
            for agent_type in TYPES:
                await channel.register(agent_type)
            self._ready.set()
            serving = asyncio.create_task(self._serve(channel))
            await asyncio.wait(
                [serving, asyncio.create_task(self._stop.wait())],
                return_when=asyncio.FIRST_COMPLETED,
            )
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError, AssertionError):
                await serving

    async def _serve(self, channel: Channel):
        while True:
            got = await channel.take(lambda f: f.kind in (Kind.CALL, Kind.CANCEL), 3600)
            self.seen.put(got)
            if got.kind == Kind.CANCEL:
                continue
            match got.get(Field.AGENT_TYPE):
                case "echo":
                    await channel.reply(
                        got,
                        got.payload,
                        content_type=got.get(Field.CONTENT_TYPE),
                        data_type=got.get(Field.DATA_TYPE),
                        metadata=got.metadata,
                    )
                case "fail":
                    fault = {"fault_kind": "agent_failed", "detail": "it broke ☂"}
                    await channel.send(frame(Kind.FAULT, id=got.id, may_have_run=True, **fault))

    def next(self, kind: Kind, timeout=10.0) -> Frame:
        """The next call or cancellation; earlier ones of the other kind are forgotten."""
        while True:
            seen = self.seen.get(timeout=timeout)
            if seen.kind == kind:
                return seen

    def forget(self):
        with contextlib.suppress(queue.Empty):
            while True:
                self.seen.get_nowait()

    def stop(self):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
