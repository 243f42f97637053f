"""Connections that a test writes byte by byte: HTTP/1.1 and WebSocket as no library would."""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from dataclasses import dataclass


@dataclass
class Answer:
    """One HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes


class Raw:
    """A TCP connection. `received` holds what has been read and not yet looked at."""

    def __init__(self, room, timeout=10.0, receive_buffer=None):
        self.socket = socket.socket()
        if receive_buffer:
            # Before connecting, so that the window that is offered is as small.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(timeout)
        self.socket.connect(room.address)
        self.host = f"{room.host}:{room.port}"
        self.received = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data: bytes) -> bool:
        """Whether the peer still took it."""
        try:
            self.socket.sendall(data)
            return True
        except OSError:
            return False

    def more(self) -> bool:
        """Reads what is there next; `False` at the end of the connection."""
        try:
            data = self.socket.recv(65536)
        except ConnectionError:
            data = b""
        self.received += data
        return bool(data)

    def take(self, length: int) -> bytes:
        while len(self.received) < length:
            assert self.more(), f"closed after {self.received!r}"
        taken, self.received = self.received[:length], self.received[length:]
        return taken

    def answer(self, head_only=False) -> Answer | None:
        """The next response, or `None` if the connection ended without one."""
        while b"\r\n\r\n" not in self.received:
            if not self.more():
                return None
        head, self.received = self.received.split(b"\r\n\r\n", 1)
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(re.match(r"HTTP/1\.[01] (\d{3})", first)[1])
        headers = {}
        for line in lines:
            name, value = line.split(":", 1)
            headers[name.lower()] = value.strip()
        if head_only or status in (101, 204, 304):
            return Answer(status, headers, b"")
        if status == 100:
            return self.answer()
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while True:
                while b"\r\n" not in self.received:
                    assert self.more()
                size, self.received = self.received.split(b"\r\n", 1)
                chunk = self.take(int(size, 16) + 2)[:-2]
                if not chunk:
                    return Answer(status, headers, body)
                body += chunk
        return Answer(status, headers, self.take(int(headers.get("content-length", 0))))

    def closed(self, within=10.0) -> float:
        """Waits for the peer to close, and says after how many seconds. What it sent is kept."""
        begun = time.monotonic()
        while True:
            left = begun + within - time.monotonic()
            assert left > 0, f"still open after {within} s; got {self.received[:200]!r}"
            self.socket.settimeout(left)
            try:
                if not self.more():
                    return time.monotonic() - begun
            except TimeoutError:
                pass

    def responses(self) -> int:
        """How many responses came until the peer closed."""
        self.closed()
        return len(re.findall(rb"HTTP/1\.[01] \d{3} ", self.received))


def request(method: str, path: str, host: str, body=b"", *headers: str) -> bytes:
    """A request with the fields it needs, and these."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def upgrade(path: str, host: str, *headers: str) -> bytes:
    """The opening of a WebSocket."""
    return request(
        "GET",
        path,
        host,
        b"",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        *headers,
    )


def websocket_frame(opcode: int, payload=b"", *, fin=True, rsv=0, mask=True, length=None) -> bytes:
    """A frame; `length` is a lie about that of the payload."""
    size = len(payload) if length is None else length
    head = bytes([fin << 7 | rsv << 4 | opcode])
    bit = mask << 7
    if size < 126:
        head += bytes([bit | size])
    elif size < 1 << 16:
        head += bytes([bit | 126]) + size.to_bytes(2, "big")
    else:
        head += bytes([bit | 127]) + size.to_bytes(8, "big")
    if not mask:
        return head + payload
    key = os.urandom(4)
    pad = (key * (len(payload) // 4 + 1))[: len(payload)]
    masked = int.from_bytes(payload, "big") ^ int.from_bytes(pad, "big")
    return head + key + masked.to_bytes(len(payload), "big")


TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class RawSocket(Raw):
    """A WebSocket whose client side is written by the test."""

    def __init__(self, room, path=None, *headers: str, **options):
        """Opens `path`, or else the dialect under a client id of its own."""
        super().__init__(room, **options)
        path = path or f"/open_channel?client_id={uuid.uuid4()}"
        self.send(upgrade(path, self.host, *headers))
        answer = self.answer()
        assert answer and answer.status == 101, answer
        assert answer.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        assert "sec-websocket-extensions" not in answer.headers

    def frame(self) -> tuple[int, bytes] | None:
        """The next frame, or `None` at the end. A server's frames are whole and unmasked."""
        try:
            first, second = self.take(2)
            assert first & 0x70 == 0 and second & 0x80 == 0
            size = second & 0x7F
            if size >= 126:
                size = int.from_bytes(self.take(2 if size == 126 else 8), "big")
            return first & 0x0F, self.take(size)
        except (AssertionError, ConnectionError):
            return None

    def close_code(self) -> int | None:
        """The code with which the host closes; `None` if it only ends the connection."""
        while (got := self.frame()) is not None:
            opcode, payload = got
            if opcode == CLOSE:
                return int.from_bytes(payload[:2], "big") if payload else 1005
        return None
