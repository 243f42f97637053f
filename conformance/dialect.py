"""The wire of `autogen-http-runtime` 0.1.0 by hand: for what its own client never does."""

from __future__ import annotations

import asyncio
import json
import uuid

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed


class Dialect:
    """One client of the dialect: an id, a way to `/rpc`, and a socket once it is opened."""

    def __init__(self, room, client_id: str | None = None):
        self.room = room
        self.client_id = client_id or str(uuid.uuid4())
        self.socket = None

    async def rpc(self, method: str, params=None, id="1") -> dict:
        """The answer object of one request."""
        return await asyncio.to_thread(self.room.rpc, method, params, client=self.client_id, id=id)

    async def register(self, agent_type: str) -> dict:
        return await self.rpc("runtime.register_agent", {"type": agent_type})

    async def call(self, agent: str, data="{}", **params) -> dict:
        agent_type, key = agent.split("/", 1)
        params = {
            "target": {"type": agent_type, "key": key},
            "source": None,
            "data_type": "Text",
            "data_content_type": "application/json",
            "data": data,
        } | params
        return await self.rpc("agent.call", params)

    async def publish(self, topic: str, data: str) -> dict:
        topic_type, source = topic.split("/", 1)
        params = {
            "topic": {"type": topic_type, "source": source},
            "sender": None,
            "data_type": "Text",
            "data_content_type": "application/json",
            "data": data,
            "id": str(uuid.uuid4()),
        }
        return await self.rpc("agent.publish", params, id=None)

    async def open(self, **options):
        url = self.room.url.replace("http", "ws", 1)
        self.socket = await connect(
            f"{url}/open_channel?client_id={self.client_id}",
            max_size=None,
            ping_interval=None,
            proxy=None,
            **options,
        )
        return self

    async def __aenter__(self):
        return await self.open()

    async def __aexit__(self, *_):
        await self.socket.close()

    async def send(self, **message):
        await self.socket.send(json.dumps(message))

    async def next(self, timeout=10.0) -> dict:
        """The next message; anything but a JSON object in a text frame is an error."""
        text = await asyncio.wait_for(self.socket.recv(), timeout)
        assert isinstance(text, str)
        return json.loads(text)

    async def silent(self, seconds=0.3) -> bool:
        """Whether nothing comes for a while."""
        try:
            await asyncio.wait_for(self.socket.recv(), seconds)
        except (asyncio.TimeoutError, ConnectionClosed):
            return True
        return False

    async def answer(self, request: dict, data="{}", **fields):
        """Answers a request as 0.1.0's worker does."""
        response = {
            "type": "response",
            "request_id": request["request_id"],
            "error": "",
            "data_type": "Text",
            "data_content_type": "application/json",
            "data": data,
            "original_sender": request.get("original_sender"),
        }
        await self.send(**{**response, **fields})
