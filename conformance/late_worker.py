"""A worker that answers its first call when it is told so, however late that is.

Over `parlour.v1`: says on standard output what it got, waits for a line on standard input, and answers
over its own socket, or over another if that was cut. Then it says whether the host called it stale.
"""

from __future__ import annotations

import asyncio
import sys

from websockets.exceptions import ConnectionClosed

from parlour_v1 import Channel, Field, Kind, Session, frame


def say(text):
    print(text, flush=True)


async def main(url, agent_type):
    session = Session()
    channel = await Channel.open(url, session=session)
    await channel.register(agent_type)
    say("registered")
    call = await channel.next(Kind.CALL, 60)
    name, attempt = call.get(Field.DELIVERY), call.get(Field.ATTEMPT)
    say(f"has {name} {attempt}")
    await asyncio.to_thread(sys.stdin.readline)
    answer = frame(Kind.REPLY, b"late", id=call.id, delivery=name, attempt=attempt)
    try:
        await channel.send(answer)
        await channel.request(Kind.PUBLISH, topic_type="done", source=agent_type, timeout=5)
    except (ConnectionClosed, AssertionError):
        channel = await Channel.open(url, session=session)
        assert not channel.welcome.get(Field.RESUMED), "the session outlived its lease"
        await channel.send(answer)
        await channel.request(Kind.PUBLISH, topic_type="done", source=agent_type)
    stale = [it for it in channel.inbox if it.kind == Kind.STALE]
    for it in stale:
        say(f"stale {it.get(Field.DELIVERY)} {it.get(Field.ATTEMPT)}")
    if not stale:
        say("nothing")
    await asyncio.to_thread(sys.stdin.readline)


asyncio.run(main(*sys.argv[1:]))
