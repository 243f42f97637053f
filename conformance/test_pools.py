"""Several workers of one agent type: which keys each has, and when a key moves."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

from parlour_v1 import Channel, Field, Kind, frame
from room import BINARY, eventually

MASK = (1 << 64) - 1


def fnv1a(text: str) -> int:
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 & MASK
    return value


def mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def home(key: str, capacities: dict[int, int]) -> int:
    """The number of the worker that a key belongs to, as `docs/protocol.md` has it."""

    def score(worker: int) -> float:
        value = max(mix(fnv1a(key) ^ mix(worker)), 1)
        return capacities[worker] / -math.log2(value / 2**64)

    return max(capacities, key=score)


async def test_keys_spread_by_capacity_as_the_document_says(room):
    workers = []
    async with await Channel.open(room.url, name="caller") as caller:
        for index, capacity in enumerate((1, 2, 5)):
            worker = await Channel.open(room.url, name=f"spread {index}")
            done = await worker.register("spread", capacity=capacity)
            assert done.kind == Kind.DONE, done
            workers.append(worker)
        ids = {w["name"]: w["id"] for w in room.get("/v1/workers")["workers"]}
        ids = [ids[f"spread {index}"] for index in range(3)]
        capacities = dict(zip(ids, (1, 2, 5), strict=True))

        async def serve(worker, number):
            while True:
                call = await worker.next(Kind.CALL, timeout=60)
                await worker.reply(call, str(number).encode())

        served = [asyncio.create_task(serve(*pair)) for pair in zip(workers, ids, strict=True)]
        keys = [f"key {n}" for n in range(300)]
        replies = [await caller.call(f"spread/{key}") for key in keys]
        for task in served:
            task.cancel()
        where = [int(reply.payload) for reply in replies]
        assert where == [home(key, capacities) for key in keys]
        # Of 300 keys an eighth, a quarter and five eighths, within five standard deviations.
        for number, capacity in capacities.items():
            share = capacity / 8
            slack = 5 * math.sqrt(300 * share * (1 - share))
            assert abs(where.count(number) - 300 * share) <= slack, (capacity, where.count(number))
        for worker in workers:
            await worker.close()


async def test_a_worker_of_no_capacity_counts_as_one(room):
    async with await Channel.open(room.url, name="modest") as worker:
        assert (await worker.register("modest", capacity=0)).kind == Kind.DONE
        seen = [w for w in room.get("/v1/workers")["workers"] if w["name"] == "modest"]
        assert seen[0]["capacity"] == {"modest": 1}


async def test_a_client_that_says_leave_breaks_the_protocol(room):
    channel = await Channel.open(room.url)
    await channel.send(frame(Kind.LEAVE))
    fault = await channel.next(Kind.FAULT)
    assert (fault.id, fault.get(Field.FAULT_KIND)) == (0, "invalid")
    assert await channel.closed() == 1002


async def test_a_worker_that_is_drained_again_and_again_is_told_once(room):
    async with await Channel.open(room.url, name="insisted") as worker:
        await worker.register("insisted")
        for _ in range(5):
            assert room.http("POST", "/v1/workers/insisted/drain").status == 202
        await worker.next(Kind.LEAVE)
        await worker.send(frame(Kind.PING, id=1))
        await worker.next(Kind.PONG)
        assert worker.inbox == []


class Pool:
    """Workers in processes of their own, whose agents say which worker they are when the gate opens."""

    def __init__(self, room, path):
        self.room, self.gate = room, path / "gate"
        self.callers = ThreadPoolExecutor(32)
        self.processes = []
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("PARLOUR_")}
        self.env |= {"PARLOUR_URL": room.url, "GATE": str(self.gate)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.gate.touch()
        for process in self.processes:
            process.kill()
            process.wait()
            process.stderr.close()
        self.callers.shutdown()

    def worker(self, name, capacity):
        script = f'until [ -e "$GATE" ]; do sleep 0.02; done; echo {name}'
        process = subprocess.Popen(
            [BINARY, "worker", "slow", "--name", name, "--capacity", str(capacity)]
            + ["--", "sh", "-c", script],
            env=self.env,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        assert "serving slow" in process.stderr.readline()
        return process

    def call(self, key):
        """Begins a call, whose result is the name of the worker that answered."""

        def call():
            answer = self.room.http("POST", f"/v1/agents/slow/{key}/call", b"", timeout=60)
            assert answer.status == 200, (answer.status, answer.body)
            return answer.body.decode().strip()

        return self.callers.submit(call)

    def parlour(self, *args):
        return subprocess.run(
            [BINARY, *args], env=self.env, capture_output=True, text=True, timeout=30, check=False
        )

    def seen(self, name):
        """What the host says of a worker; nothing once it has left."""
        workers = self.room.get("/v1/workers")["workers"]
        return next((worker for worker in workers if worker["name"] == name), None)

    def running(self, name, calls):
        eventually(lambda: self.seen(name)["in_flight"] == calls, what=f"{calls} calls at {name}")


def test_a_pool_grows_and_shrinks_under_load_and_keys_move_between_two_calls(start_room, tmp_path):
    room = start_room()
    with Pool(room, tmp_path) as pool:
        first = pool.worker("one", 1)
        keys = [f"k{n}" for n in range(8)]
        running = [pool.call(key) for key in keys]
        pool.running("one", 8)

        # One joins that most keys belong to: what is busy stays, what is idle goes there.
        pool.worker("two", 3)
        running += [pool.call(key) for key in keys]
        pool.running("one", 16)
        assert (pool.seen("one")["keys"], pool.seen("two")["keys"]) == (8, 0)
        pool.gate.touch()
        assert [call.result() for call in running] == ["one"] * 16
        now = {key: pool.call(key).result() for key in keys + [f"more-{n}" for n in range(24)]}
        assert {"one", "two"} == set(now.values()), now
        busy = next(key for key, name in now.items() if name == "one")

        # It drains: what it has ends, what comes for the same key waits, and all else goes elsewhere.
        pool.gate.unlink()
        running = pool.call(busy)
        pool.running("one", 1)
        drained = pool.parlour("workers", "drain", "one")
        assert drained.returncode == 0, drained.stderr
        assert "drains, with 1 call in flight" in drained.stdout
        waiting = pool.call(busy)
        eventually(lambda: room.metric("parlour_moving") == 1, what="a call waits for its agent")
        assert pool.seen("one")["draining"]
        assert "draining" in pool.parlour("workers").stdout
        assert pool.seen("two")["in_flight"] == 0
        pool.gate.touch()
        assert (running.result(), waiting.result()) == ("one", "two")
        assert first.wait(timeout=30) == 0
        eventually(lambda: pool.seen("one") is None, what="the drained worker has left")
        assert {pool.call(key).result() for key in now} == {"two"}
        assert room.metric("parlour_moving") == 0

        again = pool.parlour("workers", "drain", "one")
        assert again.returncode == 3, again.stderr
        assert "`parlour workers` lists names and numbers" in again.stderr


def test_draining_is_for_whoever_has_the_token(start_room, tmp_path):
    token = tmp_path / "token"
    token.write_text("secret\n")
    room = start_room("--token-file", str(token))
    path = "/v1/workers/1/drain"
    assert room.http("POST", path).status == 401
    shown = {"authorization": "Bearer secret"}
    assert room.http("POST", path, headers=shown | {"origin": "http://evil.example"}).status == 403
    assert room.http("POST", path, headers=shown | {"host": "evil.example"}).status == 403
    assert room.http("POST", path, headers=shown).status == 404
    assert room.http("GET", path, headers=shown).status == 405
