#!/usr/bin/env python3
"""D1: the host is killed again and again under load, at any time, and nothing that it acknowledged is lost.

Publishers send over REST, with and without idempotency keys, to be delivered now, later, or not at all
after some time. Others publish durable events to topics that they have made subscriptions to: one in
strict order, one in any, one that comes and goes. Workers of `parlour.v1` fail, and die between the work
and its acknowledgement (S1); some messages are poison (S5). Operators give up, send back what is dead
(D17), and look at what they were told before. Everyone writes down what they do, and `history.py`
compares it with what the host says in the end. `test_durable.py` runs it in short, and its control.

    scripts/torture kill [--kills N] [--seed S]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

from websockets.exceptions import WebSocketException

from history import TERMS, End, Log, Report, check, read
from parlour_v1 import Channel, Field, Frame, Kind, frame
from room import Room, eventually

PUBLISHERS, EVENT_PUBLISHERS, WORKERS = 4, 2, 3
# Those that get events: in strict order, in any, and not always.
SUBSCRIBERS = ("line", "reader", "guest")
AGENTS = ("echo", "poison", *SUBSCRIBERS)
# What an event became for a subscription is known by its runs: one that is given up before the first, as its workers were
# killed ten times while it waited in them, could not be told from one that nobody sent.
SETTINGS = {
    "timeouts__grace": "1ms",
    "durable__backoff_base": "5ms",
    "durable__backoff_cap": "100ms",
    "durable__max_lost": "1000",
}
# How long a host lives, in seconds.
LIVES = (0.005, 0.8)


class Gone(Exception):
    """The host did not answer."""


class NotReached(Gone):
    """It cannot have had the request either."""


class Client:
    """A connection to whichever host runs, kept open."""

    def __init__(self, storm):
        self.storm, self.room, self.connection = storm, None, None

    def ask(self, method, path, body=None, headers=None) -> tuple[int, bytes]:
        room = self.storm.room
        if room is None:
            raise NotReached
        if self.room is not room:
            self.close()
            self.room = room
            self.connection = http.client.HTTPConnection(*room.address, timeout=30)
        self.storm.asking += 1
        try:
            self.connection.request(method, path, body, headers or {})
            answer = self.connection.getresponse()
            return answer.status, answer.read()
        except ConnectionRefusedError:
            self.close()
            raise NotReached from None
        except (OSError, http.client.HTTPException):
            self.close()
            raise Gone from None
        finally:
            self.storm.asking -= 1

    def json(self, path) -> dict | None:
        status, body = self.ask("GET", path)
        return json.loads(body) if status == 200 else None

    def close(self):
        if self.connection is not None:
            self.connection.close()
        self.room = None


class Storm:
    """Hosts one after the other on one data directory, and everyone around them."""

    def __init__(self, directory: Path, seed: int, data: Path | None, **settings):
        self.directory, self.seed, self.data = directory, seed, data
        self.settings = SETTINGS | settings
        self.room: Room | None = None
        self.asking = 0
        """Requests that wait for their answers."""
        self.struck = 0
        """How often the host ended while there were some."""
        self.missed: Counter = Counter()
        """How often in a row a strike waited for a call that was not made."""
        self.lives = random.Random(f"{seed} lives")
        self.is_calm, self.is_over = threading.Event(), threading.Event()
        self.known: list[str] = []
        self.logs: dict[str, list[Path]] = {"publishers": [], "workers": []}

    def log(self, who: str, number) -> Log:
        path = self.directory / f"{who}-{number}"
        self.logs[who].append(path)
        return Log(path)

    def run(self, strikes, tell=lambda _: None) -> Report:
        """Lets each of `strikes` start a host and end it, and returns what the check of all that
        happened finds."""
        threads = [threading.Thread(target=Publisher(self, it).run) for it in range(PUBLISHERS)]
        threads += [threading.Thread(target=EventPublisher(self, it).run) for it in range(EVENT_PUBLISHERS)]
        threads += [threading.Thread(target=act(self).run) for act in (Operator, Reader)]
        working = threading.Thread(target=lambda: asyncio.run(self.work()))
        for thread in [*threads, working]:
            thread.start()
        try:
            for number, strike in enumerate(strikes):
                strike(self)
                self.room = None
                tell(number + 1)
            self.is_calm.set()
            self.room = self.start()
            for thread in threads:
                thread.join()
            end = self.end()
        finally:
            self.is_calm.set()
            self.is_over.set()
            if self.room is not None:
                self.room.kill()
            self.room = None
            for thread in [*threads, working]:
                thread.join()
        return check(read(*self.logs["publishers"]), read(*self.logs["workers"]), end)

    def start(self, under=()) -> Room:
        """A host, for everyone to use."""
        self.room = Room(data=self.data, under=under, **self.settings)
        return self.room

    def live(self):
        """Lets the host go on for any time: not to wait for anything, but as what comes comes at any
        time. That is from its start on, when it still reads its logs, or from when it acknowledges."""
        assert self.room is not None
        known = len(self.known)
        if self.lives.random() < 0.7:
            eventually(lambda: len(self.known) > known, timeout=30, what="an acknowledgement")
        time.sleep(self.lives.uniform(*LIVES))
        assert self.room.process.poll() is None, "it ended by itself:\n" + "".join(self.room.stderr)
        self.struck += self.asking > 0

    async def work(self):
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(WORKERS))
        await asyncio.gather(*(Worker(self, number).run() for number in range(WORKERS)))

    def end(self) -> End:
        """What the host says once everything has ended."""
        room = self.room
        assert room is not None

        def is_done():
            standing = sum(room.metric(f"parlour_deliveries_{it}") for it in ("waiting", "in_flight", "owed"))
            return room.http("GET", "/readyz").status == 200 and not standing

        with contextlib.suppress(AssertionError):
            eventually(is_done, timeout=60)
        end = End()
        names = {entry["id"] for paths in self.logs.values() for entry in read(*paths) if "id" in entry}
        clients = threading.local()

        def ask(name):
            if not hasattr(clients, "own"):
                clients.own = Client(self)
            found = clients.own.json(f"/v1/deliveries/{name}")
            if found is not None and found["state"] == "completed":
                status, body = clients.own.ask("GET", f"/v1/deliveries/{name}/reply")
                found["reply"] = body.decode() if status == 200 else None
            return name, found

        with ThreadPoolExecutor(4) as pool:
            end.deliveries = {name: found for name, found in pool.map(ask, sorted(names)) if found}
        client, after = Client(self), {}
        while after is not None:
            page = client.json("/v1/dead-letters?" + urlencode({"limit": 1000, **after}))
            end.dead_letters += [letter["id"] for letter in page["dead_letters"]]
            after = {"after": page["next"]} if page["next"] else None
        listed = client.json("/v1/subscriptions")["subscriptions"]
        end.subscriptions = {it["id"]: it["lag"] for it in listed if it["durable"]}
        metric = "parlour_deliveries_"
        totals = ("accepted", *TERMS[:4])
        end.terms = {term: int(room.metric(f"{metric}{term}_total")) for term in totals}
        end.terms |= {term: int(room.metric(f"{metric}{term}")) for term in TERMS[4:]}
        return end


class Publisher:
    """Sends messages, each with a token of its own, and writes down what it is answered."""

    def __init__(self, storm: Storm, number, who="publisher"):
        self.storm, self.number = storm, number
        self.random = random.Random(f"{storm.seed} {who} {number}")
        self.log, self.client = storm.log("publishers", f"{who}-{number}"), Client(storm)
        self.seq = 0
        self.keyed: list[tuple[str, str, dict]] = []

    def run(self):
        while not self.storm.is_calm.is_set():
            if self.storm.room is None:
                time.sleep(0.001)
            elif self.keyed and self.random.random() < 0.1:
                self.again(*self.random.choice(self.keyed[-100:]))
            else:
                self.act()
        self.log.close()

    def act(self):
        self.seq += 1
        token, now = f"{self.number}-{self.seq}", int(1000 * time.time())
        agent, headers, fields = f"echo/{self.number}-{self.random.randrange(7)}", {}, {}
        match self.random.random():
            case chance if chance < 0.1:
                agent = agent.replace("echo", "poison")
                headers["parlour-max-attempts"] = "2"
            case chance if chance < 0.2:
                delay = self.random.randrange(2000)
                headers["parlour-delay-ms"], fields["not_before"] = str(delay), now + delay
            case chance if chance < 0.3:
                ttl = self.random.randrange(1, 500)
                headers["parlour-ttl-ms"], fields["expires_at"] = str(ttl), now + ttl
        self.log.write("try", token=token, agent=agent, seq=self.seq, **fields)
        self.send(token, f"/v1/agents/{agent}/deliveries", headers)

    def send(self, token, path, headers):
        """Sends what was written down. Under a key it is sent until it is answered."""
        if has_key := self.random.random() < 0.5:
            headers["idempotency-key"] = f"key {token}"
        while not self.post(token, path, headers, token):
            if not has_key or self.storm.is_over.is_set():
                self.log.write("unknown", token=token)
                return
            time.sleep(0.002)
        if has_key:
            self.keyed.append((token, path, headers))

    def again(self, token, path, headers):
        """The same once more, or another body under the same key."""
        body = token if self.random.random() < 0.7 else f"not {token}"
        self.post(token, path, headers, body)

    def post(self, token, path, headers, body) -> bool:
        """Whether it was answered."""
        try:
            status, answer = self.client.ask("POST", path, body.encode(), headers)
        except NotReached:
            if "idempotency-key" not in headers:
                self.log.write("refused", token=token, status=0)
                return True
            return False
        except Gone:
            return False
        if status >= 500:
            return False
        if body != token:
            self.log.write("other", token=token, status=status)
        elif status == 202:
            self.accepted(token, json.loads(answer))
        else:
            self.log.write("refused", token=token, status=status)
        return True

    def accepted(self, token, answer):
        self.log.write("acked", token=token, id=answer["id"])
        self.storm.known.append(answer["id"])


class EventPublisher(Publisher):
    """Publishes durable events to a topic of its own, whose subscriptions it makes and removes."""

    def __init__(self, storm: Storm, number: int):
        super().__init__(storm, f"e{number}", "events")
        self.topic = f"tick.{number}"
        self.has_guest = False

    def run(self):
        for agent_type in SUBSCRIBERS[:2]:
            self.subscribe(agent_type)
        super().run()

    def act(self):
        if self.random.random() < 0.05:
            if self.has_guest:
                self.unsubscribe(SUBSCRIBERS[2])
            else:
                self.subscribe(SUBSCRIBERS[2])
            self.has_guest = not self.has_guest
        self.seq += 1
        token, source = f"{self.number}-{self.seq}", f"{self.number}-{self.random.randrange(5)}"
        self.log.write("try", token=token, topic=self.topic, source=source, seq=self.seq)
        headers = {"parlour-ack": "durable", "content-type": "text/plain"}
        self.send(token, f"/v1/topics/{self.topic}/{source}", headers)

    def accepted(self, token, answer):
        self.log.write("acked", token=token, event=answer["id"], recipients=answer["recipients"])

    def subscribe(self, agent_type):
        strict = agent_type == SUBSCRIBERS[0]
        wanted = {"topic_type": self.topic, "agent_type": agent_type, "order": "strict" if strict else "relaxed"}
        name = self.change("PUT", agent_type, json.dumps(wanted), (200, 201))
        self.log.write("subscribe", name=name, topic=self.topic, agent_type=agent_type, strict=strict)

    def unsubscribe(self, agent_type):
        # It is gone also if the answer to that was lost.
        name = self.change("DELETE", agent_type, None, (200, 404))
        self.log.write("unsubscribe", name=name)

    def change(self, method, agent_type, body, done) -> str:
        """Asks for it until it is so."""
        name = f"{self.topic}.{agent_type}"
        while not self.storm.is_over.is_set():
            with contextlib.suppress(Gone):
                status, answer = self.client.ask(method, f"/v1/subscriptions/{name}", body)
                if status in done:
                    break
                assert status >= 500, (status, answer)
            time.sleep(0.002)
        return name


class Operator:
    """Gives some up, and sends back or discards what is dead."""

    def __init__(self, storm: Storm):
        self.storm, self.client = storm, Client(storm)
        self.log = storm.log("publishers", "operator")
        self.random = random.Random(f"{storm.seed} operator")

    def run(self):
        while not self.storm.is_calm.is_set():
            with contextlib.suppress(Gone):
                self.act()
            time.sleep(0.005)
        self.log.close()

    def act(self):
        found = self.client.json("/v1/dead-letters?limit=20")
        for letter in found["dead_letters"] if found else ():
            what = self.random.choice(["redrive", "redrive", "discard"])
            self.log.write(what, id=letter["id"])
            self.client.ask("POST", f"/v1/dead-letters/{letter['id']}/{what}")
        if self.storm.known:
            name = self.random.choice(self.storm.known[-20:])
            self.log.write("cancel", id=name)
            self.client.ask("POST", f"/v1/deliveries/{name}/cancel")


class Reader:
    """Asks for what was acknowledged, and writes down what it is told."""

    def __init__(self, storm: Storm):
        self.storm, self.client = storm, Client(storm)
        self.log = storm.log("publishers", "reader")
        self.random = random.Random(f"{storm.seed} reader")

    def run(self):
        while not self.storm.is_calm.is_set():
            if self.storm.known:
                # Now and then one from long ago.
                recent = self.random.choice([20, 20, 20, 1000])
                with contextlib.suppress(Gone):
                    self.look(self.random.choice(self.storm.known[-recent:]))
            time.sleep(0.002)
        self.log.close()

    def look(self, name):
        status, body = self.client.ask("GET", f"/v1/deliveries/{name}")
        reply = None
        if status == 404:
            self.log.write("saw", id=name, state=None, generation=0, reply=None)
        elif status == 200:
            found = json.loads(body)
            if found["state"] == "completed":
                status, body = self.client.ask("GET", f"/v1/deliveries/{name}/reply")
                if status != 200:
                    return
                reply = body.decode()
            self.log.write("saw", id=name, state=found["state"], generation=found["generation"], reply=reply)


class Worker:
    """A worker process, as far as the host can tell: it comes back under a new name whenever it dies."""

    def __init__(self, storm: Storm, number: int):
        self.storm, self.number = storm, number
        self.random = random.Random(f"{storm.seed} worker {number}")
        self.log = storm.log("workers", number)
        self.born = 0

    async def run(self):
        while not self.storm.is_over.is_set():
            if (room := self.storm.room) is None:
                await asyncio.sleep(0.001)
                continue
            self.born += 1
            # The end of the host, or its own.
            with contextlib.suppress(AssertionError, OSError, EOFError, WebSocketException):
                await self.live(await Channel.open(room.url, name=f"w{self.number}.{self.born}"))
        self.log.close()

    async def live(self, channel: Channel):
        replies = set()
        try:
            for agent_type in AGENTS:
                await channel.register(agent_type)
            while not self.storm.is_over.is_set():
                call = await channel.next(Kind.CALL, 3600)
                self.log.write(
                    "run", id=call.get(Field.DELIVERY), attempt=call.get(Field.ATTEMPT),
                    agent=f"{call.get(Field.AGENT_TYPE)}/{call.get(Field.KEY)}",
                    token=call.payload.decode(), worker=f"{self.number}.{self.born}",
                    at=int(1000 * time.time()),
                )  # fmt: skip
                if self.random.random() < 0.01 and not self.storm.is_calm.is_set():
                    return
                replies.add(task := asyncio.create_task(self.answer(channel, call)))
                task.add_done_callback(replies.discard)
        finally:
            for task in replies:
                task.cancel()
            channel.kill()

    async def answer(self, channel: Channel, call: Frame):
        fails = 0.8 if call.get(Field.AGENT_TYPE) == "poison" else 0.02
        with contextlib.suppress(OSError, WebSocketException):
            if self.random.random() < 0.3:
                await channel.send(frame(Kind.RECEIVED, id=call.id))
                await asyncio.sleep(self.random.uniform(0, 0.03))
            if self.random.random() < fails:
                fault = {"fault_kind": "agent_failed", "detail": "no luck", "may_have_run": True}
                await channel.send(frame(Kind.FAULT, id=call.id, **fault))
            else:
                await channel.reply(call, call.payload)


def killed(storm: Storm):
    """SIGKILL at any time."""
    room = storm.start()
    storm.live()
    room.kill()
    assert room.process.returncode == -signal.SIGKILL


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        storm = Storm(Path(directory), options.seed, Path(directory) / "data")

        def tell(number):
            if number % 50 == 0:
                print(f"{number} kills, {len(storm.known)} acknowledged", flush=True)

        report = storm.run([killed] * options.kills, tell)
    print(
        f"kill: {options.kills} kills in {time.monotonic() - began:.0f} s, {storm.struck} of them with "
        f"requests under way: {report}"
    )
    if not report.is_clean() or not storm.struck:
        sys.exit("kill: FAILED")


if __name__ == "__main__":
    main()
