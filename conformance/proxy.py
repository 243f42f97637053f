"""A network that can fail: a TCP proxy on a port of its own, between a client and a host."""

from __future__ import annotations

import asyncio
import random
import socket


class Proxy:
    """Forwards connections to `address`, and does to them what the test says."""

    def __init__(self, address, *, segments=None):
        self.address = address
        self.segments = segments
        """The sizes in which bytes are passed on, drawn at random; all at once if there are none."""
        self.up = asyncio.Event()
        self.down = asyncio.Event()
        self.up.set()
        self.down.set()
        self.refusing = False
        self.opened = 0
        self.pieces = 0
        self._server = None
        self._links: set[asyncio.Task] = set()
        self._writers: set[asyncio.StreamWriter] = set()

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
        """From here on nothing passes towards the host (`up`), or from it; connections stay open."""
        if up:
            self.up.clear()
        if down:
            self.down.clear()

    def restore(self):
        self.up.set()
        self.down.set()

    async def _accept(self, reader, writer):
        self.opened += 1
        if self.refusing:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.address)
        except OSError:
            writer.transport.abort()
            return
        for one in (writer, far_writer):
            one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._writers.add(one)
        ways = ((reader, far_writer, self.up), (far_reader, writer, self.down))
        links = [asyncio.create_task(self._pass(*way)) for way in ways]
        self._links.update(links)
        await asyncio.gather(*links, return_exceptions=True)
        self._links.difference_update(links)
        for one in (writer, far_writer):
            one.transport.abort()
            self._writers.discard(one)

    async def _pass(self, reader, writer, opened):
        while data := await reader.read(64 * 1024):
            while data:
                size = random.choice(self.segments) if self.segments else len(data)
                piece, data = data[:size], data[size:]
                await opened.wait()
                writer.write(piece)
                self.pieces += 1
                await writer.drain()
                if self.segments:
                    # The other side reads before the next piece comes.
                    await asyncio.sleep(0)
        await opened.wait()
        writer.write_eof()
