"""Hosts that end at a certain call of the kernel, with their power, or with a disk that fails, and logs
that are damaged. `scripts/torture controls` shows which mistakes of a host each of these finds."""

from __future__ import annotations

import os
import random
import re
import signal
import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from crash import FILE_SYSTEMS, LOG_HEADER, Disk, Torn, fsync_fails, killed_at, power_cut, stopped, strace
from kill import Storm
from room import Room, eventually, worker
from test_durable import ended, look, send


@pytest.fixture
def storm(tmp_path, say):
    """Lets hosts be struck on a data directory, and what happened be checked."""

    def run(strikes, reached: Counter, data=None):
        seed = random.randrange(1 << 30)
        report = Storm(tmp_path, seed, data or tmp_path / "data").run(strikes)
        say(f"seed {seed}, {dict(reached)}: {report}")
        assert report.is_clean(), report
        assert report.acknowledged

    return run


def test_a_host_that_is_killed_at_a_certain_call_loses_nothing(storm):
    reached = Counter()
    calls = {
        "pwrite64": (1, 2, 3, 7, 20, 50),
        "fdatasync": (1, 2, 3, 4, 9, 25),
        "fsync": (1, 2),
        "ftruncate": (1, 2),
    }
    storm([killed_at(call, n, reached) for call, all in calls.items() for n in all], reached)
    assert all(reached[call] for call in calls), reached


def test_after_an_fsync_that_failed_once_nothing_more_is_acknowledged(storm):
    reached = Counter()
    storm([fsync_fails(n, reached) for n in (1, 2, 4, 8, 15, 25)], reached)
    assert reached["at the start"] and reached["under load"], reached


@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_what_was_acknowledged_survives_that_the_power_is_cut(storm, tmp_path, kind):
    reached = Counter()
    with Disk(tmp_path, kind) as disk:
        storm([power_cut(disk, reached)] * 10, reached, disk.path / "data")
    assert reached[kind] == 10


def sync(path):
    with path.open("rb") as file:
        os.fsync(file.fileno())


def test_the_view_of_what_has_ended_knows_all_of_it_after_a_power_cut(tmp_path):
    with Disk(tmp_path, "xfs") as disk:
        data = disk.path / "data"
        log = data / "view.db-wal"
        room, names = Room(data=data), []

        def turn():
            with log.open("rb") as file:
                return file.read(24)[16:]

        def settle(keys):
            names.append(send(room, f"echo/{len(names) % keys}")["id"])
            return ended(room, names[-1])

        with worker(room.url, "echo"), ThreadPoolExecutor(8) as pool:
            list(pool.map(settle, [50] * 1000))
        assert room.stop() == 0
        # What the kernel has written in its own time is the view of then, …
        sync(data / "view.db")
        room = Room(data=data)
        with worker(room.url, "echo"), ThreadPoolExecutor(8) as pool:
            settle(50)
            first = turn()
            # Of most partitions the log that is begun anew is to tell nothing.
            for keys, pages in (50, 600), (1, 10_000):
                while turn() == first and log.stat().st_size < pages * 4096 and len(names) < 20_000:
                    list(pool.map(settle, [keys] * 20))
        assert turn() != first, "its log has never been moved"
        # … and the log that was begun anew since.
        sync(log)
        room.signal(signal.SIGSTOP)
        eventually(lambda: stopped(room.pid), what="the stop")
        disk.cut()
        room.kill()
        disk.unmount()
        disk.mount()
        room = Room(data=data)
        try:
            gone = [it for it in names if room.http("GET", f"/v1/deliveries/{it}").status != 200]
            assert not gone, f"{len(gone)} of {len(names)} are not known"
        finally:
            room.kill()


def test_each_acknowledgement_waits_for_an_fsync_of_its_own(tmp_path):
    trace = tmp_path / "trace"
    room = Room(data=tmp_path / "data", under=strace(trace, "fsync", "fdatasync"))
    try:
        send(room)
        before = len(re.findall(r"sync\(.* = 0$", trace.read_text(), re.MULTILINE))
        for _ in range(20):
            send(room)
        after = len(re.findall(r"sync\(.* = 0$", trace.read_text(), re.MULTILINE))
    finally:
        room.kill()
    assert after >= before + 20


# The write-ahead log


@pytest.fixture(scope="module")
def torn(tmp_path_factory):
    return Torn(tmp_path_factory.mktemp("torn"))


def test_a_log_without_what_came_behind_the_last_acknowledgement_opens_with_all_before(torn, say):
    cuts = {cut for cut in torn.edges() if cut >= torn.begin}
    for cut in sorted(cuts | set(random.sample(range(torn.begin, len(torn.log)), 10))):
        for log in torn.at(cut):
            assert torn.open(log) == "whole", f"{cut} of {torn.begin} to {len(torn.log)}"


def test_a_log_that_is_damaged_before_that_is_not_taken_for_whole(torn):
    places = [0, LOG_HEADER - 1, torn.begin - 1, *random.sample(range(torn.begin), 10)]
    for at in places:
        assert torn.open(flipped(torn.log, at)) == "refused with 74", at
    # The control: SQLite forgets what is behind, and a host that knows no better takes it for a torn end.
    assert torn.open(flipped(torn.log[: torn.begin], torn.begin - 1), head=False) == "1 of 5 are gone"


def flipped(log: bytes, at: int) -> bytes:
    return log[:at] + bytes([log[at] ^ 1]) + log[at + 1 :]


def test_a_log_that_is_cut_before_that_is_not_taken_for_whole(torn):
    edges = random.sample(sorted(cut for cut in torn.edges() if cut < torn.begin), 10)
    for cut in [0, torn.begin - 1, *edges, *random.sample(range(torn.begin), 5)]:
        for log in filter(torn.lacks, torn.at(cut)):
            assert torn.open(log) == "refused with 74", f"{cut} of {torn.begin}"
    # The control: SQLite's log does not say how long it was.
    assert torn.open(torn.log[:LOG_HEADER], head=False) == "5 of 5 are gone"


def test_a_commit_that_is_damaged_is_noticed_and_nothing_is_made_of_it(tmp_path):
    data = tmp_path / "data"
    room = Room(data=data)
    name = send(room, body=b"to be damaged")["id"]
    room.kill()
    # A start moves the log into the database.
    Room(data=data).kill()
    bytes_ = (data / "parlour.db").read_bytes()
    at = bytes_.index(b"to be damaged")
    (data / "parlour.db").write_bytes(bytes_[:at] + b"T" + bytes_[at + 1 :])
    room = Room(data=data)
    try:
        assert look(room, name, expect=503)["kind"] == "unavailable"
        assert "damaged" in room.http("GET", "/readyz").body.decode()
    finally:
        room.kill()


def test_a_commit_that_is_gone_is_not_taken_for_one_that_was_let_go(tmp_path):
    data = tmp_path / "data"
    room = Room(data=data)
    with worker(room.url, "echo"):
        # Of one agent, so that they are in one log.
        words = ("first", "second", "third")
        names = [ended(room, send(room, agent="echo/1", body=word.encode())["id"])["id"] for word in words]
    assert room.stop() == 0
    with sqlite3.connect(data / "parlour.db") as database:
        said = "SELECT max(id) FROM commits WHERE instr(commit_bytes, CAST('second' AS BLOB))"
        database.execute("DELETE FROM commits WHERE id = ?", database.execute(said).fetchone())
    room = Room(data=data)
    try:
        told = look(room, names[1], expect=503)
        assert told["kind"] == "unavailable" and "missing" in told["detail"]
        assert [look(room, names[it])["state"] for it in (0, 2)] == ["completed", "completed"]
    finally:
        room.kill()
