"""One bit of the database flips, anywhere: it is noticed, and nothing damaged is served.

A room keeps messages that have ended, wait and are dead. Then, again and again, one bit of a copy of its
database flips. Whether that matters is decided by reading all rows with Python's SQLite: if a row is not as
it was, or cannot be read, `parlour verify` must say so. Now and then a host serves the copy as well: what it
tells of a message must be what was, or an error, and every row that was good before must be there after it.

    scripts/torture bitrot [--flips N] [--seed S]
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

from room import BINARY, Room, eventually, worker


class Failed(Exception):
    """Something did not hold."""


def must(holds, what):
    if not holds:
        raise Failed(what)


def fill(data: Path) -> dict[str, tuple[str, bytes]]:
    """A room with some of everything: of each message its state, and its reply if it has one."""
    room = Room(data=data, timeouts__grace="1ms", durable__backoff_base="1ms")

    def send(agent, body, **headers):
        answer = room.http("POST", f"/v1/agents/{agent}/deliveries", body, headers)
        assert answer.status == 202, answer.body
        return json.loads(answer.body)["id"]

    try:
        once = {"parlour-max-attempts": "1"}
        names = [send(f"nobody/{it}", b"x" * random.randrange(500)) for it in range(20)]
        with worker(room.url, "broken", "--", "false"), worker(room.url, "echo"):
            names += [send(f"broken/{it}", b"x", **once) for it in range(5)]
            names += [send(f"echo/{it}", random.randbytes(20)) for it in range(50)]
            # Longer than a page.
            names += [send(f"echo/{it}", random.randbytes(30_000)) for it in range(5)]
            ended = ("completed", "dead")
            eventually(
                lambda: sum(look(room, name)[0] in ended for name in names) == 60,
                timeout=60, what="the ends",
            )  # fmt: skip
        known = {name: look(room, name) for name in names}
        assert room.stop() == 0
        return known
    finally:
        room.kill()


def look(room, name) -> tuple[str, bytes]:
    """What a room says of a message, or why it does not."""
    answer = room.http("GET", f"/v1/deliveries/{name}")
    if answer.status != 200:
        return str(answer.status), b""
    state = json.loads(answer.body)["state"]
    if state != "completed":
        return state, b""
    reply = room.http("GET", f"/v1/deliveries/{name}/reply")
    return (state, reply.body) if reply.status == 200 else (str(reply.status), b"")


def rows(file: Path) -> dict[tuple, tuple] | None:
    """All that is in a database, or nothing if SQLite does not get through it."""
    found = {}
    try:
        with sqlite3.connect(f"file:{file}?mode=ro&immutable=1", uri=True) as database:
            for pragma in ("application_id", "user_version", "encoding"):
                found[pragma, 0] = database.execute(f"PRAGMA {pragma}").fetchone()
            schema = "SELECT name, sql FROM sqlite_schema ORDER BY name"
            for number, (table, sql) in enumerate(database.execute(schema).fetchall()):
                found["schema", number] = (table, sql)
                for row in database.execute(f"SELECT rowid, * FROM {table}"):
                    found[table, row[0]] = row
    except (sqlite3.Error, OverflowError, UnicodeError):
        return None
    return found


def sqlite_is_content(file: Path) -> bool:
    """Whether SQLite's own check, which knows nothing of what the rows say, finds nothing."""
    try:
        with sqlite3.connect(f"file:{file}?mode=ro&immutable=1", uri=True) as database:
            return database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    except (sqlite3.Error, UnicodeError):
        return False


class Rot:
    """A room of which one bit flips again and again."""

    def __init__(self, directory: Path):
        self.kept, self.copy = directory / "kept", directory / "copy"
        self.known = fill(self.kept)
        self.good = (self.kept / "parlour.db").read_bytes()
        self.rows = rows(self.kept / "parlour.db")
        assert self.rows
        self.counts: collections.Counter[str] = collections.Counter()

    def anywhere(self) -> int:
        """An offset: anywhere, or on one of the few pages that say where all others are."""
        if random.random() < 0.7:
            return random.randrange(len(self.good))
        with sqlite3.connect(f"file:{self.kept / 'parlour.db'}?mode=ro&immutable=1", uri=True) as it:
            size = it.execute("PRAGMA page_size").fetchone()[0]
            roots = [page for (page,) in it.execute("SELECT rootpage FROM sqlite_schema")]
        return (random.choice([1, *roots]) - 1) * size + random.randrange(size)

    def flip(self, offset: int, bit: int, serve: bool):
        """Flips a bit, and sees what is said of it."""
        where = f"byte {offset} of {len(self.good)}, bit {bit}"
        bad = bytearray(self.good)
        bad[offset] ^= 1 << bit
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.kept, self.copy, ignore=shutil.ignore_patterns("reserve"))
        file = self.copy / "parlour.db"
        file.write_bytes(bad)
        found = rows(file)
        matters = found != self.rows
        said = self.verify()
        must(said in (0, 74, 78), f"{where}: verify ended with {said}")
        must(said != 0 or not matters, f"{where}: not noticed")
        self.counts["matters" if matters else "harmless"] += 1
        self.counts["harmless, but noticed"] += bool(said and not matters)
        self.counts["missed by SQLite alone"] += bool(matters and sqlite_is_content(file))
        if serve:
            self.serve(where, found)

    def verify(self) -> int:
        command = [BINARY, "verify", f"--data={self.copy}", "--json"]
        return subprocess.run(command, capture_output=True, timeout=60).returncode

    def serve(self, where: str, before: dict[tuple, tuple] | None):
        try:
            room = Room(data=self.copy)
        except RuntimeError:
            self.counts["the host does not start"] += 1
            return
        try:
            readers = lambda: room.http("GET", "/readyz").body  # noqa: E731
            eventually(lambda: b"still read" not in readers(), what="the logs are read")
            failed = 0
            for name, was in self.known.items():
                told = look(room, name)
                failed += told == ("503", b"")
                must(told in (was, ("503", b"")), f"{where}: {name} was {was[0]}, now {told[0]}")
            self.counts["served in part" if failed else "served"] += 1
        finally:
            room.kill()
        after = rows(self.copy / "parlour.db")
        if before is None or after is None:
            return
        for key, row in self.rows.items():
            if key[0] == "commits" and before.get(key) == row:
                must(after.get(key) == row, f"{where}: the good commit {key} is gone")


def rot(directory: Path, flips: int, serve_each: int) -> str:
    it = Rot(directory)
    # The control: what is whole is called so, and what is told of it is what was.
    shutil.copytree(it.kept, it.copy)
    must(it.verify() == 0, "the control: verify complains of a room that is whole")
    it.serve("the control", it.rows)
    must(it.counts.pop("served") == 1, "the control: not all is served of a room that is whole")
    for number in range(flips):
        it.flip(it.anywhere(), random.randrange(8), number % serve_each == 0)
    must(it.counts["matters"] > flips / 20, "the control: hardly a flip hits anything")
    missed = it.counts["missed by SQLite alone"]
    must(missed > flips / 20, "the control: SQLite alone would have noticed all that matter")
    return f"{flips} bits flipped: {dict(it.counts)}; none of those that matter unnoticed"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    random.seed(options.seed)
    try:
        with tempfile.TemporaryDirectory() as directory:
            print(f"bitrot: {rot(Path(directory), options.flips, 25)}")
    except Failed as failure:
        sys.exit(f"bitrot: FAILED: {failure}")
