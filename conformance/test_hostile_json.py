"""What a host does with JSON and JSON-RPC that nobody should send. After each case it still answers."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from room import Honest

MIB = 1 << 20


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
