"""What a host does with WebSocket frames that nobody should send.

Autobahn's cases need a door that echoes what it gets, which the built binary does not have, and Python
2.7: `scripts/autobahn` runs them where it can. Those that matter are written out here, for the real
doors: reserved bits and opcodes, fragmentation, UTF-8, closing, limits.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import parlour_v1
from parlour_v1 import Kind
from raw import BINARY, CLOSE, PING, PONG, TEXT, Raw, RawSocket, upgrade, websocket_frame
from room import eventually

MIB = 1 << 20
CHANNEL = ("/open_channel", "Sec-WebSocket-Protocol: parlour.v1")
# Every protocol of a channel: where it is, and the kind of its messages.
DOORS = {
    "dialect": (("/open_channel?client_id=flood",), TEXT),
    "parlour.v1": (CHANNEL, BINARY),
    "parlour.v1+json": (("/open_channel", "Sec-WebSocket-Protocol: parlour.v1+json"), TEXT),
}
ODD = json.dumps({"type": "gossip"}).encode()


def still_serves(socket: RawSocket) -> bool:
    """Whether the host answers a ping on this connection."""
    socket.send(websocket_frame(PING, b"there?"))
    while (got := socket.frame()) is not None:
        if got == (PONG, b"there?"):
            return True
    return False


# The upgrade


def test_an_upgrade_that_is_not_one_is_refused(room):
    host = f"{room.host}:{room.port}"
    good = upgrade("/open_channel?client_id=x", host)
    for wrong, right in (
        (b"Sec-WebSocket-Version: 12", b"Sec-WebSocket-Version: 13"),
        (b"X: x", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
        (b"Sec-WebSocket-Key: short", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
        (b"X: x", b"Sec-WebSocket-Version: 13"),
        (b"Upgrade: smtp", b"Upgrade: websocket"),
        (b"Connection: keep-alive", b"Connection: Upgrade"),
        (b"POST /open", b"GET /open"),
    ):
        data = good.replace(right, wrong)
        assert data != good
        with Raw(room) as connection:
            connection.send(data)
            assert connection.answer().status in (400, 405, 426), wrong


def test_the_dialect_needs_a_client_id(room):
    for path in ("/open_channel", "/open_channel?client_id=", "/open_channel?client=x"):
        with Raw(room) as connection:
            connection.send(upgrade(path, f"{room.host}:{room.port}"))
            answer = connection.answer()
            assert answer.status == 400 and json.loads(answer.body)["hint"]


def test_an_upgrade_elsewhere_is_not_one(room):
    with Raw(room) as connection:
        connection.send(upgrade("/version", f"{room.host}:{room.port}"))
        assert connection.answer().status != 101


def test_compression_is_not_agreed_on(room):
    offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"
    with RawSocket(room, "/open_channel?client_id=deflate", offer) as socket:
        assert still_serves(socket)


# Frames


BROKEN = {
    "an unmasked frame": (websocket_frame(TEXT, ODD, mask=False), {1002}),
    "reserved bit 1": (websocket_frame(TEXT, ODD, rsv=4), {1002}),
    "reserved bit 2": (websocket_frame(TEXT, ODD, rsv=2), {1002}),
    "reserved bit 3": (websocket_frame(PING, b"", rsv=1), {1002}),
    **{
        f"opcode {opcode}": (websocket_frame(opcode, ODD), {1002})
        for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
    },
    "a fragmented ping": (websocket_frame(PING, b"x", fin=False), {1002}),
    "a fragmented close": (websocket_frame(CLOSE, b"\x03\xe8", fin=False), {1002}),
    "a ping of 126 bytes": (websocket_frame(PING, b"x" * 126), {1002}),
    "a close of 126 bytes": (websocket_frame(CLOSE, b"\x03\xe8" + b"x" * 124), {1002}),
    "a continuation of nothing": (websocket_frame(0, b"x"), {1002}),
    "a message within a message": (
        websocket_frame(TEXT, b"{", fin=False) + websocket_frame(TEXT, b"}"),
        {1002},
    ),
    "a continuation after the end": (websocket_frame(TEXT, ODD) + websocket_frame(0, b""), {1002}),
    "text that is not UTF-8": (websocket_frame(TEXT, b"\xc3\x28"), {1007}),
    "text that ends within a letter": (websocket_frame(TEXT, "é".encode()[:1]), {1007}),
    "an overlong letter": (websocket_frame(TEXT, b"\xc0\xaf"), {1007}),
    "a surrogate": (websocket_frame(TEXT, b"\xed\xa0\x80"), {1007}),
    "a letter beyond Unicode": (websocket_frame(TEXT, b"\xf4\x90\x80\x80"), {1007}),
    "bad UTF-8 over two fragments": (
        websocket_frame(TEXT, b'"\xce', fin=False) + websocket_frame(0, b'\x28"'),
        {1007},
    ),
    "bad UTF-8 over five fragments": (
        websocket_frame(TEXT, b"\xf0", fin=False)
        + websocket_frame(0, b"\x9f", fin=False)
        + websocket_frame(PING, b"")
        + websocket_frame(0, b"\x98", fin=False)
        + websocket_frame(0, b"\x28"),
        {1007},
    ),
    # Either code is true: the letter is cut short, and nothing of it is in the last fragment.
    "a letter cut short before an empty fragment": (
        websocket_frame(TEXT, b"\xf0\x9f\x98", fin=False) + websocket_frame(0, b""),
        {1002, 1007},
    ),
    "a length with its top bit": (websocket_frame(TEXT, b"", length=1 << 63), {1002, 1009}),
    "a frame of 1 GiB": (websocket_frame(TEXT, b"", length=1 << 30), {1009}),
    "a close of one byte": (websocket_frame(CLOSE, b"\x03"), {1002}),
    "a close reason that is not UTF-8": (
        websocket_frame(CLOSE, b"\x03\xe8\xff\xfe"),
        {1002, 1007},
    ),
    **{
        f"close code {code}": (websocket_frame(CLOSE, code.to_bytes(2, "big")), {1002})
        for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65535)
    },
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_frame_against_the_rules_closes_with_its_code(room, case):
    data, codes = BROKEN[case]
    with RawSocket(room) as socket:
        socket.send(data)
        assert socket.close_code() in codes
        # No reply to the host's close: it does not wait for one for long.
        socket.closed(15)


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1007, 1011, 3000, 4999])
def test_a_close_is_answered_and_the_connection_ended(room, code):
    with RawSocket(room) as socket:
        socket.send(websocket_frame(CLOSE, code.to_bytes(2, "big") + b"bye"))
        assert socket.close_code() in (code, 1000, 1005)
        socket.closed(10)


def test_a_close_without_a_code_is_answered(room):
    with RawSocket(room) as socket:
        socket.send(websocket_frame(CLOSE))
        assert socket.close_code() in (1000, 1005)
        socket.closed(10)


def test_nothing_is_read_after_a_close(room):
    with RawSocket(room) as socket:
        socket.send(websocket_frame(CLOSE, b"\x03\xe8") + websocket_frame(PING, b"late"))
        assert socket.close_code() in (1000, 1005)


def test_frames_within_the_rules_are_taken(room):
    with RawSocket(room) as socket:
        pieces = ["{", '"type"', ': "gos', 'sip"}']
        socket.send(websocket_frame(TEXT, pieces[0].encode(), fin=False))
        socket.send(websocket_frame(PING, b"between"))
        assert socket.frame() == (PONG, b"between")
        for piece in pieces[1:-1]:
            socket.send(websocket_frame(0, piece.encode(), fin=False))
        socket.send(websocket_frame(0, pieces[-1].encode()))
        # A letter that is split over fragments is whole again when they are joined.
        socket.send(websocket_frame(TEXT, b'{"type": "\xce', fin=False))
        socket.send(websocket_frame(0, b'\xba"}'))
        socket.send(websocket_frame(PONG, b"nobody asked"))
        socket.send(websocket_frame(PING, b"x" * 125))
        assert socket.frame() == (PONG, b"x" * 125)
        assert still_serves(socket)


def test_a_frame_byte_by_byte_is_taken(room):
    with RawSocket(room) as raw:
        raw.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in websocket_frame(PING, b"slowly"):
            raw.send(bytes([byte]))
        assert raw.frame() == (PONG, b"slowly")


# Doors


def test_text_on_the_channel_and_bytes_on_the_dialect_end_the_connection(room):
    for path, opcode in ((CHANNEL, TEXT), (("/open_channel?client_id=b",), BINARY)):
        with RawSocket(room, *path) as socket:
            socket.send(websocket_frame(opcode, b"{}"))
            assert socket.close_code() in (1002, 1003)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b"null",
        b"[" * 100_000,
        b'{"type": 1}',
        b"{}",
        b'{"type": "request"}',
        b'{"type": "request", "request_id": {}, "target": 5}',
        b'{"type": "response"}',
        b'{"type": "response", "request_id": null}',
        b'{"type": "cloud_event"}',
        b'{"type": "cloud_event", "topic": {"type": "a b", "source": "\\u0000"}, "data": 1}',
    ],
)
def test_a_dialect_message_without_sense_harms_nobody(room, text):
    with RawSocket(room) as socket:
        socket.send(websocket_frame(TEXT, text))
        socket.send(websocket_frame(PING, b"there?"))
        # It is skipped, answered, or closed with a code that says what was wrong.
        while (got := socket.frame()) is not None:
            opcode, payload = got
            if opcode == TEXT:
                assert json.loads(payload)["error"]
            elif opcode == CLOSE:
                assert int.from_bytes(payload[:2], "big") in (1002, 1003, 1007, 1008, 1009)
                return
            elif got == (PONG, b"there?"):
                return
        pytest.fail("the connection ended without a close")


# Floods


def test_a_message_over_the_limit_closes_with_1009(room):
    for path in (("/open_channel?client_id=big",), CHANNEL):
        with RawSocket(room, *path) as socket:
            opcode = BINARY if path is CHANNEL else TEXT
            socket.send(websocket_frame(opcode, b"x" * (2 * MIB)))
            # The close may be lost behind bytes that the host did not read any more.
            assert socket.close_code() in (1009, None)


@pytest.mark.parametrize("door", DOORS)
def test_a_message_over_the_limit_in_small_fragments_closes_with_1009(door, room):
    before, (path, opcode) = room.rss(), DOORS[door]
    piece = websocket_frame(0, b"x" * 16_384, fin=False)
    with RawSocket(room, *path) as socket:
        socket.send(websocket_frame(opcode, b"x", fin=False))
        for _ in range(256):
            if not socket.send(piece):
                break
        assert socket.close_code() in (1009, None)
    assert room.rss() - before <= 16 * MIB


@pytest.mark.parametrize("door", DOORS)
def test_a_million_empty_fragments_are_bounded(door, room, say):
    before, begun, (path, opcode) = room.rss(), time.monotonic(), DOORS[door]
    piece = websocket_frame(0, b"", fin=False)
    with RawSocket(room, *path, timeout=30) as socket:
        socket.send(websocket_frame(opcode, b"{", fin=False))
        for _ in range(100):
            if not socket.send(piece * 10_000):
                break
        socket.send(websocket_frame(0, b"}"))
        socket.send(websocket_frame(PING, b"there?"))
        got = socket.frame()
        assert got is None or got[0] in (PONG, CLOSE, TEXT, BINARY)
    took = time.monotonic() - begun
    say(f"10^6 empty fragments: {took:.1f} s")
    assert took < 20 and room.rss() - before <= 16 * MIB


@pytest.mark.parametrize("door", DOORS)
def test_a_flood_of_pings_that_nobody_reads_the_answers_of_is_bounded(door, start_room, say):
    room = start_room(timeouts__stalled_write="4s")
    before = room.rss()
    flood = websocket_frame(PING, b"x" * 125) * 1000
    sockets = []
    for number in range(4):
        (path, *headers), _ = DOORS[door]
        path = f"{path}{number}" if "=" in path else path
        sockets.append(RawSocket(room, path, *headers, receive_buffer=4096))
    for raw in sockets:
        raw.socket.settimeout(0.2)
    # Far more than the kernel takes over: it must be the host that stops.
    for _ in range(400):
        for raw in sockets:
            raw.send(flood)
    grown = room.rss() - before
    say(f"4 connections flooding pings: memory grew {grown / MIB:.1f} MiB")
    assert grown <= 16 * MIB
    assert room.answers()
    # Not reading one's answers is being stalled.
    eventually(lambda: room.metric("parlour_connections") <= 1, 20, "the flooders being cut")
    for raw in sockets:
        raw.socket.close()


@pytest.mark.parametrize("kind", ["unknown", "ack", "progress", "empty", "pong"])
def test_a_flood_of_what_is_skipped_leaves_the_others_their_turn(kind, start_room, say):
    """There is one thread for all, and the flood ends only when somebody else was served."""
    room = start_room(server__threads=1)
    frames = {
        "unknown": parlour_v1.raw_frame(200, b""),
        "ack": parlour_v1.frame(Kind.ACK, received=0),
        "progress": parlour_v1.frame(Kind.PROGRESS, id=99),
    }
    if kind in frames:
        flood = websocket_frame(BINARY, frames[kind] * (MIB // len(frames[kind])))
    else:
        flood = websocket_frame({"empty": BINARY, "pong": PONG}[kind]) * 10_000
    served = threading.Event()
    with RawSocket(room, *CHANNEL, timeout=60) as flooder:
        hello = parlour_v1.frame(Kind.HELLO, name="flooder", version=1, feature="resume")
        flooder.send(websocket_frame(BINARY, hello))
        assert flooder.frame()[0] == BINARY

        def send():
            sent = 0
            while not served.is_set() and flooder.send(flood):
                sent += len(flood)
            return sent

        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(send)
            try:
                for _ in range(20):
                    assert room.answers()
                still_on = not sending.done()
            finally:
                served.set()
            say(f"{sending.result() / MIB:.0f} MiB sent while others were served 20 times")
    assert still_on, "the flood went on all the while"


def test_a_peer_that_vanishes_in_the_middle_of_a_frame_leaves_nothing_behind(room):
    before = room.metric("parlour_channels")
    for _ in range(50):
        with RawSocket(room) as socket:
            socket.send(websocket_frame(TEXT, b"x" * 1000)[:500])
    eventually(lambda: room.metric("parlour_channels") <= before)
