"""What a host does with HTTP and JSON that nobody should send. After each case it still answers."""

from __future__ import annotations

import gzip
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from agents import Agents
from parlour_v1 import Kind
from raw import Raw, request

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


class Honest:
    """Somebody who uses the host as intended the whole time, and must never notice the rest."""

    def __init__(self, room):
        self.room, self.slowest, self.rounds, self.failure = room, 0.0, 0, None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        assert self.failure is None, self.failure
        assert self.rounds > 0

    def _run(self):
        while not self._stop.wait(0.02):
            begun = time.monotonic()
            try:
                assert self.room.rpc("runtime.get_subscriptions")["result"]
            except Exception as failure:
                self.failure = failure
                return
            self.slowest = max(self.slowest, time.monotonic() - begun)
            self.rounds += 1


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
    "65 headers": (head(*(b"X-%d: 1" % n for n in range(65))), {431}),
    "10,000 headers": (head(*(b"X-%d: 1" % n for n in range(10_000))), {431}),
    "one header of 17 KiB": (head(b"X: " + b"x" * 17 * 1024), {431}),
    "one header of 1 MiB": (head(b"X: " + b"x" * MIB), {431}),
    "headers of 17 KiB together": (head(*(b"X-%d: %s" % (n, b"x" * 600) for n in range(29))), {431}),
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


# JSON


def rpc(room, body: bytes, **headers) -> tuple[int, object]:
    """The status and the object that `/rpc` answers to these bytes."""
    headers = {"content-type": "application/json", "x-client-id": "hostile"} | headers
    answer = room.http("POST", "/rpc", body, headers)
    return answer.status, json.loads(answer.body) if answer.body else None


PUBLISH = (
    b'{"jsonrpc": "2.0", "id": 1, "method": "agent.publish", "params": {"topic": '
    b'{"type": "t", "source": "s"}, "data_type": "T", "data_content_type": "x", %s}}'
)
GOOD = b'{"jsonrpc": "2.0", "method": "runtime.get_subscriptions", "id": 1}'
NOT_JSON = {
    "nothing": b"",
    "a lone brace": b"{",
    "text": b"hello",
    "two values": GOOD + GOOD,
    "a trailing comma": b'{"jsonrpc": "2.0",}',
    "single quotes": b"{'jsonrpc': '2.0'}",
    "a comment": b"/* hello */" + GOOD,
    "NaN": GOOD.replace(b"1}", b"NaN}"),
    "Infinity": GOOD.replace(b"1}", b"-Infinity}"),
    "a leading zero": GOOD.replace(b"1}", b"01}"),
    "a byte order mark": b"\xef\xbb\xbf" + GOOD,
    "UTF-16": GOOD.decode().encode("utf-16"),
    "bytes that are not UTF-8": GOOD.replace(b"runtime", b"run\xfftime"),
    "an overlong NUL": GOOD.replace(b"runtime", b"\xc0\x80"),
    "a surrogate as UTF-8": GOOD.replace(b"runtime", b"\xed\xa0\x80"),
    "a lone surrogate": GOOD.replace(b"runtime", b"\\ud800"),
    "surrogates the wrong way round": GOOD.replace(b"runtime", b"\\udc00\\ud800"),
    "a control byte in a text": GOOD.replace(b"runtime", b"run\x01time"),
    "an unknown escape": GOOD.replace(b"runtime", b"\\x41"),
    "100,000 open arrays": b"[" * 100_000,
    "100,000 open objects": b'{"a":' * 100_000,
    "100,000 closed arrays": b"[" * 100_000 + b"]" * 100_000,
}


@pytest.mark.parametrize("case", NOT_JSON)
def test_what_is_not_json_is_a_parse_error(room, case):
    begun = time.monotonic()
    status, answer = rpc(room, NOT_JSON[case])
    assert status in (200, 400)
    # Nesting beyond the limit is JSON, only too much of it.
    expected = (-32700, -32600) if "100,000" in case else (-32700,)
    if isinstance(answer, list):
        answer = answer[0]
    assert answer["error"]["code"] in expected and answer["id"] is None
    assert answer["error"]["data"]["kind"] in ("invalid", "too_large")
    assert time.monotonic() - begun < 2


NOT_REQUESTS = {
    "a number": b"1",
    "a text": b'"hello"',
    "null": b"null",
    "an empty object": b"{}",
    "an empty batch": b"[]",
    "no version": GOOD.replace(b'"jsonrpc": "2.0", ', b""),
    "version 1.0": GOOD.replace(b'"2.0"', b'"1.0"'),
    "version as a number": GOOD.replace(b'"2.0"', b"2.0"),
    "no method": b'{"jsonrpc": "2.0", "id": 1}',
    "a method that is a number": b'{"jsonrpc": "2.0", "method": 1, "id": 1}',
    "an id that is an object": GOOD.replace(b"1}", b'{"a": 1}}'),
    "an id that is a list": GOOD.replace(b"1}", b"[1]}"),
    "an id that is true": GOOD.replace(b"1}", b"true}"),
    "params that are a text": GOOD.replace(b'"id"', b'"params": "x", "id"'),
    "a response": b'{"jsonrpc": "2.0", "result": 1, "id": 1}',
    "the method twice": GOOD.replace(b'"id"', b'"method": "agent.call", "id"'),
    "the id twice": GOOD.replace(b"1}", b'1, "id": 2}'),
    "the version twice": GOOD.replace(b'"2.0"', b'"2.0", "jsonrpc": "2.0"'),
}


@pytest.mark.parametrize("case", NOT_REQUESTS)
def test_json_that_is_no_request_is_invalid(room, case):
    status, answer = rpc(room, NOT_REQUESTS[case])
    assert status in (200, 400)
    assert answer["error"]["code"] == -32600, answer
    assert answer["error"]["data"]["kind"] == "invalid" and "result" not in answer


CALL = {"jsonrpc": "2.0", "id": 7, "method": "agent.call"}
TARGET = {"target": {"type": "nobody", "key": "k"}, "data_type": "T", "data_content_type": "x"}


@pytest.mark.parametrize(
    "params",
    [
        [],
        ["nobody", "k"],
        {},
        {**TARGET, "data": 5},
        {**TARGET, "data": {"a": 1}},
        {**TARGET, "data": "x", "target": "nobody/k"},
        {**TARGET, "data": "x", "target": {"type": "nobody"}},
        {**TARGET, "data": "x", "target": {"type": 5, "key": "k"}},
        {**TARGET, "data": "x", "data_type": None, "target": None},
        {**TARGET, "data": "x", "source": "me"},
        {**TARGET, "data": "x", "target": {"type": "not a name", "key": "k"}},
        {**TARGET, "data": "x", "target": {"type": "nobody", "key": "a\u0000b"}},
        {**TARGET, "data": "x", "target": {"type": "nobody", "key": "k" * 300}},
        {**TARGET, "data": "x", "target": {"type": "", "key": ""}},
    ],
)
def test_params_of_the_wrong_shape_are_named(room, params):
    _, answer = rpc(room, json.dumps({**CALL, "params": params}).encode())
    assert answer["id"] == 7
    error = answer["error"]
    # A name that breaks its rule is a fault of the call; a wrong shape is one of the envelope.
    assert error["code"] in (-32602, -32000) and error["data"]["kind"] == "invalid", error
    assert error["message"] and error["data"]["may_have_run"] is False


def test_the_same_param_twice_is_refused(room):
    body = json.dumps({**CALL, "params": {**TARGET, "data": "x"}}).encode()
    twice = body.replace(b'"data": "x"', b'"data": "x", "data": "y"')
    assert twice != body
    _, answer = rpc(room, twice)
    assert answer["error"]["code"] in (-32602, -32600)


@pytest.mark.parametrize("method", ["nope", "", "rpc.discover", "agent.call\0", "a" * 10_000])
def test_an_unknown_method_is_not_found(room, method):
    _, answer = rpc(room, json.dumps({"jsonrpc": "2.0", "method": method, "id": "x"}).encode())
    assert answer["error"]["code"] == -32601 and answer["id"] == "x"
    assert answer["error"]["data"]["hint"]


@pytest.mark.parametrize("id", [0, -1, 2**63, 1.5, "", "ключ", "x" * 100])
def test_an_id_comes_back_as_it_was(room, id):
    _, answer = rpc(room, json.dumps({**json.loads(GOOD), "id": id}).encode())
    assert answer["id"] == id and "result" in answer


def test_a_huge_id_comes_back_or_is_refused(room):
    _, answer = rpc(room, json.dumps({**json.loads(GOOD), "id": "x" * 100_000}).encode())
    assert answer["id"] == "x" * 100_000 or answer["error"]["code"] == -32600


@pytest.mark.parametrize("number", [b"9" * 10_000, b"1e999999", b"1." + b"0" * 10_000])
def test_numbers_beyond_measure_are_bounded(room, number):
    begun = time.monotonic()
    status, answer = rpc(room, GOOD.replace(b"1}", number + b"}"))
    assert status in (200, 400) and isinstance(answer, dict)
    assert time.monotonic() - begun < 2


def test_a_million_keys_are_bounded(room):
    begun = time.monotonic()
    keys = b",".join(b'"%x":0' % n for n in range(120_000))
    assert len(keys) < 2 * MIB
    before = room.rss()
    status, answer = rpc(room, b'{"jsonrpc":"2.0","id":1,"method":"nope",' + keys + b"}")
    # Over the limit on bodies.
    assert status == 413 and answer["kind"] == "too_large"
    assert answer["config_key"] == "limits.json_body_bytes"
    fewer = b",".join(b'"%x":0' % n for n in range(90_000))
    status, answer = rpc(room, b'{"jsonrpc":"2.0","id":1,"method":"nope",' + fewer + b"}")
    assert status in (200, 400) and answer["error"]["code"] in (-32601, -32600)
    assert time.monotonic() - begun < 5 and room.rss() - before <= 32 * MIB


def test_depth_within_the_limit_is_taken_and_beyond_it_refused(room):
    # Params of a known method that are ignored, nested.
    def nested(depth):
        value = b"[" * depth + b"1" + b"]" * depth
        return rpc(room, PUBLISH % (b'"data": "x", "extra": ' + value))[1]

    assert nested(20).get("error") is None
    error = nested(100)["error"]
    assert error["code"] in (-32700, -32600, -32602)
    assert error["data"]["config_key"] == "limits.json_depth"


@pytest.mark.parametrize("name", ["a\\u0000b", "a\\u001bb", "a\\nb"])
def test_control_characters_in_names_are_refused(room, name):
    body = PUBLISH % b'"data": "x"'
    for place in (b'"t"', b'"s"'):
        _, answer = rpc(room, body.replace(place, b'"%s"' % name.encode()))
        assert answer["error"]["data"]["kind"] == "invalid"


# Batches and notifications


def test_a_batch_is_answered_as_one(room):
    batch = [{**json.loads(GOOD), "id": n} for n in range(49)]
    batch.append({"jsonrpc": "2.0", "method": "runtime.get_subscriptions"})
    status, answers = rpc(room, json.dumps(batch).encode())
    assert status == 200 and sorted(answer["id"] for answer in answers) == list(range(49))
    assert all("result" in answer for answer in answers)


def test_a_bad_member_of_a_batch_spoils_only_itself(room):
    status, answers = rpc(room, b"[1, %s, {}]" % GOOD)
    assert status == 200
    codes = [answer.get("error", {}).get("code") for answer in answers]
    assert sorted(codes, key=str) == [-32600, -32600, None]


@pytest.mark.parametrize("length", [51, 10_000])
def test_a_batch_beyond_the_limit_is_refused_as_a_whole(room, length):
    status, answer = rpc(room, b"[" + b",".join([GOOD] * length) + b"]")
    assert status in (200, 400, 413) and isinstance(answer, dict)
    error = answer["error"]
    assert error["code"] == -32600 and error["data"]["config_key"] == "limits.batch"


def test_an_empty_notification_is_not_answered(room):
    notification = b'{"jsonrpc": "2.0", "method": "runtime.get_subscriptions"}'
    for body in (notification, b"[%s, %s]" % (notification, notification)):
        assert rpc(room, body) == (204, None)


def test_a_notification_of_an_unknown_method_is_not_answered_either(room):
    assert rpc(room, b'{"jsonrpc": "2.0", "method": "nope"}') == (204, None)


def test_a_flood_of_notifications_harms_nobody(room):
    notification = PUBLISH.replace(b'"id": 1, ', b"") % b'"data": "x"'
    batch = b"[" + b",".join([notification] * 50) + b"]"
    with Honest(room), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: rpc(room, batch)[0], range(100)))
    assert set(answers) == {204}
