"""Disks that are full, or do not keep what they were given: what was acknowledged is there all the same."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import subprocess

import pytest

from room import Room, eventually, worker
from test_durable import ended, look, send


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", mounted]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield mounted
    subprocess.run(["umount", "-l", mounted], check=True)


def fill(room, size=200_000, most=500) -> tuple[list[str], dict]:
    """Has messages accepted until one is refused. Returns their names, and why."""
    names = []
    for number in range(most):
        answer = room.http("POST", f"/v1/agents/late/{number % 5}/deliveries", os.urandom(size))
        if answer.status != 202:
            return names, {"status": answer.status, "retry": answer.getheader("retry-after"),
                           "body": answer.body.decode()}
        names.append(re.search(r'"id":"([^"]+)"', answer.body.decode())[1])
    raise AssertionError("the disk was never full")


def test_a_full_disk_refuses_what_is_new_and_what_was_accepted_goes_on(small_disk):
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (6 << 20))
    room = Room(data=small_disk / "data")
    try:
        names, refused = fill(room)
        assert names and refused["status"] == 507 and refused["retry"], refused
        assert "storage_full" in refused["body"] and "hint" in refused["body"]
        # Reading, and ending what was accepted, goes on.
        assert look(room, names[0])["state"] == "accepted"
        with worker(room.url, "late", "--", "true"):
            for name in names[:20]:
                assert ended(room, name)["state"] == "completed"
        assert send(room, expect=507)["kind"] == "storage_full"
        # When there is room again, it is taken without a restart.
        filler.unlink()
        eventually(lambda: room.http("POST", "/v1/agents/late/9/deliveries", b"x").status == 202)
        room.kill()
        room = Room(data=small_disk / "data")
        for name in names:
            assert look(room, name)["state"] in ("accepted", "waiting", "dispatched", "received", "completed")
    finally:
        room.kill()


def test_a_limit_on_the_length_of_files_is_a_full_disk_and_not_the_end(tmp_path):
    room = Room(data=tmp_path / "data")
    try:
        resource.prlimit(room.pid, resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
        names, refused = fill(room)
        assert refused["status"] == 507, refused
        assert room.answers() and look(room, names[0])["state"] == "accepted"
        room.kill()
        room = Room(data=tmp_path / "data")
        assert all(look(room, name)["state"] == "accepted" for name in names)
    finally:
        room.kill()


@pytest.mark.parametrize("fails", [True, False], ids=["fsync fails", "control"])
def test_after_a_failed_fsync_nothing_is_acknowledged(tmp_path, fails):
    if shutil.which("strace") is None:
        pytest.skip("needs strace, to have an fsync fail")
    room = Room(data=tmp_path / "data")
    trace = ["strace", "-f", "-qq", "-o", tmp_path / "trace", "-p", str(room.pid)]
    trace += ["-e", "trace=fsync,fdatasync"]
    if fails:
        trace += ["-e", "inject=fsync,fdatasync:error=EIO:when=10+"]
    tracer = subprocess.Popen(trace, stderr=subprocess.PIPE)
    try:
        eventually(lambda: f"TracerPid:\t{tracer.pid}" in status_of(room.pid), what="the trace")
        acks, refusals = [], []
        for number in range(40):
            answer = room.http("POST", f"/v1/agents/late/{number}/deliveries", b"x")
            name = re.search(r'"id":"([^"]+)"', answer.body.decode())
            (acks if answer.status == 202 else refusals).append(name and name[1] or answer.status)
        assert room.answers()
        assert bool(refusals) == fails, (len(acks), refusals)
        if fails:
            assert set(refusals) == {503} and "EIO" in (tmp_path / "trace").read_text()
            assert room.http("GET", "/readyz").status == 503
            # Not once more, whatever is asked and however long it is waited.
            for _ in range(3):
                assert room.http("POST", "/v1/agents/late/k/deliveries", b"x").status == 503
    finally:
        tracer.terminate()
        tracer.wait()
        room.kill()
    room = Room(data=tmp_path / "data")
    try:
        for name in acks:
            assert look(room, name)["state"] == "accepted"
    finally:
        room.kill()


def status_of(pid: int) -> str:
    with open(f"/proc/{pid}/status") as status:
        return status.read()


def fill_up(directory):
    """Leaves no byte on this disk."""
    with (directory / "last").open("ab", buffering=0) as last:
        for size in (1 << 16, 1 << 12):
            with contextlib.suppress(OSError):
                while last.write(bytes(size)):
                    pass


def test_a_disk_without_a_byte_left_has_nothing_told_that_it_does_not_keep(small_disk):
    room = Room(data=small_disk / "data")
    try:
        names = [send(room, f"late/{number}")["id"] for number in range(5)]
        # What is given back of the reserve is taken, too.
        refused = []
        while len(refused) < 3:
            fill_up(small_disk)
            answer = room.http("POST", "/v1/agents/late/k/deliveries", os.urandom(100_000))
            assert answer.status in (202, 507), answer.body
            refused += [answer.status] if answer.status == 507 else []
        fill_up(small_disk)
        with worker(room.url, "late", "--", "true"):
            answers = lambda: [room.http("GET", f"/v1/deliveries/{name}").status for name in names]  # noqa: E731
            eventually(lambda: set(answers()) == {507}, what="nothing is told any more")
            assert send(room, "late/0", expect=507)["kind"] == "storage_full"
            room.kill()
        (small_disk / "last").unlink()
        room = Room(data=small_disk / "data")
        assert all(look(room, name)["state"] == "accepted" for name in names)
        with worker(room.url, "late", "--", "true"):
            assert all(ended(room, name)["state"] == "completed" for name in names)
    finally:
        room.kill()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_host_whose_database_is_removed_accepts_nothing_more(tmp_path, replaced):
    data = tmp_path / "data"
    room = Room(data=data)
    try:
        names = [send(room, agent="late/1")["id"] for _ in range(3)]
        (data / "parlour.db").rename(tmp_path / "kept.db")
        if replaced:
            (data / "parlour.db").write_bytes(b"")

        def refused():
            answer = room.http("POST", "/v1/agents/late/1/deliveries", b"x")
            return answer.status == 503 and b"removed or replaced" in answer.body

        eventually(refused, what="it is noticed")
        assert room.http("GET", "/readyz").status == 503
    finally:
        room.kill()
    # Back in its place, with the log beside it, it has all.
    (tmp_path / "kept.db").rename(data / "parlour.db")
    room = Room(data=data)
    try:
        assert [look(room, name)["state"] for name in names] == ["accepted"] * 3
    finally:
        room.kill()


def test_a_view_that_cannot_be_read_is_not_taken_for_one_that_knows_nothing(tmp_path):
    data = tmp_path / "data"
    room = Room(data=data)
    try:
        with worker(room.url, "echo"):
            name = send(room)["id"]
            ended(room, name)
        for file in data.glob("view.db*"):
            file.write_bytes(b"damaged" * 2000)
        assert look(room, name, expect=503)["kind"] == "unavailable"
    finally:
        room.kill()
    room = Room(data=data)
    try:
        assert look(room, name)["state"] == "completed"
    finally:
        room.kill()
