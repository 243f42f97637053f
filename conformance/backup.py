"""Backups of a room that is written to and killed: what is restored is the room as it was at one moment.

Publishers have messages accepted one after the other, for agents in all partitions, and note what was
acknowledged, outside the host. In the middle of that `parlour backup` runs, and the host, or the backup, is
killed at any time. The restored room must have everything that was acknowledged before the backup began,
and of each publisher and each partition a beginning without a hole; nothing in it may be anything but what
was sent. The control copies the database with `cp`, which leaves out what is in the write-ahead log.

    scripts/torture backup [--rounds N] [--seed S]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from room import BINARY, Room, eventually, worker

PUBLISHERS = 4


class Failed(Exception):
    """Something did not hold."""


def must(holds, what):
    if not holds:
        raise Failed(what)


class Publisher(threading.Thread):
    """Sends one message after the other until it is told to stop or nobody answers."""

    def __init__(self, room, name, stop):
        super().__init__()
        self.room, self.label, self.stop = room, name, stop
        self.sent = 0
        self.acks: list[tuple[str, str]] = []

    def run(self):
        while not self.stop.is_set():
            self.sent += 1
            text = f"{self.label} {self.sent} " + "x" * random.randrange(8000)
            path = f"/v1/agents/echo/{self.label}-{self.sent % 23}/deliveries"
            with contextlib.suppress(OSError, ValueError):
                answer = self.room.http("POST", path, text.encode())
                if answer.status == 202:
                    self.acks.append((json.loads(answer.body)["id"], text))
                    continue
            return


def parlour(*args, expect=0) -> subprocess.CompletedProcess:
    done = subprocess.run([BINARY, *args], capture_output=True, text=True, timeout=120)
    must(done.returncode == expect, f"{args}: {done.returncode}, {done.stderr}")
    return done


def one_round(directory: Path, number: int, control=False) -> str:
    """One backup under load, and what became of it. `directory` is kept from round to round."""
    data, file, restored = directory / "data", directory / f"{number}.db", directory / f"r{number}"
    room, stop = Room(data=data), threading.Event()
    publishers = [Publisher(room, f"p{number}-{it}", stop) for it in range(PUBLISHERS)]
    victim = "nobody" if control else ("nobody", "the host", "the backup")[number % 3]
    try:
        with worker(room.url, "echo"):
            for publisher in publishers:
                publisher.start()
            eventually(lambda: all(len(it.acks) > 10 for it in publishers), what="acknowledgements")
            before = [len(it.acks) for it in publishers]
            if control:
                shutil.copyfile(data / "parlour.db", file)
            else:
                backup = subprocess.Popen(
                    [BINARY, "backup", file, f"--data={data}", "--json"],
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )  # fmt: skip
                # Not to wait for anything: the kill comes at any time.
                time.sleep(random.uniform(0, 0.1))
                if victim == "the host":
                    room.kill()
                elif victim == "the backup":
                    backup.kill()
                _, stderr = backup.communicate(timeout=120)
                # Killed behind the moment in which it got its name, it is whole: that is looked at below.
                if victim == "the backup" and not file.exists():
                    parlour("backup", str(file), f"--data={data}")
                elif victim != "the backup":
                    must(backup.returncode == 0, f"the backup failed: {stderr}")
                must(not Path(f"{file}.partial").exists(), "something is left over")
            eventually(lambda: room.process.poll() is not None or all(
                len(it.acks) > count for it, count in zip(publishers, before, strict=True)
            ), what="more acknowledgements")  # fmt: skip
    finally:
        stop.set()
        for publisher in publishers:
            publisher.join()
        room.kill()
    parlour("restore", str(file), f"--data={restored}")
    report = json.loads(parlour("verify", f"--data={restored}", "--json").stdout)
    present = compare(restored, publishers, before, report)
    for path in (file, restored):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    acks = sum(len(it.acks) for it in publishers)
    return f"{sum(before)} acknowledged before, {present} of {acks} in it, killed: {victim}"


def compare(restored, publishers, before, report) -> int:
    """Whether the restored room is what it was at one moment, not before the backup began."""
    room = Room(data=restored)
    present = 0
    holes: dict[str, list[tuple[int, bool]]] = {}
    try:
        eventually(lambda: is_ready(room), timeout=120, what="the logs are read")
        for publisher, count in zip(publishers, before, strict=True):
            ended = False
            for index, (name, text) in enumerate(publisher.acks):
                answer = room.http("GET", f"/v1/deliveries/{name}")
                must(answer.status in (200, 404), f"{name}: {answer.status}")
                is_there = answer.status == 200
                must(is_there or index >= count, f"{name} was acknowledged before, and is not there")
                must(not (is_there and ended), f"{name} is there, and one sent before it is not")
                ended |= not is_there
                partition, _, place = name.split("-")
                holes.setdefault(partition, []).append((int(place), is_there))
                present += is_there
                if is_there and json.loads(answer.body)["state"] == "completed":
                    reply = room.http("GET", f"/v1/deliveries/{name}/reply")
                    must(reply.body.decode() == text, f"{name} has another's content")
        for partition, places in holes.items():
            known = [is_there for _, is_there in sorted(places)]
            must(known == sorted(known, reverse=True), f"partition {partition} has a hole")
        # Each publisher has one message at most of which it does not know whether it was accepted.
        total = report["deliveries"]["accepted"] - earlier(restored)
        must(present <= total <= present + PUBLISHERS, f"{total} accepted, {present} known")
        # Ids of the time after the backup stay unused.
        new = json.loads(room.http("POST", "/v1/agents/echo/k/deliveries", b"x").body)["id"]
        must(all(new != name for it in publishers for name, _ in it.acks), "an id was given twice")
    finally:
        room.kill()
    return present


def is_ready(room) -> bool:
    answer = room.http("GET", "/readyz")
    must(b"store failed" not in answer.body, f"the restored room: {answer.body}")
    return answer.status == 200


def earlier(restored) -> int:
    """How many were accepted in the rounds before."""
    path = restored.parent / "earlier.json"
    return json.loads(path.read_text()) if path.exists() else 0


def note_earlier(directory):
    report = json.loads(parlour("verify", f"--data={directory / 'data'}", "--json").stdout)
    (directory / "earlier.json").write_text(json.dumps(report["deliveries"]["accepted"]))


def rounds(directory: Path, count: int, say=print):
    for number in range(count):
        say(f"round {number + 1}: {one_round(directory, number)}")
        note_earlier(directory)


def control(directory: Path) -> str:
    """A copy without the write-ahead log must be told from a backup. Returns what was noticed."""
    try:
        one_round(directory, 1_000_000, control=True)
    except Failed as failure:
        return str(failure)
    raise Failed("the control: a copy without the write-ahead log passed for a backup")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    random.seed(options.seed)
    try:
        with tempfile.TemporaryDirectory() as directory:
            rounds(Path(directory), options.rounds, say=lambda text: print(text, flush=True))
            print(f"control, a copy without the write-ahead log: {control(Path(directory))}")
        print(f"backup: {options.rounds} rounds, nothing lost, nothing invented, no hole")
    except Failed as failure:
        sys.exit(f"backup: FAILED: {failure}")
