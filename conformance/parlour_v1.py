"""`parlour.v1` in Python: the codec, and a channel for tests to speak it frame by frame.

A frame is its kind (one byte), the length of its header, the header, the length of its payload, the
payload; lengths are varints. A header is a row of fields, each a varint of `number << 3 | type` and a
value: type 0 is a varint, type 2 a length and as many bytes. A WebSocket message holds one or more
frames.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from enum import IntEnum

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed


class Kind(IntEnum):
    HELLO = 1
    WELCOME = 2
    REGISTER = 3
    UNREGISTER = 4
    SUBSCRIBE = 5
    UNSUBSCRIBE = 6
    DONE = 7
    CALL = 8
    REPLY = 9
    FAULT = 10
    PUBLISH = 11
    EVENT = 12
    CANCEL = 13
    PING = 14
    PONG = 15
    DRAIN = 16
    ACK = 17
    PROGRESS = 18
    LEAVE = 19
    RECEIVED = 20
    SEND = 21
    ACCEPTED = 22
    WAIT = 23
    DELIVERY = 24
    CANCEL_DELIVERY = 25
    STALE = 26


# What belongs to a socket; all else is the session's, and counted.
OF_SOCKET = (Kind.HELLO, Kind.WELCOME, Kind.PING, Kind.PONG, Kind.ACK)


class Field(IntEnum):
    ID = 1
    AGENT_TYPE = 2
    KEY = 3
    TOPIC_TYPE = 4
    SOURCE = 5
    CONTENT_TYPE = 6
    DATA_TYPE = 7
    METADATA = 8
    TIMEOUT_MS = 9
    MESSAGE_ID = 10
    CONVERSATION = 11
    CAUSE = 12
    SENDER_TYPE = 13
    SENDER_KEY = 14
    PRINCIPAL = 15
    TRACEPARENT = 16
    HOPS = 17
    IDEMPOTENCY_KEY = 18
    FAULT_KIND = 19
    DETAIL = 20
    HINT = 21
    MAY_HAVE_RUN = 22
    RETRY_AFTER_MS = 23
    CONFIG_KEY = 24
    LIMIT = 25
    EXCLUSIVE = 26
    CAPABILITY = 27
    TOPIC_PREFIX = 28
    SUBSCRIPTION = 29
    RECIPIENTS = 30
    DROPPED = 31
    VERSION = 32
    FEATURE = 33
    NAME = 34
    MAX_PAYLOAD = 35
    HEARTBEAT_MS = 36
    CAPACITY = 37
    RECEIVED = 38
    SESSION = 39
    RESUMED = 40
    GRACE_MS = 41
    WINDOW_MESSAGES = 42
    WINDOW_BYTES = 43
    RESENT = 44
    PROGRESS = 45
    DELIVERY = 46
    ATTEMPT = 47
    DELAY_MS = 48
    DELIVER_AT = 49
    TTL_MS = 50
    MAX_ATTEMPTS = 51
    ACK = 52
    GENERATION = 53
    KNOWN = 54
    STATE = 55
    LEVEL = 56
    DETAILS = 57


@dataclass
class Frame:
    """One frame: its kind, its fields in order (numbers, or bytes), its payload."""

    kind: int
    fields: list[tuple[int, int | bytes]] = field(default_factory=list)
    payload: bytes = b""
    size: int = field(default=0, compare=False)
    """How many bytes it had on the wire."""

    def all(self, number: Field) -> list[int | str]:
        """Every value of a field; bytes as the text they are."""
        values = (value for known, value in self.fields if known == number)
        return [v if isinstance(v, int) else v.decode() for v in values]

    def get(self, number: Field, default=None):
        """The last value of a field."""
        return (self.all(number) or [default])[-1]

    @property
    def id(self) -> int | None:
        return self.get(Field.ID)

    @property
    def fault(self) -> str | None:
        """The kind of fault, if this is one."""
        return self.get(Field.FAULT_KIND, "internal") if self.kind == Kind.FAULT else None

    @property
    def metadata(self) -> dict[str, str]:
        entries = {}
        for number, value in self.fields:
            if number == Field.METADATA:
                entry = dict(read_fields(value))
                entries[entry[1].decode()] = entry.get(2, b"").decode()
        return entries

    def __repr__(self) -> str:
        names = {int(f): f.name.lower() for f in Field}
        fields = ", ".join(f"{names.get(n, n)}={v!r}" for n, v in self.fields)
        kind = Kind(self.kind).name if self.kind in set(Kind) else self.kind
        return f"<{kind} {fields} +{len(self.payload)} bytes>"


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def frame(kind: int, payload: bytes = b"", **fields) -> bytes:
    """The bytes of a frame. Fields go by their names in lower case.

    Numbers are written as varints, texts and bytes with their length, lists as repeated fields, a
    mapping as entries of metadata; `None` is left out.
    """
    header = b"".join(write_field(Field[name.upper()], value) for name, value in fields.items())
    return raw_frame(kind, header, payload)


def raw_frame(kind: int, header: bytes, payload: bytes = b"") -> bytes:
    return bytes([kind]) + varint(len(header)) + header + varint(len(payload)) + payload


def write_field(number: int, value) -> bytes:
    if value is None:
        return b""
    if isinstance(value, int):
        return varint(number << 3) + varint(int(value))
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, dict):
        value = [write_field(1, name) + write_field(2, text) for name, text in value.items()]
    return b"".join(write_field(number, one) for one in value)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def read_fields(header: bytes):
    at = 0
    while at < len(header):
        tag, at = read_varint(header, at)
        if tag & 7 == 0:
            value, at = read_varint(header, at)
        elif tag & 7 == 2:
            length, at = read_varint(header, at)
            value, at = header[at : at + length], at + length
        else:
            at += {1: 8, 5: 4}[tag & 7]
            continue
        yield tag >> 3, value


def decode(message: bytes) -> list[Frame]:
    """The frames of a message."""
    frames, at = [], 0
    while at < len(message):
        begin, kind = at, message[at]
        length, at = read_varint(message, at + 1)
        header, at = message[at : at + length], at + length
        length, at = read_varint(message, at)
        payload, at = message[at : at + length], at + length
        assert len(payload) == length, "the message ends in the middle of a frame"
        frames.append(Frame(kind, list(read_fields(header)), payload, at - begin))
    return frames


@dataclass
class Session:
    """What of a session outlives a socket."""

    name: str | None = None
    received: int = 0
    acknowledged: int = 0
    said: int = 0
    """How many of those that were received the host knows of."""
    unsaid_bytes: int = 0
    window: int = 0
    window_bytes: int = 0
    kept: list[bytes] = field(default_factory=list)
    """Frames that were sent and not acknowledged."""

    def sent(self, frames):
        self.kept += [one for one in frames if one[0] not in OF_SOCKET]

    def came(self, one: Frame):
        if one.kind not in OF_SOCKET:
            self.received += 1
            self.unsaid_bytes += one.size

    def is_due(self) -> bool:
        """Whether a quarter of the window came."""
        return (
            self.received - self.said > self.window // 4
            or self.unsaid_bytes >= self.window_bytes // 4
        )

    def acknowledge(self, received: int):
        del self.kept[: received - self.acknowledged]
        self.acknowledged = received

    def again(self, received: int) -> list[bytes]:
        """What the host lacks, calls marked as such."""
        self.acknowledge(received)
        return [resent(one) if one[0] == Kind.CALL else one for one in self.kept]


def resent(call: bytes) -> bytes:
    length, at = read_varint(call, 1)
    header, rest = call[at : at + length], call[at + length :]
    header += write_field(Field.RESENT, 1)
    return bytes([Kind.CALL]) + varint(len(header)) + header + rest


class Channel:
    """One connection. Frames that nobody asked for yet wait in `inbox`; pings are answered."""

    def __init__(self, websocket, session: Session | None = None):
        self.websocket = websocket
        self.session = session
        self.acks = True
        self.inbox: list[Frame] = []
        self.pings = 0
        self._next_id = 0
        self._news = asyncio.Event()
        self._ended = False
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        name="conformance",
        versions=(1,),
        hello=True,
        headers=None,
        session: Session | None = None,
        **fields,
    ):
        """Connects and, unless told otherwise, shakes hands: with a session, to begin or resume it."""
        websocket = await connect(
            url.replace("http", "ws", 1) + "/open_channel",
            subprotocols=["parlour.v1"],
            additional_headers=headers,
            compression=None,
            max_size=None,
            ping_interval=None,
            proxy=None,
        )
        channel = cls(websocket, session)
        if hello:
            if session is not None:
                fields |= {"feature": ["resume"], "session": session.name}
                fields |= {"received": session.received}
            await channel.send(frame(Kind.HELLO, name=name, version=list(versions), **fields))
            channel.welcome = await channel.next(Kind.WELCOME)
        if hello and session is not None and channel.welcome.get(Field.RESUMED):
            again = session.again(channel.welcome.get(Field.RECEIVED, 0))
            if again:
                await websocket.send(b"".join(again))
        return channel

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.close()

    async def close(self):
        await self.websocket.close()
        await self._reader

    def kill(self):
        """Ends the connection as a crash would: without a word."""
        self.websocket.transport.abort()

    async def _read(self):
        try:
            async for message in self.websocket:
                for received in decode(message):
                    if received.kind == Kind.WELCOME and not received.get(Field.RESUMED):
                        # What comes behind it in the same message counts for the new session.
                        self.restart(received)
                    if self.session is not None:
                        self.session.came(received)
                    if received.kind == Kind.PING:
                        self.pings += 1
                        await self.send(frame(Kind.PONG, id=received.id))
                        await self.acknowledge()
                    elif received.kind == Kind.ACK:
                        self.session.acknowledge(received.get(Field.RECEIVED, 0))
                    else:
                        self.inbox.append(received)
                        await self.acknowledge(due=True)
                self._news.set()
        except ConnectionClosed:
            pass
        finally:
            self._ended = True
            self._news.set()

    def restart(self, welcome: Frame):
        """Begins a session anew: nothing of an earlier one counts."""
        if self.session is not None:
            begun = Session(
                name=welcome.get(Field.SESSION),
                window=welcome.get(Field.WINDOW_MESSAGES, 0),
                window_bytes=welcome.get(Field.WINDOW_BYTES, 0),
            )
            self.session.__dict__.update(begun.__dict__)

    async def acknowledge(self, due=False):
        """Says how many frames came, unless that is not `due` or left to the test."""
        session = self.session
        if session is None or not self.acks:
            return
        if not due or session.is_due():
            session.said, session.unsaid_bytes = session.received, 0
            await self.websocket.send(frame(Kind.ACK, received=session.received))

    async def send(self, *frames: bytes):
        """Sends these frames in one message."""
        if self.session is not None:
            self.session.sent(frames)
        await self.websocket.send(b"".join(frames))

    def number(self) -> int:
        """A number for a call or request, never used before."""
        self._next_id += 1
        return self._next_id

    async def take(self, wanted, timeout=10.0) -> Frame:
        """The first frame for which `wanted` holds, once it is there."""

        async def search():
            while True:
                self._news.clear()
                for at, candidate in enumerate(self.inbox):
                    if wanted(candidate):
                        return self.inbox.pop(at)
                if self._ended:
                    raise AssertionError(
                        f"closed with {self.websocket.close_code}; never came; had {self.inbox}"
                    )
                await self._news.wait()

        try:
            return await asyncio.wait_for(search(), timeout)
        except asyncio.TimeoutError:
            raise AssertionError(f"nothing came within {timeout} s; had {self.inbox}") from None

    async def next(self, kind: Kind, timeout=10.0) -> Frame:
        return await self.take(lambda f: f.kind == kind, timeout)

    async def answer(self, number: int, timeout=10.0) -> Frame:
        """How the call or request of this number ended."""
        ends = (Kind.DONE, Kind.REPLY, Kind.FAULT, Kind.ACCEPTED, Kind.DELIVERY)
        return await self.take(lambda f: f.kind in ends and f.id == number, timeout)

    async def request(self, kind: Kind, payload=b"", timeout=10.0, **fields) -> Frame:
        """Sends a frame with a number of its own and waits for the answer."""
        number = self.number()
        await self.send(frame(kind, payload, id=number, **fields))
        return await self.answer(number, timeout)

    async def register(self, agent_type: str, **fields) -> Frame:
        return await self.request(Kind.REGISTER, agent_type=agent_type, **fields)

    async def subscribe(self, subscription: int, **fields) -> Frame:
        return await self.request(Kind.SUBSCRIBE, subscription=subscription, **fields)

    async def publish(self, topic: str, payload=b"", **fields) -> Frame:
        topic_type, source = topic.split("/", 1)
        return await self.request(
            Kind.PUBLISH, payload, topic_type=topic_type, source=source, **fields
        )

    async def call(self, agent: str, payload=b"", timeout=10.0, **fields) -> Frame:
        agent_type, key = agent.split("/", 1)
        return await self.request(
            Kind.CALL, payload, timeout, agent_type=agent_type, key=key, **fields
        )

    async def begin_call(self, agent: str, payload=b"", **fields) -> int:
        """Sends a call and does not wait for it."""
        number = self.number()
        agent_type, key = agent.split("/", 1)
        await self.send(
            frame(Kind.CALL, payload, id=number, agent_type=agent_type, key=key, **fields)
        )
        return number

    async def send_durably(self, agent: str, payload=b"", timeout=10.0, **fields) -> Frame:
        """Has a message accepted that the host keeps until it is delivered."""
        agent_type, key = agent.split("/", 1)
        return await self.request(
            Kind.SEND, payload, timeout, agent_type=agent_type, key=key, **fields
        )

    async def wait(self, delivery: str, timeout=20.0, **fields) -> Frame:
        """What is known of a delivery, when that is newer than `generation` or `timeout_ms` is over."""
        return await self.request(Kind.WAIT, timeout=timeout, delivery=delivery, **fields)

    async def reply(self, call: Frame, payload=b"", **fields):
        await self.send(frame(Kind.REPLY, payload, id=call.id, **fields))

    async def closed(self, timeout=10.0) -> int | None:
        """Waits for the end of the connection and returns its close code."""
        await asyncio.wait_for(asyncio.shield(self._reader), timeout)
        await asyncio.wait_for(self.websocket.wait_closed(), timeout)
        return self.websocket.close_code


@contextlib.asynccontextmanager
async def pair(room, agent_type: str, **registration):
    """A caller, and a worker that serves this type."""
    async with await Channel.open(room.url) as caller, await Channel.open(room.url) as worker:
        done = await worker.register(agent_type, **registration)
        assert done.kind == Kind.DONE, done
        yield caller, worker
