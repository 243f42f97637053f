#!/usr/bin/env python3
"""N3: a network that loses a fifth of all packets, doubles some, and delays each by up to 400 ms.

Host and workers are in network namespaces of their own, with TCP as the kernel has it on both sides.
Every call must be answered with what it sent, and run once. `test_netns.py` has the control.

    scripts/torture loss [--minutes M]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from room import eventually
from wire import HOST, Missing, Wire, inside, program, resent, said

CALLERS = 6
# What is said of a call that was not sent: it is made again.
UNREACHED = "did not answer within"
SIZES = (1, 100, 2_000, 30_000)


@dataclass
class Ended:
    """What became of the calls of a storm."""

    answered: int = 0
    failed: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    resent: int = 0
    slowest: float = 0.0


def storm(wire, seconds, *, patience, at_least=0):
    """Calls from the far end of the wire to workers there, for so long and at least so many."""
    conditions = wire.loss, wire.twice, wire.delay
    # They meet in good weather.
    wire.loss, wire.twice, wire.delay = 0.0, 0.0, (0.0, 0.0)
    ended, lock = Ended(), threading.Lock()
    with (
        tempfile.NamedTemporaryFile() as log,
        program(
            wire.host, "serve", "--listen", f"{HOST}:0", "--insecure", "--memory",
            "--set=timeouts.grace=60s", f"--set=server.allowed_hosts={HOST},localhost",
        ) as serving,
    ):  # fmt: skip
        url = said(serving, r"listening on (http://\S+)")[1]
        script = f"read number rest; echo $number >> {log.name}; echo $number $rest"
        with program(wire.worker, "worker", "count", "--url", url, "--", "sh", "-c", script):
            listed = ["agents", "--url", url, "--output", "json"]
            eventually(lambda: "count" in inside(wire.host, *listed).stdout, what="the worker")
            before = resent(wire.host) + resent(wire.worker)
            wire.loss, wire.twice, wire.delay = conditions
            until = time.monotonic() + seconds

            def call(caller):
                number = 0
                while time.monotonic() < until or number * CALLERS < at_least:
                    number += 1
                    name = f"{caller}-{number}"
                    message = f"{name} {'x' * SIZES[number % len(SIZES)]}"
                    began = time.monotonic()
                    while True:
                        answer = inside(
                            wire.worker, "call", f"count/{caller}", message, "--url", url,
                            "--timeout", f"{patience}s", timeout=patience + 60,
                        )  # fmt: skip
                        is_over = time.monotonic() > began + patience
                        if UNREACHED not in answer.stderr or is_over:
                            break
                    with lock:
                        ended.slowest = max(ended.slowest, time.monotonic() - began)
                        ended.sent.append(name)
                        if answer.returncode == 0 and answer.stdout.strip() == message:
                            ended.answered += 1
                        else:
                            ended.failed.append(f"{name}: {answer.stdout[:100]}{answer.stderr}")

            callers = [threading.Thread(target=call, args=(n,)) for n in range(CALLERS)]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
            ended.resent = resent(wire.host) + resent(wire.worker) - before
        ended.ran = Path(log.name).read_text().split()
    if not ended.failed and sorted(ended.ran) != sorted(ended.sent):
        ended.failed.append(f"sent {ended.sent}, but these ran: {ended.ran}")
    return ended


def rough(wire, ended):
    return (
        f"{ended.answered} calls answered, {len(ended.failed)} failed, the slowest after "
        f"{ended.slowest:.1f} s; of {wire.passed + wire.lost} packets {wire.lost} lost, "
        f"{wire.doubled} doubled, {wire.overtook} overtaken; {ended.resent} segments sent again"
    )


def main(minutes):
    with Wire(loss=0.2, twice=0.05, delay=(0.0, 0.4)) as wire:
        ended = storm(wire, 60 * minutes, patience=300)
    print(rough(wire, ended))
    if ended.failed or not (wire.lost and wire.doubled and wire.overtook and ended.resent):
        sys.exit("loss: FAILED\n" + "\n".join(ended.failed[:20]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    try:
        main(parser.parse_args().minutes)
    except Missing as missing:
        print(f"loss: SKIPPED, {missing}")
