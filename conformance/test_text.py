"""`parlour.v1+json`: the channel as a person types it."""

from __future__ import annotations

import asyncio
import json

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from parlour_v1 import Channel, Field, Kind, frame


class Typist:
    """One connection, on which frames are objects."""

    def __init__(self, socket):
        self.socket = socket

    @classmethod
    async def open(cls, room, **hello):
        url = room.url.replace("http", "ws", 1) + "/open_channel"
        socket = await connect(url, subprotocols=["parlour.v1+json"], proxy=None)
        typist = cls(socket)
        typist.welcome = await typist.say(kind="hello", name="typist", version=1, **hello)
        return typist

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.socket.close()

    async def say(self, **frame):
        await self.socket.send(json.dumps(frame))
        return await self.hear()

    async def hear(self):
        while True:
            message = await asyncio.wait_for(self.socket.recv(), 10)
            assert isinstance(message, str)
            heard = json.loads(message)
            if heard["kind"] not in ("ping", "ack"):
                return heard


async def test_a_call_between_a_typist_and_a_client_in_bytes(room):
    async with await Typist.open(room) as typist, await Channel.open(room.url) as worker:
        assert typist.socket.subprotocol == "parlour.v1+json"
        assert typist.welcome["kind"] == "welcome" and typist.welcome["version"] == 1
        await worker.register("bytes")
        call = {"kind": "call", "id": 7, "agent_type": "bytes", "key": "k", "metadata": {"a": "b"}}
        await typist.socket.send(json.dumps(call | {"payload": "grüß"}))
        asked = await worker.next(Kind.CALL)
        assert (asked.payload.decode(), asked.metadata) == ("grüß", {"a": "b"})
        await worker.reply(asked, b"\xff", metadata={"c": "d"})
        reply = await typist.hear()
        assert reply == {
            "kind": "reply", "id": 7, "payload_base64": "/w==", "metadata": {"c": "d"}
        }  # fmt: skip


async def test_a_typist_serves(room):
    async with await Typist.open(room) as typist, await Channel.open(room.url) as caller:
        done = await typist.say(kind="register", id=1, agent_type="typed", exclusive=True)
        assert done == {"kind": "done", "id": 1, "recipients": 0}
        number = await caller.begin_call("typed/k", b"{}", content_type="application/json")
        call = await typist.hear()
        assert (call["kind"], call["agent_type"], call["key"]) == ("call", "typed", "k")
        assert (call["payload"], call["content_type"]) == ("{}", "application/json")
        await typist.socket.send(
            json.dumps({"kind": "reply", "id": call["id"], "payload": {"ok": [1, 2]}})
        )
        assert json.loads((await caller.answer(number)).payload) == {"ok": [1, 2]}


async def test_a_fault_says_in_words_what_is_wrong(room):
    async with await Typist.open(room) as typist:
        fault = await typist.say(kind="call", id=1, agent_type="nobody", key="k")
        assert (fault["kind"], fault["fault_kind"]) == ("fault", "unknown_agent")
        assert fault["may_have_run"] is False and fault["hint"]


@pytest.mark.parametrize(
    "message, reason",
    [
        ("hello?", "expected"),
        ('{"kind":"helo"}', "helo"),
        ('{"kind":"ping","number":1}', "number"),
        ('{"kind":"ping","id":1,"id":1}', "twice"),
        ('{"kind":"reply","id":1,"payload":"a","payload_base64":"YQ=="}', "one payload"),
        ('{"kind":"call","id":1,"agent_type":"a"}', "CALL needs `key`"),
        ("[" * 1000, "nests"),
    ],
)
async def test_what_cannot_be_read_is_named_and_ends_the_channel(room, message, reason):
    typist = await Typist.open(room)
    await typist.socket.send(message)
    fault = await typist.hear()
    assert fault["fault_kind"] == "invalid" and reason in fault["detail"], fault
    with pytest.raises(ConnectionClosed):
        await typist.hear()
    assert typist.socket.close_code == 1002


async def test_bytes_are_refused(room):
    typist = await Typist.open(room)
    await typist.socket.send(b"{}")
    await typist.hear()
    with pytest.raises(ConnectionClosed):
        await typist.hear()
    assert typist.socket.close_code == 1003


async def test_a_session_goes_on_only_in_the_form_it_began_in(room):
    typist = await Typist.open(room, feature="resume")
    name = typist.welcome["session"]
    typist.socket.transport.abort()
    other = await Channel.open(room.url, hello=False)
    await other.send(frame(Kind.HELLO, name="x", version=1, feature="resume", session=name))
    assert not (await other.next(Kind.WELCOME)).get(Field.RESUMED)
    await other.close()
    async with await Typist.open(room, feature="resume", session=name) as typist:
        assert typist.welcome["resumed"] is True
