"""A clock that is wrong or jumps: nothing expires or begins early, and what comes later is later."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import pytest

from room import eventually
from test_durable import look, send


SHARED = Path("/dev/shm")


@functools.cache
def library() -> str:
    """What is to be loaded before all else. A number that somebody left behind is in the way of one try."""
    told = ["faketime", "-f", "+0", "sh", "-c", "echo $LD_PRELOAD"]
    tries = (subprocess.run(told, capture_output=True, text=True) for _ in range(5))
    return next(it for it in tries if it.returncode == 0).stdout.strip()


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """Sets the clock of all that is started from here on, also while it runs: the monotonic one goes on."""
    if shutil.which("faketime") is None:
        pytest.skip("needs faketime (on Debian: apt-get install faketime)")
    left = set(SHARED.glob("*faketime_*"))
    file = tmp_path / "clock"
    monkeypatch.setenv("FAKETIME_TIMESTAMP_FILE", str(file))
    monkeypatch.setenv("FAKETIME_NO_CACHE", "1")
    monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    monkeypatch.setenv("LD_PRELOAD", library())

    def set_to(what):
        file.write_text(what)

    set_to("+0")
    yield set_to
    # Who is killed leaves its memory, in the way of another with its number.
    for shared in set(SHARED.glob("*faketime_*")) - left:
        shared.unlink(missing_ok=True)


class Kept:
    """Messages whose time is long, in a room that has them."""

    HOUR = 3_600_000

    def __init__(self, room):
        self.room = room
        self.keyed = send(room, "nobody/k", idempotency_key="k")["id"]
        self.names: list[str] = []
        self.delayed: list[str] = []
        self.send(room)

    def send(self, room):
        self.names.append(send(room, "nobody/k", parlour_ttl_ms=self.HOUR)["id"])
        self.delayed.append(send(room, "nobody/k", parlour_delay_ms=self.HOUR)["id"])
        self.names += [self.delayed[-1], send(room, "nobody/k")["id"]]

    def hold(self, room):
        """Whether nothing has come early, and what is new comes after what was."""
        eventually(lambda: room.http("GET", "/readyz").status == 200, what="the logs are read")
        newest = look(room, self.names[-1])
        self.send(room)
        stories = [look(room, name) for name in self.names]
        assert [it["state"] for it in stories] == ["accepted"] * len(stories)
        times = [it["accepted_at"] for it in stories]
        assert times == sorted(times) and times[-1] >= newest["accepted_at"]
        numbers = [int(name.split("-")[2]) for name in self.names]
        assert numbers == sorted(set(numbers))
        for name in self.delayed:
            found = look(room, name)
            assert abs(found["next_attempt_at"] - found["accepted_at"] - self.HOUR) < 1000
        assert send(room, "nobody/k", idempotency_key="k")["id"] == self.keyed


@pytest.mark.parametrize("jump", ["+2d", "-1h", "2026-01-01 00:00:00"], ids=["ahead", "back", "frozen"])
def test_a_clock_that_jumps_while_a_host_runs_changes_nothing(clock, kept, jump):  # noqa: F811
    room = kept()
    messages = Kept(room)
    clock(jump)
    for _ in range(3):
        messages.hold(room)


@pytest.mark.parametrize(
    ("first", "then"),
    [("+0", "-1h"), ("+2d", "+0"), ("+0", "2026-01-01 00:00:00")],
    ids=["set back", "was ahead", "frozen"],
)
def test_a_clock_that_was_set_back_between_two_hosts_ends_nothing_early(clock, kept, first, then):  # noqa: F811
    clock(first)
    room = kept()
    messages = Kept(room)
    clock(then)
    for _ in range(3):
        room.kill()
        room = kept()
        messages.hold(room)


def test_the_control_a_clock_that_went_on_between_two_hosts_ends_what_has_expired(clock, kept):  # noqa: F811
    room = kept()
    messages = Kept(room)
    room.kill()
    clock("+2d")
    room = kept()
    eventually(lambda: look(room, messages.names[0])["state"] == "expired", what="the end")
    # What has no end waits on, and what was to come has come due.
    assert {look(room, name)["state"] for name in messages.names[1:]} == {"accepted"}
    assert send(room, "nobody/k", idempotency_key="k")["id"] != messages.keyed
