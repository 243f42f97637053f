"""Agents and topics over plain HTTP: the standard library, `curl`, and h2c by prior knowledge."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import time

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest

from agents import Agents
from parlour_v1 import Field, Kind
from room import BINARY, eventually


@pytest.fixture(scope="module")
def shared_agents(shared_room):
    agents = Agents(shared_room.url)
    yield agents
    agents.stop()


@pytest.fixture
def agents(room, shared_agents):
    shared_agents.forget()
    return shared_agents


def problem(answer, status: int, kind: str) -> dict:
    """The problem that an answer must be."""
    assert answer.status == status, (answer.status, answer.body)
    assert answer.getheader("content-type").startswith("application/problem+json")
    found = json.loads(answer.body)
    assert (found["kind"], found["status"]) == (kind, status)
    assert {"type", "title", "detail", "retryable", "may_have_run"} <= found.keys()
    assert all(isinstance(found[name], bool) for name in ("retryable", "may_have_run"))
    return found


class Events:
    """One stream of server-sent events."""

    def __init__(self, room, path: str, **headers):
        self.connection = http.client.HTTPConnection(*room.address, timeout=10)
        self.connection.request("GET", path, headers=headers)
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200, self.answer.read()
        self.content_type = self.answer.getheader("content-type")
        assert self.line() == ": subscribed"

    def line(self) -> str:
        """The next line that is not empty."""
        while True:
            line = self.answer.readline()
            assert line, "the stream ended"
            if line.strip():
                return line.decode().rstrip("\r\n")

    def next(self) -> dict:
        """The data of the next event."""
        self.place = None
        while not (line := self.line()).startswith("data:"):
            if line.startswith("id:"):
                self.place = line[3:].strip()
            else:
                assert line.startswith(":"), line
        return json.loads(line[5:])

    def close(self):
        self.connection.close()


# Calls


def test_the_body_and_its_content_type_go_in_and_come_out(room, agents):
    headers = {"content-type": "text/x-poem; charset=utf-8"}
    answer = room.http("POST", "/v1/agents/echo/k/call", "Grüße".encode(), headers)
    assert (answer.status, answer.body) == (200, "Grüße".encode())
    assert answer.getheader("content-type") == headers["content-type"]


def test_a_binary_payload_is_untouched(room, agents):
    payload = bytes(range(256)) * 4000
    headers = {"content-type": "application/octet-stream"}
    answer = room.http("POST", "/v1/agents/echo/k/call", payload, headers)
    assert answer.body == payload


def test_an_empty_body_is_a_payload_too(room, agents):
    answer = room.http("POST", "/v1/agents/echo/k/call")
    assert (answer.status, answer.body) == (200, b"")
    assert agents.next(Kind.CALL).payload == b""


def test_headers_of_the_protocol_go_both_ways(room, agents):
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = room.http(
        "POST",
        "/v1/agents/echo/k/call",
        b"x",
        {
            "Parlour-Data-Type": "Order",
            "Parlour-Conversation": "c-9",
            "Parlour-Cause": "m-8",
            "Parlour-Hops": "2",
            "Parlour-Deadline-Ms": "5000",
            "Parlour-Meta-Request-Type": "sum",
            "Idempotency-Key": "once",
            "traceparent": trace,
        },
    )
    call = agents.next(Kind.CALL)
    assert call.get(Field.DATA_TYPE) == "Order"
    assert call.get(Field.CONVERSATION) == "c-9"
    assert call.get(Field.CAUSE) == "m-8"
    assert call.get(Field.HOPS) == 2
    assert 0 < call.get(Field.TIMEOUT_MS) <= 5000
    assert call.get(Field.TRACEPARENT) == trace
    assert {k.lower(): v for k, v in call.metadata.items()} == {"request-type": "sum"}
    assert answer.getheader("Parlour-Data-Type") == "Order"
    assert answer.getheader("Parlour-Conversation") == "c-9"
    assert answer.getheader("Parlour-Meta-Request-Type") == "sum"


@pytest.mark.parametrize(
    "path, key",
    [
        ("a%2Fb%20c", "a/b c"),
        ("%D0%BA%D0%BB%D1%8E%D1%87", "ключ"),
        ("%25", "%"),
        ("a+b", "a+b"),
        ("..%2F..%2Fetc", "../../etc"),
    ],
)
def test_a_key_is_percent_encoded_in_the_path(room, agents, path, key):
    assert room.http("POST", f"/v1/agents/echo/{path}/call").status == 200
    assert agents.next(Kind.CALL).get(Field.KEY) == key


@pytest.mark.parametrize("path", ["a%00b", "a%0Ab", "%FF%FE", "%C3%28", "x" * 257])
def test_a_bad_key_is_invalid(room, agents, path):
    found = problem(room.http("POST", f"/v1/agents/echo/{path}/call"), 400, "invalid")
    assert found["may_have_run"] is False and found["hint"]


@pytest.mark.parametrize("agent_type", ["a%20b", "%C3%BC", "x" * 200, "%2E%2E"])
def test_a_bad_agent_type_is_invalid(room, agent_type):
    problem(room.http("POST", f"/v1/agents/{agent_type}/k/call"), 400, "invalid")


def test_a_deadline_over_on_arrival_is_not_delivered(room, agents):
    headers = {"Parlour-Deadline-Ms": "0"}
    answer = room.http("POST", "/v1/agents/echo/k/call", b"x", headers)
    assert problem(answer, 504, "deadline_exceeded")["may_have_run"] is False
    assert agents.seen.empty()


def test_a_deadline_that_passes_says_that_the_agent_may_have_run(room, agents):
    headers = {"Parlour-Deadline-Ms": "150"}
    begun = time.monotonic()
    found = problem(
        room.http("POST", "/v1/agents/hang/k/call", b"x", headers), 504, "deadline_exceeded"
    )
    assert found["may_have_run"] is True
    assert 0.1 < time.monotonic() - begun < 5
    assert agents.next(Kind.CANCEL).id


@pytest.mark.parametrize(
    "header",
    [
        {"Parlour-Deadline-Ms": "soon"},
        {"Parlour-Deadline-Ms": "-1"},
        {"Parlour-Hops": "many"},
        {"Parlour-Conversation": "x" * 200},
        {"Parlour-Meta-not!a!name": "v"},
    ],
    ids=["deadline word", "deadline negative", "hops", "conversation", "metadata"],
)
def test_a_header_that_cannot_be_read_is_refused_and_named(room, agents, header):
    answer = room.http("POST", "/v1/agents/echo/k/call", b"x", header)
    assert problem(answer, 400, "invalid")["detail"]
    assert agents.seen.empty()


def test_a_loop_of_calls_is_invalid(room, agents):
    answer = room.http("POST", "/v1/agents/echo/k/call", b"x", {"Parlour-Hops": "17"})
    assert problem(answer, 400, "invalid")["config_key"] == "limits.hops"


def test_an_agents_failure_keeps_its_text(room, agents):
    found = problem(room.http("POST", "/v1/agents/fail/k/call", b"x"), 502, "agent_failed")
    assert found["detail"] == "it broke ☂" and found["may_have_run"] is True


LIMITS = {
    "limits.headers": ("POST", "/v1/topics/t/s", b"", {f"x-{n}": "1" for n in range(65)}),
    "limits.payload_bytes": ("POST", "/v1/topics/t/s", b"x" * 4096, {}),
    "limits.json_body_bytes": ("POST", "/rpc", b" " * 4096, {}),
    "limits.json_depth": ("POST", "/rpc", b"[" * 100, {}),
    "limits.batch": ("POST", "/rpc", b"[%s]" % b",".join([b"1"] * 1001), {}),
    "server.allowed_hosts": ("GET", "/v1/agents", None, {"host": "elsewhere.example"}),
    "server.allowed_origins": ("GET", "/v1/agents", None, {"origin": "https://elsewhere.example"}),
}


@pytest.fixture(scope="module")
def narrow(module_room):
    return module_room(limits__payload_bytes="2KiB", limits__json_body_bytes="3KiB")


@pytest.mark.parametrize("key", LIMITS)
def test_a_limit_that_is_met_is_named_and_counted(narrow, key):
    method, path, body, headers = LIMITS[key]
    headers = {"content-type": "application/json"} | headers
    assert narrow.limit_hits(key) == 0
    answer = json.loads(narrow.http(method, path, body, headers).body)
    assert answer.get("error", {"data": answer})["data"]["config_key"] == key
    assert narrow.limit_hits(key) == 1


def test_an_unknown_agent_is_a_problem_with_a_hint(room):
    found = problem(room.http("POST", "/v1/agents/nobody/k/call", b"x"), 404, "unknown_agent")
    assert found["hint"] and found["may_have_run"] is False and found["retryable"] is True


def test_a_payload_over_the_limit_names_its_setting(room, agents):
    found = problem(
        room.http("POST", "/v1/agents/echo/k/call", bytes((1 << 20) + 1)), 413, "too_large"
    )
    assert found["config_key"] == "limits.payload_bytes" and found["limit"] == 1 << 20
    assert found["hint"]


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/nowhere", 404),
        ("POST", "/v1/agents/echo/call", 404),
        ("GET", "/v1/agents/echo/k/call", 405),
        ("DELETE", "/v1/agents", 405),
        ("GET", "/rpc", 405),
        ("PUT", "/livez", 405),
    ],
)
def test_what_is_not_there_is_a_problem(room, method, path, status):
    answer = room.http(method, path)
    found = problem(answer, status, "not_found" if status == 404 else "invalid")
    assert found["may_have_run"] is False
    if status == 405:
        assert answer.getheader("allow")


def test_a_caller_that_closes_its_connection_cancels_its_call(room, agents):
    connection = http.client.HTTPConnection(*room.address)
    connection.request("POST", "/v1/agents/hang/k/call", b"x")
    call = agents.next(Kind.CALL)
    connection.close()
    assert agents.next(Kind.CANCEL).id == call.id


def test_one_connection_serves_one_request_after_another(room, agents):
    connection = http.client.HTTPConnection(*room.address)
    for number in range(20):
        connection.request("POST", "/v1/agents/echo/k/call", str(number))
        assert connection.getresponse().read() == str(number).encode()
    connection.close()


# Topics


def test_a_topic_can_be_followed_and_published_to(room):
    stream = Events(room, "/v1/topics/order.paid/events")
    assert stream.content_type.startswith("text/event-stream")
    headers = {
        "content-type": "application/json",
        "Parlour-Data-Type": "Order",
        "Parlour-Conversation": "c-1",
    }
    answer = room.http("POST", "/v1/topics/order.paid/shop%207", b'{"total": 3}', headers)
    assert answer.status == 200
    published = json.loads(answer.body)
    assert published["ack"] == "memory" and published["conversation"] == "c-1"
    assert (published["recipients"], published["dropped"]) == (1, [])
    event = stream.next()
    assert event["id"] == published["id"]
    assert event["topic"] == {"type": "order.paid", "source": "shop 7"}
    assert (event["data_type"], event["content_type"]) == ("Order", "application/json")
    data = event["data"]
    assert (json.loads(data) if isinstance(data, str) else data) == {"total": 3}
    assert event["time"] and event["sender"] is None and "data_base64" not in event
    stream.close()


def test_a_source_may_be_called_events(room):
    assert room.http("POST", "/v1/topics/t/events", b"x").status == 200


def test_a_body_that_is_not_text_comes_as_base64(room):
    stream = Events(room, "/v1/topics/blob/events")
    room.http("POST", "/v1/topics/blob/x", b"\xff\x00", {"content-type": "image/x"})
    event = stream.next()
    assert event["data_base64"] == "/wA=" and "data" not in event
    stream.close()


def test_a_stream_takes_a_prefix_and_a_source(room):
    stream = Events(room, "/v1/topics/news.*/events?source=s1")
    for topic in ("news.tech/s2", "news.tech/s1", "newsless/s1", "news.art/s1"):
        room.http("POST", f"/v1/topics/{topic}", topic.encode(), {"content-type": "text/plain"})
    assert [stream.next()["data"] for _ in range(2)] == ["news.tech/s1", "news.art/s1"]
    stream.close()


def test_a_multi_line_body_stays_one_event(room):
    stream = Events(room, "/v1/topics/lines/events")
    text = "a\nb\r\n\nid: forged\ndata: forged\n\n"
    room.http("POST", "/v1/topics/lines/x", text.encode(), {"content-type": "text/plain"})
    assert stream.next()["data"] == text
    stream.close()


def test_a_stream_has_heartbeats(start_room):
    room = start_room(timeouts__heartbeat="200ms")
    stream = Events(room, "/v1/topics/quiet/events")
    assert stream.line() == ": heartbeat" == stream.line()
    stream.close()


def test_a_stream_that_is_closed_is_forgotten(room):
    stream = Events(room, "/v1/topics/left/events")
    stream.close()

    def forgotten():
        return json.loads(room.http("POST", "/v1/topics/left/x", b"").body)["recipients"] == 0

    eventually(forgotten)


@pytest.mark.parametrize("topic", ["a%20b/x", "t%2A/x", "%2E%2E/x", "t/a%0Ab"])
def test_a_bad_topic_is_invalid(room, topic):
    problem(room.http("POST", f"/v1/topics/{topic}", b"x"), 400, "invalid")


# Reading


def test_the_room_can_be_read(room, agents):
    types = {agent["type"] for agent in room.get("/v1/agents")["agents"]}
    assert {"echo", "fail", "hang"} <= types
    workers = [w for w in room.get("/v1/workers")["workers"] if w["name"] == "agents"]
    assert workers[0]["protocol"] == "parlour.v1" and workers[0]["connected"] is True
    assert {"echo", "fail", "hang"} == set(workers[0]["agent_types"])
    assert isinstance(room.get("/v1/subscriptions")["subscriptions"], list)


def test_an_agent_of_the_rust_sdk_describes_itself(room):
    command = [BINARY, "worker", "mirror", "--echo", "--url", room.url]
    worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert any("serving mirror" in line for line in worker.stderr)
        page = room.get("/v1/agents/mirror")
        description = page["description"]
        assert description["agent_type"] == page["type"] == "mirror"
        assert description["handles"] == [{"data_type": ""}]
    finally:
        worker.terminate()
        worker.wait(10)
    problem(room.http("GET", "/v1/agents/mirror"), 404, "unknown_agent")


def test_who_is_at_the_wrong_door_is_told_of_the_right_one(room):
    lost = problem(room.http("POST", "/v1/agents/mirror/me", body=b"hello"), 404, "not_found")
    assert "/v1/agents/{type}/{key}/call" in lost["hint"]


def test_the_pages_for_operators_answer(room):
    assert room.get("/livez").strip() == room.get("/readyz").strip() == "ok"
    assert room.get("/healthz")
    version = room.get("/version")
    assert version["name"] == "parlour"
    assert version["protocols"] == ["parlour.v1", "parlour.v1+json", "autogen-0.1.0"]
    answer = room.http("GET", "/metrics")
    assert answer.getheader("content-type").startswith(("text/plain", "application/openmetrics"))
    assert b"# HELP parlour_" in answer.body


def test_a_head_request_has_no_body(room):
    answer = room.http("HEAD", "/livez")
    assert (answer.status, answer.body) == (200, b"")


# Other clients


def curl(*args, input=None) -> str:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["curl", "-sS", "--max-time", "10", "--noproxy", "*", *args]
    return subprocess.run(command, input=input, capture_output=True, text=True, check=True).stdout


def test_curl_alone_calls_an_agent(room, agents):
    url = f"{room.url}/v1/agents/echo/k/call"
    assert curl("-d", "hello", "-H", "content-type: text/plain", url) == "hello"
    assert json.loads(curl("-d", "x", f"{room.url}/v1/agents/nobody/k/call"))["hint"]


def test_curl_alone_follows_a_topic(room):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["curl", "-sSN", "--max-time", "10", "--noproxy", "*"]
    follow = subprocess.Popen(
        [*command, f"{room.url}/v1/topics/curl/events"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert follow.stdout.readline().rstrip() == ": subscribed"
        sent = json.loads(curl("-d", "news", f"{room.url}/v1/topics/curl/x"))
        assert sent["recipients"] == 1
        line = follow.stdout.readline()
        while not line.startswith("data:"):
            line = follow.stdout.readline()
        assert json.loads(line[5:])["id"] == sent["id"]
    finally:
        follow.kill()
        follow.wait()
        follow.stdout.close()


def test_curl_that_speaks_http2_at_once_is_understood(room, agents):
    if "HTTP2" not in curl("--version"):
        pytest.skip("this curl has no HTTP/2")
    url = f"{room.url}/v1/agents/echo/k/call"
    shape = ["-w", " %{http_version}", "--http2-prior-knowledge"]
    assert curl(*shape, "-d", "hello", url) == "hello 2"


class H2:
    """A client of h2c by prior knowledge."""

    def __init__(self, room):
        self.socket = socket.create_connection(room.address, timeout=10)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.host = f"{room.host}:{room.port}"
        self.answers: dict[int, tuple[list, bytearray]] = {}
        self.ended: set[int] = set()

    def send(self, method, path, body=b"") -> int:
        stream = self.h2.get_next_available_stream_id()
        names = (":method", ":scheme", ":authority", ":path")
        headers = list(zip(names, (method, "http", self.host, path)))
        self.h2.send_headers(stream, headers, end_stream=not body)
        if body:
            self.h2.send_data(stream, body, end_stream=True)
        self.socket.sendall(self.h2.data_to_send())
        self.answers[stream] = ([], bytearray())
        return stream

    def wait(self, stream, goes_on=lambda body: True) -> tuple[dict, bytes]:
        while stream not in self.ended:
            assert goes_on(self.answers[stream][1]), "heard enough"
            data = self.socket.recv(65536)
            assert data, "the connection ended"
            for event in self.h2.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    self.answers[event.stream_id][0].extend(event.headers)
                elif isinstance(event, h2.events.DataReceived):
                    self.answers[event.stream_id][1].extend(event.data)
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    self.ended.add(event.stream_id)
            self.socket.sendall(self.h2.data_to_send())
        headers, body = self.answers[stream]
        return dict(headers), bytes(body)

    def close(self):
        self.socket.close()


def test_http2_by_prior_knowledge_carries_many_calls_at_once(room, agents):
    client = H2(room)
    streams = {
        client.send("POST", f"/v1/agents/echo/{n}/call", b"%d" % n): b"%d" % n for n in range(50)
    }
    for stream, body in streams.items():
        headers, answer = client.wait(stream)
        assert (headers[":status"], answer) == ("200", body)
    client.close()


def test_a_stream_that_is_reset_cancels_its_call(room, agents):
    client = H2(room)
    stream = client.send("POST", "/v1/agents/hang/k/call", b"x")
    call = agents.next(Kind.CALL)
    client.h2.reset_stream(stream)
    client.socket.sendall(client.h2.data_to_send())
    assert agents.next(Kind.CANCEL).id == call.id
    client.close()


@pytest.mark.parametrize("reads", [False, True], ids=["stalls", "control: reads"])
def test_a_stream_of_events_over_http2_that_nobody_reads_ends(start_room, reads):
    """The window holds it back, while its socket takes all there is."""
    room = start_room(timeouts__stalled_write="300ms", timeouts__heartbeat="1s")
    client = H2(room)
    if not reads:
        client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
    stream = client.send("GET", "/v1/topics/news/events")
    if reads:
        # Resting between two heartbeats, it stays for longer than a part of it may wait.
        with pytest.raises(AssertionError, match="heard enough"):
            client.wait(stream, lambda body: body.count(b"heartbeat") < 2)
    else:
        patience = time.monotonic() + 10
        with pytest.raises((AssertionError, ConnectionError), match="ended|reset"):
            client.wait(stream, lambda _: time.monotonic() < patience)
    client.close()


def test_a_problem_over_http2_is_the_same(room):
    client = H2(room)
    headers, body = client.wait(client.send("POST", "/v1/agents/nobody/k/call", b"x"))
    assert headers[":status"] == "404"
    assert headers["content-type"].startswith("application/problem+json")
    assert json.loads(body)["kind"] == "unknown_agent"
    client.close()
