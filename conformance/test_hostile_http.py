"""What a host does with HTTP that nobody should send. After each case it still answers."""

from __future__ import annotations

import gzip
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from agents import Agents
from parlour_v1 import Kind
from raw import Raw, request
from room import Honest

MIB = 1 << 20


@pytest.fixture(scope="module")
def impatient(module_room):
    """A room whose timeouts are short enough to be waited for."""
    return module_room(
        timeouts__first_byte="1s",
        timeouts__headers="1s",
        timeouts__body_stall="1s",
        timeouts__idle="1s",
    )


# Slow and silent connections


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CALL_HEAD = b"POST /v1/agents/nobody/k/call HTTP/1.1\r\nHost: localhost\r\n"
SLOW = {
    "a silent connection": (b"", None),
    "a lone P": (b"P", None),
    "half a preface of HTTP/2": (PREFACE[:12], None),
    "a preface of HTTP/2 and nothing after it": (PREFACE, None),
    "HTTP/2 that has said hello and idles": (PREFACE + b"\0\0\0\4\0\0\0\0\0", None),
    "half a request line": (b"GET /vers", None),
    "headers that never end": (b"GET /version HTTP/1.1\r\nHost: localhost\r\n", None),
    "headers that come one by one": (b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X-%d: 1\r\n"),
    "headers that come byte by byte": (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", b"x"),
    "an idle keep-alive": (b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n", None),
    "a body that never comes": (CALL_HEAD + b"Content-Length: 100\r\n\r\n", None),
    "half a body": (CALL_HEAD + b"Content-Length: 100\r\n\r\nabc", None),
    "a chunk that never ends": (CALL_HEAD + b"Transfer-Encoding: chunked\r\n\r\n40\r\nabc", None),
    "chunks that stop": (CALL_HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", None),
    "a body that drips": (CALL_HEAD + b"Content-Length: 100000\r\n\r\n", b"x"),
    "chunks that drip": (CALL_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "an upgrade that is not finished": (
        b"GET /open_channel HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n",
        None,
    ),
    "empty lines before a request": (b"", b"\r\n"),
}


def stay(room, opening: bytes, drip: bytes | None) -> float:
    """Opens the connection, keeps it busy with `drip`, and says after how long it was closed."""
    with Raw(room) as connection:
        begun = time.monotonic()
        connection.send(opening)
        count = 0
        while True:
            connection.socket.settimeout(0.1)
            try:
                if not connection.more():
                    return time.monotonic() - begun
            except TimeoutError:
                pass
            if drip:
                count += 1
                piece = drip.replace(b"%d", b"%d" % count)
                if not connection.send(piece):
                    return time.monotonic() - begun
            if time.monotonic() - begun > 10:
                return float("inf")


def test_connections_that_dawdle_are_closed_and_honest_clients_do_not_notice(impatient, say):
    with Honest(impatient) as honest, ThreadPoolExecutor(3 * len(SLOW)) as pool:
        running = {
            name: [pool.submit(stay, impatient, *case) for _ in range(3)]
            for name, case in SLOW.items()
        }
        took = {name: max(f.result() for f in futures) for name, futures in running.items()}
    late = {name: seconds for name, seconds in took.items() if seconds > 6}
    say(f"closed after at most {max(took.values()):.1f} s; honest {honest.slowest * 1000:.0f} ms")
    assert not late, late
    # Nothing is cut before its time either: each of these is let be for about a second.
    hasty = {name: seconds for name, seconds in took.items() if seconds < 0.5}
    assert not hasty, hasty


def test_a_dawdler_is_told_why_where_http_allows(impatient):
    for opening in (
        b"GET /version HTTP/1.1\r\nHost: localhost\r\n",
        CALL_HEAD + b"Content-Length: 100\r\n\r\nabc",
    ):
        with Raw(impatient) as connection:
            connection.send(opening)
            answer = connection.answer()
            assert answer is None or answer.status == 408
            connection.closed()


# Broken requests


def head(*lines: bytes, start=b"GET /version HTTP/1.1") -> bytes:
    return b"\r\n".join((start, b"Host: localhost", *lines)) + b"\r\n\r\n"


BROKEN = {
    "100 headers": (head(*(b"X-%d: 1" % n for n in range(100))), {431}),
    "10,000 headers": (head(*(b"X-%d: 1" % n for n in range(10_000))), {431}),
    "one header of 17 KiB": (head(b"X: " + b"x" * 17 * 1024), {431}),
    "one header of 1 MiB": (head(b"X: " + b"x" * MIB), {431}),
    "headers of 17 KiB together": (
        head(*(b"X-%d: %s" % (n, b"x" * 600) for n in range(29))),
        {431},
    ),
    "a header name of 20 KiB": (head(b"x" * 20_000 + b": 1"), {400, 431}),
    "a target of 20 KiB": (head(start=b"GET /" + b"x" * 20_000 + b" HTTP/1.1"), {414, 431}),
    "a target of 1 MiB": (head(start=b"GET /" + b"x" * MIB + b" HTTP/1.1"), {414, 431}),
    "a folded header": (head(b"X: a\r\n b"), {400}),
    "a folded header with a tab": (head(b"X: a\r\n\tb"), {400}),
    "a space before the colon": (head(b"X : a"), {400}),
    "a space in a name": (head(b"X Y: a"), {400}),
    "a header without a colon": (head(b"nonsense"), {400}),
    "a header without a name": (head(b": a"), {400}),
    "NUL in a value": (head(b"X: a\0b"), {400}),
    "a lone CR in a value": (head(b"X: a\rY: b"), {400}),
    "a leading space in the first header": (b"GET / HTTP/1.1\r\n Host: localhost\r\n\r\n", {400}),
    "a control byte in the target": (head(start=b"GET /\x01 HTTP/1.1"), {400}),
    "a space in the target": (head(start=b"GET /a b HTTP/1.1"), {400}),
    "no target": (head(start=b"GET HTTP/1.1"), {400}),
    "no method": (head(start=b"/ HTTP/1.1"), {400}),
    "a method of control bytes": (head(start=b"G\x01T / HTTP/1.1"), {400}),
    "a method of 20 KiB": (head(start=b"G" * 20_000 + b" / HTTP/1.1"), {400, 405, 414, 431, 501}),
    "HTTP/0.9": (b"GET /\r\n\r\n", {400}),
    "HTTP/3.0 as text": (head(start=b"GET / HTTP/3.0"), {400, 505}),
    "a version of letters": (head(start=b"GET / HTTP/x.y"), {400}),
    "another protocol": (b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n", {400}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300), {400}),
    "bytes without sense": (bytes(range(256)) * 8 + b"\r\n\r\n", {400}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_request_is_refused_and_its_connection_closed(room, case):
    data, statuses = BROKEN[case]
    with Raw(room) as connection:
        connection.send(data)
        answer = connection.answer()
        # A peer that is refused while it still writes may see a reset instead of the answer.
        assert answer is None and len(data) > 8192 or answer.status in statuses, answer
        assert connection.responses() == 0


METHODS = {"CONNECT": {400, 403, 404, 405, 501}, "TRACE": {405, 501}, "get": {405, 501, 400}}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_the_host_does_not_serve_is_refused(room, method):
    with Raw(room) as connection:
        connection.send(head(start=method.encode() + b" /version HTTP/1.1"))
        assert connection.answer().status in METHODS[method]


# Never two requests from one

SMUGGLED = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /v1/agents/nobody/k/call HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
FRAMINGS = {
    "a length and chunks": POST + b"Content-Length: 4\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "chunks and a length": POST + CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n",
    "two lengths in one": POST + b"Content-Length: 0, 44\r\n\r\n",
    "a negative length": POST + b"Content-Length: -1\r\n\r\n",
    "a length with a sign": POST + b"Content-Length: +0\r\n\r\n",
    "a length in hexadecimal": POST + b"Content-Length: 0x0\r\n\r\n",
    "a length of letters": POST + b"Content-Length: none\r\n\r\n",
    "a length without digits": POST + b"Content-Length:\r\n\r\n",
    "a length beyond 64 bits": POST + b"Content-Length: 99999999999999999999\r\n\r\n",
    "an unknown coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a coding after chunked": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "the identity coding": POST + b"Transfer-Encoding: identity\r\n\r\n",
    "a coding with a strange space": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a coding after a vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": POST.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n0\r\n\r\n",
    "a chunk size with a sign": POST + CHUNKED + b"\r\n+0\r\n\r\n",
    "a negative chunk size": POST + CHUNKED + b"\r\n-1\r\n\r\n",
    "a chunk size with a prefix": POST + CHUNKED + b"\r\n0x0\r\n\r\n",
    "a chunk size beyond 64 bits": POST + CHUNKED + b"\r\nfffffffffffffffff\r\n\r\n",
    "an empty chunk size": POST + CHUNKED + b"\r\n\r\n\r\n",
    "a chunk longer than its size": POST + CHUNKED + b"\r\n1\r\nabc\r\n0\r\n\r\n",
    "a chunk extension of 1 MiB": POST + CHUNKED + b"\r\n1;" + b"x" * MIB + b"\r\na\r\n0\r\n\r\n",
    "trailers of 1 MiB": POST + CHUNKED + b"\r\n0\r\nX: " + b"x" * MIB + b"\r\n\r\n",
}


@pytest.mark.parametrize("case", FRAMINGS)
def test_a_body_whose_end_is_disputed_never_hides_a_second_request(room, case):
    with Raw(room) as connection:
        connection.send(FRAMINGS[case] + SMUGGLED)
        first = connection.answer()
        assert first is None or 400 <= first.status < 600, first
        assert connection.responses() == 0


def test_line_ends_without_cr_never_make_two_requests(room):
    for data in (
        b"GET /livez HTTP/1.1\nHost: localhost\nConnection: close\n\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\nX: 1\r\nConnection: close\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\n",
    ):
        with Raw(room) as connection:
            connection.send(data)
            assert connection.answer().status in (200, 400)
            assert connection.responses() == 0


def test_requests_in_a_row_are_answered_in_their_order(room):
    with Raw(room) as connection:
        connection.send(SMUGGLED + request("GET", "/nowhere", "localhost") + SMUGGLED)
        assert [connection.answer().status for _ in range(3)] == [200, 404, 200]


# Bodies


def test_ten_gigabytes_in_chunks_are_refused_after_the_first_megabytes(room, say):
    before = room.rss()
    sent = 0
    chunk = b"%x\r\n%s\r\n" % (256 * 1024, b"x" * 256 * 1024)
    with Raw(room) as connection:
        connection.send(POST + CHUNKED + b"\r\n")
        while sent < 10 << 30 and connection.send(chunk):
            sent += len(chunk)
        assert sent < 64 * MIB, "the host took far more than its limit"
    with Raw(room) as connection:
        connection.send(POST + CHUNKED + b"\r\n" + chunk * 5)
        assert connection.answer().status == 413
        connection.closed()
    grown = room.rss() - before
    say(f"10 GiB announced: stopped after {sent / MIB:.1f} MiB, memory grew {grown / MIB:.1f} MiB")
    assert grown <= 16 * MIB


def test_a_body_announced_too_long_is_refused_before_it_is_sent(room):
    with Raw(room) as connection:
        connection.send(POST + b"Content-Length: 10737418240\r\n\r\n")
        answer = connection.answer()
        found = json.loads(answer.body)
        assert (answer.status, found["kind"]) == (413, "too_large")
        assert found["config_key"] == "limits.payload_bytes"
        connection.closed()


def test_a_body_that_is_expected_to_be_refused_need_not_be_sent(room):
    with Raw(room) as connection:
        connection.send(POST + b"Content-Length: 10737418240\r\nExpect: 100-continue\r\n\r\n")
        assert connection.answer().status in (413, 417)


def test_a_compressed_bomb_is_not_decompressed(room):
    bomb = gzip.compress(bytes(64 * MIB))
    assert len(bomb) < 100_000
    headers = {"content-encoding": "gzip", "content-type": "application/json", "x-client-id": "c"}
    before = room.rss()
    answer = room.http("POST", "/rpc", bomb, headers)
    assert answer.status in (200, 400, 415)
    if answer.status == 200:
        assert json.loads(answer.body)["error"]["code"] == -32700
    agents = Agents(room.url)
    answer = room.http("POST", "/v1/agents/echo/k/call", bomb, headers)
    # Either refused, or bytes like any others.
    assert answer.status == 415 or agents.next(Kind.CALL).payload == bomb
    agents.stop()
    assert room.rss() - before <= 16 * MIB
