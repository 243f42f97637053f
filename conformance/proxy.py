"""A network that can fail: a TCP proxy on a port of its own, between a client and a host."""

from __future__ import annotations

import asyncio
import random
import socket
import threading

# How a splitting network cuts what comes behind the first bytes.
SIZES = (1, 2, 3, 100, 1_000, 30_000)


class Proxy:
    """Forwards connections to `address`, and does to them what the test says."""

    def __init__(self, address, *, one_by_one=0):
        self.address = address
        self.one_by_one = one_by_one
        """How many bytes of each direction come one by one; those behind them in random pieces."""
        self.refusing = False
        self.bytes_per_second = None
        """How much passes in each direction, if there is a bound."""
        self.opened = 0
        self.pieces = 0
        self.held = 0
        """How many pieces came to where nothing passes any more."""
        self._server = None
        self._links: set[asyncio.Task] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._ways: set[tuple[asyncio.Event, asyncio.Event]] = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        self.cut()
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    def cut(self):
        """Ends every connection in both directions, without a goodbye."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def silence(self, *, up=True, down=True):
        """Nothing passes any more on the connections there are, towards the host (`up`) or from it.

        Nobody is told: the connections stay open.
        """
        for upwards, downwards in self._ways:
            if up:
                upwards.clear()
            if down:
                downwards.clear()

    def resume(self):
        """What `silence` held back passes, and whatever comes after it."""
        for way in (way for ways in self._ways for way in ways):
            way.set()

    async def _accept(self, reader, writer):
        self.opened += 1
        if self.refusing:
            writer.transport.abort()
            return
        try:
            far = socket.socket()
            far.setblocking(False)
            # What it does not pass on, it does not take: the sender sees how slow the line is.
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
            await asyncio.get_running_loop().sock_connect(far, self.address)
            far_reader, far_writer = await asyncio.open_connection(sock=far)
        except OSError:
            writer.transport.abort()
            return
        for one in (writer, far_writer):
            one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._writers.add(one)
        up, down = asyncio.Event(), asyncio.Event()
        up.set()
        down.set()
        self._ways.add((up, down))
        ways = ((reader, far_writer, up), (far_reader, writer, down))
        links = [asyncio.create_task(self._pass(*way)) for way in ways]
        self._links.update(links)
        await asyncio.gather(*links, return_exceptions=True)
        self._links.difference_update(links)
        self._ways.discard((up, down))
        for one in (writer, far_writer):
            one.transport.abort()
            self._writers.discard(one)

    async def _pass(self, reader, writer, opened):
        passed = 0
        while data := await reader.read(64 * 1024):
            while data:
                size = len(data)
                if self.one_by_one:
                    size = 1 if passed < self.one_by_one else random.choice(SIZES)
                piece, data = data[:size], data[size:]
                self.held += not opened.is_set()
                await opened.wait()
                if self.bytes_per_second:
                    piece, data = piece[:4096], piece[4096:] + data
                    await asyncio.sleep(len(piece) / self.bytes_per_second)
                writer.write(piece)
                passed += len(piece)
                self.pieces += 1
                await writer.drain()
                if self.one_by_one:
                    # The other side may read before the next piece comes.
                    await asyncio.sleep(0)
        await opened.wait()
        writer.write_eof()


class Splitter:
    """A room behind a network that delivers byte by byte. It has a thread of its own."""

    def __init__(self, room):
        self.room = room
        started = threading.Event()

        async def serve():
            self._end = asyncio.Event()
            self._loop = asyncio.get_running_loop()
            async with Proxy(room.address, one_by_one=2_000) as self.proxy:
                self.url = self.proxy.url
                self.host, port = self.url.removeprefix("http://").rsplit(":", 1)
                self.port = int(port)
                self.address = (self.host, self.port)
                started.set()
                await self._end.wait()

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        self._thread.start()
        started.wait()

    def __getattr__(self, name):
        return getattr(self.room, name)

    def close(self):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
