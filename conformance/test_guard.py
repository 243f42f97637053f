"""Who may talk to a host at all: no web page, and nobody without the token where one is set."""

from __future__ import annotations

import itertools
import json

import pytest

from raw import Raw, request, upgrade

RPC = json.dumps({"jsonrpc": "2.0", "method": "runtime.get_subscriptions", "id": 1}).encode()
RPC_HEADERS = ("Content-Type: application/json", "x-client-id: c")
# A client of the dialect is connected once, and whether it still is, is for the host to find out.
CLIENTS = itertools.count()


def doors(host: str, *headers: str) -> dict[str, bytes]:
    """One request for each door."""
    return {
        "a page": request("GET", "/version", host, b"", *headers),
        "a call": request("POST", "/v1/agents/nobody/k/call", host, b"x", *headers),
        "rpc": request("POST", "/rpc", host, RPC, *RPC_HEADERS, *headers),
        "a stream": request("GET", "/v1/topics/t/events", host, b"", *headers),
        "the dialect": upgrade(f"/open_channel?client_id=c{next(CLIENTS)}", host, *headers),
        "the channel": upgrade(
            "/open_channel", host, "Sec-WebSocket-Protocol: parlour.v1", *headers
        ),
    }


WELCOMED = {
    "a page": 200,
    "a call": 404,
    "rpc": 200,
    "a stream": 200,
    "the dialect": 101,
    "the channel": 101,
}


def answers(room, host: str, *headers: str) -> dict[str, int]:
    """What each door answers."""
    statuses = {}
    for door, data in doors(host, *headers).items():
        with Raw(room) as connection:
            connection.send(data)
            answer = connection.answer(head_only=True)
            statuses[door] = answer.status if answer else None
    return statuses


EVIL_ORIGINS = [
    "http://evil.com",
    "https://evil.com:9000",
    "null",
    "http://localhost.evil.com",
    "http://127.0.0.1.evil.com",
    "http://localhost:1.evil",
    "http://evil.com#localhost",
    "http://localhost@evil.com",
    "http://evillocalhost",
    "file://",
    "localhost",
    "chrome-extension://abcdef",
]


@pytest.mark.parametrize("origin", EVIL_ORIGINS)
def test_a_page_from_elsewhere_is_refused_at_every_door(room, origin):
    host = f"localhost:{room.port}"
    assert set(answers(room, host, f"Origin: {origin}").values()) == {403}


def test_two_origins_are_refused(room):
    host = f"localhost:{room.port}"
    both = (f"Origin: {room.url}", "Origin: http://evil.com")
    assert set(answers(room, host, *both).values()) <= {400, 403}


@pytest.mark.parametrize("host", ["evil.com", "evil.com:{port}", "localhost.evil.com"])
def test_a_name_that_was_rebound_to_loopback_is_refused_at_every_door(room, host):
    assert set(answers(room, host.format(port=room.port)).values()) == {403}


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1.evil.com",
        "localhost:{port}.evil.com",
        "localhost@evil.com",
        "evil.com/localhost",
        "",
        "[::1",
        "169.254.169.254",
        "10.0.0.1:{port}",
    ],
)
def test_a_strange_host_header_is_refused(room, host):
    with Raw(room) as connection:
        connection.send(request("GET", "/version", host.format(port=room.port)))
        assert connection.answer().status in (400, 403)


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:{port}", "LocalHost:9000", "127.0.0.1", "127.0.0.1:{port}"]
    + ["[::1]", "[::1]:{port}", "127.0.0.2:{port}"]
)  # fmt: skip
def test_a_loopback_name_is_welcome_with_any_port(room, host):
    assert answers(room, host.format(port=room.port)) == WELCOMED


def test_a_request_without_a_host_header_is_refused(room):
    with Raw(room) as connection:
        connection.send(b"GET /version HTTP/1.1\r\n\r\n")
        assert connection.answer().status in (400, 403)


def test_two_host_headers_are_refused(room):
    with Raw(room) as connection:
        connection.send(b"GET /version HTTP/1.1\r\nHost: localhost\r\nHost: evil.com\r\n\r\n")
        assert connection.answer().status in (400, 403)


def test_a_target_that_names_another_host_is_refused(room):
    for target in ("http://evil.com/version", "//evil.com/version", "evil.com", "evil.com:80"):
        with Raw(room) as connection:
            connection.send(request("GET", target, f"localhost:{room.port}"))
            assert connection.answer().status in (400, 403, 404), target


def test_a_refusal_is_a_problem_with_a_hint(room):
    for header, key in (
        ({"origin": "http://evil.com"}, "server.allowed_origins"),
        ({"host": "evil.com"}, "server.allowed_hosts"),
    ):
        answer = room.http("GET", "/version", headers=header)
        found = json.loads(answer.body)
        assert (answer.status, found["kind"]) == (403, "forbidden")
        assert found["may_have_run"] is False and key in found["hint"] + str(found["config_key"])


def test_hosts_and_origins_can_be_allowed(start_room):
    room = start_room(
        server__allowed_hosts="agents.example",
        server__allowed_origins="https://app.example.com,http://other.example:8080",
    )
    assert answers(room, "agents.example", "Origin: https://app.example.com") == WELCOMED
    assert answers(room, "agents.example:80", "Origin: http://other.example:8080") == WELCOMED
    for origin in (
        "http://app.example.com",
        "https://app.example.com.evil.com",
        "https://app.example.com:8443",
        "http://other.example",
    ):
        refused = answers(room, "agents.example", f"Origin: {origin}")
        assert set(refused.values()) == {403}, origin
    assert set(answers(room, "sub.agents.example").values()) == {403}


# The token


@pytest.fixture(scope="module")
def guarded(module_room, tmp_path_factory):
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text("s3cret-token\n")
    path.chmod(0o600)
    return module_room("--token-file", str(path))


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Authorization: Bearer wrong",),
        ("Authorization: Bearer s3cret-toke",),
        ("Authorization: Bearer s3cret-token2",),
        ("Authorization: Bearer S3CRET-TOKEN",),
        ("Authorization: Bearer",),
        ("Authorization: Basic czNjcmV0LXRva2Vu",),
        ("Authorization: s3cret-token",),
        ("X-Token: s3cret-token",),
    ],
)
def test_without_the_token_every_door_but_the_checks_is_closed(guarded, headers):
    assert set(answers(guarded, "localhost", *headers).values()) == {401}


def test_with_the_token_every_door_is_open(guarded):
    assert answers(guarded, "localhost", "Authorization: Bearer s3cret-token") == WELCOMED
    assert answers(guarded, "localhost", "authorization: bearer s3cret-token") == WELCOMED


def test_a_token_does_not_open_the_door_to_pages_from_elsewhere(guarded):
    headers = ("Authorization: Bearer s3cret-token", "Origin: http://evil.com")
    assert set(answers(guarded, "localhost", *headers).values()) == {403}


def test_a_token_in_the_query_does_not_count(guarded):
    answer = guarded.http("GET", "/version?token=s3cret-token&access_token=s3cret-token")
    assert answer.status == 401


def test_checks_need_no_token(guarded):
    assert [guarded.http("GET", path).status for path in ("/livez", "/readyz", "/healthz")] == [
        200
    ] * 3


def test_a_refusal_for_want_of_a_token_says_so(guarded):
    answer = guarded.http("GET", "/version")
    found = json.loads(answer.body)
    assert found["kind"] == "unauthenticated" and found["hint"]
    assert answer.getheader("www-authenticate", "").startswith("Bearer")
    assert b"s3cret" not in answer.body


def test_the_token_is_never_written_to_the_log(guarded):
    guarded.http("GET", "/version", headers={"Authorization": "Bearer s3cret-token"})
    assert "s3cret" not in "".join(guarded.stderr)


def test_metrics_and_version_need_the_token(guarded):
    assert guarded.http("GET", "/metrics").status == 401
