#!/usr/bin/env python3
"""D2 to D5 and D8: hosts that end at a certain call of the kernel, with their power, or with a disk that
fails, and write-ahead logs of which the end is missing. `test_crash.py` runs some of each, and their
controls.

    scripts/torture syscalls [--most N] [--seed S]
    scripts/torture fsync [--times N] [--seed S]
    scripts/torture power [--cuts N] [--seed S]
    scripts/torture torn
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import SkipTest

from history import Report
from kill import Client, Gone, Storm
from room import NotStarted, Room, eventually

SYSCALLS = ("fdatasync", "pwrite64", "fsync", "ftruncate", "unlink")
FILE_SYSTEMS = ("ext4", "xfs")
# How long a host lives at the most that is to end by itself, in seconds.
LIFE = 1.5
BYTES = 400 << 20


class Missing(SkipTest):
    """What this needs is not there: a test is skipped, and says so."""


def need(*programs: str):
    for program in programs:
        if shutil.which(program) is None:
            raise Missing(f"{program} is not installed")


def strace(log: Path, *calls: str, inject="") -> list[str]:
    """What to start a host under, to write down these calls and do something to some of them."""
    need("strace")
    calls = ",".join(calls)
    traced = ["strace", "-D", "-f", "-qq", "-o", str(log), "-e", f"trace={calls}"]
    return [*traced, "-e", f"inject={calls}:{inject}"] if inject else traced


# A certain call


def killed_at(syscall: str, n: int, reached: Counter):
    """SIGKILL where a thread makes this call for the nth time, before it is carried out. A call that is
    not made so often, twice in a row, is not waited for again."""

    def strike(storm: Storm):
        if storm.missed[syscall] == 2:
            return
        under = strace(storm.directory / "trace", syscall, inject=f"signal=KILL:when={n}")
        try:
            room = storm.start(under)
            before = storm.asking
            room.process.wait(LIFE)
            storm.struck += before > 0
            code = room.process.returncode
        except NotStarted as ended:
            code = ended.code
        except subprocess.TimeoutExpired:
            storm.missed[syscall] += 1
            return room.kill()
        assert code == -signal.SIGKILL, f"{syscall} {n}: it ended with {code}"
        reached[syscall] += 1
        storm.missed[syscall] = 0

    return strike


def fsync_fails(n: int, reached: Counter):
    """The nth fsync of a thread fails, once: from then on nothing may be acknowledged."""

    def strike(storm: Storm):
        under = strace(
            storm.directory / "trace", "fsync", "fdatasync", inject=f"error=EIO:when={n}"
        )
        try:
            room = storm.start(under)
        except NotStarted as ended:
            assert ended.code == 74, ended
            reached["at the start"] += 1
            return
        client, until = Client(storm), time.monotonic() + LIFE
        with contextlib.suppress(Gone):
            while time.monotonic() < until:
                status, why = client.ask("GET", "/readyz")
                if status == 503 and b"the store failed" in why:
                    reached["under load"] += 1
                    for number in range(5):
                        path = f"/v1/agents/echo/{number}/deliveries"
                        status, answer = client.ask("POST", path, b"after a failed fsync")
                        assert status == 503, (status, answer)
                    break
                time.sleep(0.005)
        room.kill()

    return strike


# The power


class Disk:
    """A file system in a file, whose power can be cut: what was not synced is gone."""

    def __init__(self, directory: Path, kind: str):
        need("xfs_io", "losetup", f"mkfs.{kind}")
        if os.geteuid() != 0:
            raise Missing("only root can mount a file system")
        self.image, self.path, self.kind = directory / f"{kind}.img", directory / kind, kind
        self.path.mkdir()
        with self.image.open("w") as image:
            image.truncate(BYTES)
        force = "-F" if kind == "ext4" else "-f"
        subprocess.run([f"mkfs.{kind}", "-q", force, self.image], check=True, capture_output=True)
        self.mount()

    def mount(self):
        done = subprocess.run(
            ["mount", "-o", "loop", self.image, self.path], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise Missing(f"nothing can be mounted: {done.stderr.strip()}")

    def unmount(self):
        def is_done():
            return subprocess.run(["umount", self.path], capture_output=True).returncode == 0

        def is_gone():
            return not subprocess.check_output(["losetup", "--associated", self.image])

        # For a moment the kernel may still be busy with what was killed.
        eventually(is_done, what="the unmounting")
        # A namespace that somebody made meanwhile has it mounted, too: it would be found as it was.
        eventually(is_gone, what="the end of its last mount")

    def cut(self):
        """Drops what is not on the disk, and finds it as it is when the power is back."""
        subprocess.run(["xfs_io", "-x", "-c", "shutdown", self.path], check=True, capture_output=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.unmount()
        self.image.unlink()


def power_cut(disk: Disk, reached: Counter):
    """A power cut at any time: many fall into a start, as a host that just began has much to write."""

    def strike(storm: Storm):
        room = storm.start()
        storm.live()
        # It may not say anything any more once the disk is gone.
        room.signal(signal.SIGSTOP)
        eventually(lambda: stopped(room.pid), what="the stop")
        disk.cut()
        room.kill()
        disk.unmount()
        disk.mount()
        reached[disk.kind] += 1

    return strike


def stopped(pid: int) -> bool:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all(re.search(r"^State:\s+T", (task / "status").read_text(), re.MULTILINE) for task in tasks)


# The end of the write-ahead log


# Its own header, and what each page in it has.
LOG_HEADER, FRAME = 32, 8192 + 24


class Torn:
    """A data directory as it was before and after one more message was acknowledged."""

    def __init__(self, directory: Path, before=5):
        self.directory, source = directory, directory / "whole"
        room = Room(data=source)
        try:
            self.names = [self.send(room, number) for number in range(before)]
            self.head = (source / "head").read_bytes()
            self.begin = (source / "parlour.db-wal").stat().st_size
            self.last = self.send(room, before)
            # Nobody writes now. What lies in memory is shared with nobody else.
            self.database = (source / "parlour.db").read_bytes()
            self.log = (source / "parlour.db-wal").read_bytes()
        finally:
            room.kill()
        assert self.begin < len(self.log)

    @staticmethod
    def send(room, number) -> str:
        answer = room.http("POST", f"/v1/agents/torn/{number}/deliveries", b"x" * 300)
        assert answer.status == 202, answer.body
        return re.search(r'"id":"([^"]+)"', answer.body.decode())[1]

    def open(self, log: bytes, head=True) -> str:
        """What a host makes of this log: `refused` with a word of why, `whole`, or what is gone. It knows
        up to where was acknowledged before the last message, or does not."""
        data = Path(tempfile.mkdtemp(dir=self.directory))
        (data / "parlour.db").write_bytes(self.database)
        (data / "parlour.db-wal").write_bytes(log)
        if head:
            (data / "head").write_bytes(self.head)
        try:
            room = Room(data=data)
        except NotStarted as ended:
            shutil.rmtree(data)
            return f"refused with {ended.code}"
        try:
            eventually(lambda: b"still read" not in room.http("GET", "/readyz").body)
            if room.http("GET", "/readyz").status != 200:
                return "refused"
            answers = {name: room.http("GET", f"/v1/deliveries/{name}").status for name in self.names}
            gone = [name for name, status in answers.items() if status != 200]
            return f"{len(gone)} of {len(answers)} are gone" if gone else "whole"
        finally:
            room.kill()
            shutil.rmtree(data)

    def at(self, cut: int) -> list[bytes]:
        """The log without what is behind `cut`, and the same where the length was written but not what
        it is for."""
        return [self.log[:cut], self.log[:cut] + bytes(len(self.log) - cut)]

    def lacks(self, log: bytes) -> bool:
        """Whether something is not there that was acknowledged: it may end with zeros by itself."""
        return log[: self.begin] != self.log[: self.begin]

    def edges(self) -> set[int]:
        """Around where the log's header ends, and each of its frames and their headers."""
        ends = {at + of for at in range(LOG_HEADER, len(self.log) + 1, FRAME) for of in (0, 24)}
        around = {end + of for end in ends | {0, len(self.log)} for of in (-1, 0, 1)}
        return {cut for cut in around if 0 <= cut <= len(self.log)}


# Long runs


def torture(options, what: str, strikes, reached: Counter, data=None) -> Report:
    """Runs these strikes one after the other on one directory, and says what came of it."""
    print(f"seed {options.seed}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        storm = Storm(Path(directory), options.seed, data or Path(directory) / "data")

        def tell(number):
            if number % 50 == 0:
                print(f"{number}: {dict(reached)}, {len(storm.known)} acknowledged", flush=True)

        report = storm.run(strikes, tell)
    seconds = time.monotonic() - began
    print(f"{what}: {dict(reached)} in {seconds:.0f} s: {report}", flush=True)
    if not report.is_clean() or not reached:
        sys.exit(f"{what}: FAILED")


def syscalls(options):
    reached: Counter = Counter()
    every = [killed_at(call, n, reached) for n in range(1, options.most + 1) for call in SYSCALLS]
    torture(options, "syscalls", every, reached)


def fsync(options):
    reached: Counter = Counter()
    when = random.Random(options.seed)
    torture(
        options, "fsync",
        [fsync_fails(when.randrange(1, 100), reached) for _ in range(options.times)], reached,
    )  # fmt: skip


def power(options):
    for kind in FILE_SYSTEMS:
        reached: Counter = Counter()
        with tempfile.TemporaryDirectory() as directory, Disk(Path(directory), kind) as disk:
            strikes = [power_cut(disk, reached)] * (options.cuts // len(FILE_SYSTEMS))
            torture(options, f"power, {kind}", strikes, reached, disk.path / "data")


def torn(_options):
    with tempfile.TemporaryDirectory() as directory:
        it = Torn(Path(directory))
        before = {cut for cut in it.edges() if cut < it.begin} | set(range(0, it.begin, 97))
        for cut in before:
            for log in filter(it.lacks, it.at(cut)):
                found = it.open(log)
                if not found.startswith("refused"):
                    sys.exit(f"torn: FAILED: cut at {cut}, before {it.begin}: {found}")
        found = it.open(it.log[: it.begin // 2], head=False)
        if found.startswith("refused") or found == "whole":
            sys.exit(f"torn: FAILED: the control, where nobody knows what was acknowledged: {found}")
        print(f"{len(before)} cuts before the last acknowledged byte, all refused", flush=True)
        for cut in range(it.begin, len(it.log) + 1):
            for log in it.at(cut):
                found = it.open(log)
                if found != "whole":
                    sys.exit(f"torn: FAILED: cut at {cut} of {it.begin} to {len(it.log)}: {found}")
            if cut % 1000 == 0:
                print(f"{cut} of {it.begin} to {len(it.log)}", flush=True)
        print(f"torn: {len(it.log) - it.begin} cuts behind the last acknowledged byte, nothing lost")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    for run, most in ((syscalls, ("most", 300)), (fsync, ("times", 200)), (power, ("cuts", 500)), (torn, None)):
        verb = verbs.add_parser(run.__name__)
        verb.set_defaults(run=run)
        verb.add_argument("--seed", type=int, default=random.randrange(1 << 30))
        if most is not None:
            verb.add_argument(f"--{most[0]}", type=int, default=most[1])
    options = parser.parse_args()
    try:
        options.run(options)
    except Missing as missing:
        sys.exit(f"SKIPPED: {missing}")


if __name__ == "__main__":
    main()
