"""What is asked of the hosts: each load is one figure on each of its sides."""

import argparse
import os
from dataclasses import dataclass, field

from hosts import (
    AUTOGEN,
    AXUM,
    BENCH,
    NATS,
    NATS_DISK,
    NATS_FSYNC,
    PARLOUR,
    PARLOUR_DISK,
    RAW,
    RAW_DISK,
    SLIM,
    Host,
)

MIB = 1 << 20


@dataclass(frozen=True)
class Side:
    """One host under a load, and how the driver is told to load it."""

    name: str
    host: Host
    arguments: tuple[str, ...]
    # The program that loads it: the driver in `parlour`, or one of a client library.
    driver: str = "bench"

    @property
    def is_ours(self) -> bool:
        return self.host.is_ours

    def command(
        self, options: argparse.Namespace, load: "Load", url: str, host_pid: int
    ) -> list[str]:
        """What loads it, on the first processor."""
        if load.unit == "ms":
            # It starts its hosts itself.
            driver = [str(options.parlour), "--output", "jsonl", "bench", *self.arguments]
            return [*driver, "--data", str(options.data / "parlour"), *options.set]
        target = ["--url", url, "--host-pid", str(host_pid)]
        if self.driver == "bench":
            driver = [str(options.parlour), "--output", "jsonl", "bench"]
            if load.unit != "bytes":
                target += ["--duration", f"{options.duration * 1000:.0f}ms"]
                target += ["--warmup", f"{options.warmup * 1000:.0f}ms"]
            return [*driver, *self.arguments, *target, "--pin", "0"]
        target += ["--duration", str(options.duration), "--warmup", str(options.warmup)]
        if self.driver == "sdk":
            library = [str(options.peers / "sdk-load")]
        else:
            library = [options.python, str(BENCH / "slim_peer.py"), "load"]
        return ["taskset", "-c", "0", *library, *self.arguments, *target]


@dataclass(frozen=True)
class Load:
    """One piece of work."""

    slug: str
    title: str
    sides: tuple[Side, ...]
    # What is counted: calls, deliveries, events, messages or lives per second; or bytes, milliseconds until it
    # is ready, or how many times as long something takes.
    unit: str = "calls"
    # How many times each peer's figure Parlour is to reach at least, and is to aim at.
    wanted: dict[str, tuple[float, float | None]] = field(default_factory=dict, hash=False)
    # The most that a figure in bytes, milliseconds or times may be at least, and is to aim at.
    most: tuple[float, float] | None = None
    # How much a figure per second is to be at least, and is to aim at.
    per_second: tuple[int, int] | None = None
    # How long one measurement may take, in seconds.
    patience: float = 120
    # Processors of the host; the driver has the first.
    cpus: str = "1"
    # Settings of Parlour beside those of the run.
    settings: tuple[str, ...] = ()
    # Loads of one series differ in one number, and are shown together.
    series: str = ""

    @property
    def is_durable(self) -> bool:
        return any(side.host.keeps for side in self.sides)


def calls(slug: str, title: str, connections: int, in_flight: int, *, payload: int = 100,
          wanted: dict | None = None, cpus: str = "1") -> Load:  # fmt: skip
    """Calls through `parlour.v1`, NATS and the blind forwarder."""
    shape = ("call", "--connections", str(connections), "--in-flight", str(in_flight),
             "--payload", str(payload))  # fmt: skip
    sides = [
        Side("raw", RAW, (*shape, "--door", "raw")),
        Side("NATS", NATS, (*shape, "--door", "nats")),
        Side("Parlour", PARLOUR, (*shape, "--door", "v1")),
    ]
    if connections * in_flight > 1:
        several = (*shape, "--door", "v1", "--coalesce")
        sides.append(Side("Parlour, several frames a message", PARLOUR, several))
    return Load(slug, title, tuple(sides), wanted=wanted or {}, cpus=cpus)


def fanout(slug: str, title: str, batch: int, wanted: dict) -> Load:
    shape = ("fanout", "--subscribers", "100", "--batch", str(batch))
    sides = [
        Side("raw", RAW, (*shape, "--door", "raw")),
        Side("NATS", NATS, (*shape, "--door", "nats")),
        Side("Parlour", PARLOUR, (*shape, "--door", "v1")),
    ]
    if batch > 1:
        several = (*shape, "--door", "v1", "--coalesce")
        sides.append(Side("Parlour, several frames a message", PARLOUR, several))
    return Load(slug, title, tuple(sides), unit="deliveries", wanted=wanted)


def dialect(slug: str, title: str, door: str, wanted: dict | None = None) -> Load:
    shape = ("call", "--door", door, "--connections", "64")
    sides = (Side("0.1.0", AUTOGEN, shape), Side("Parlour", PARLOUR, shape))
    return Load(slug, title, sides, wanted=wanted or {})


def rest(connections: int, wanted: dict | None = None) -> Load:
    shape = ("call", "--door", "rest", "--connections", str(connections))
    sides = (Side("axum", AXUM, shape), Side("Parlour", PARLOUR, shape))
    return Load(f"rest-{connections}x1", f"REST, {connections}×1", sides, wanted=wanted or {})


def libraries(in_flight: int, wanted: dict | None = None) -> Load:
    """The same loop through client libraries, caller and worker alike."""
    count = ("--in-flight", str(in_flight))
    sides = (
        Side("async-nats", NATS, ("--library", "async-nats", *count), driver="sdk"),
        Side("SLIM, Python", SLIM, count, driver="slim"),
        Side("Parlour, Rust SDK", PARLOUR, ("--library", "parlour", *count), driver="sdk"),
    )
    title = f"client libraries, {in_flight} in flight"
    return Load(f"libraries-{in_flight}", title, sides, wanted=wanted or {})


def idle(count: int, *, wanted: tuple[int, int], dialects: bool = False, reconnect: bool = False) -> Load:
    shape = ("idle", "--workers", str(count), *(["--reconnect"] if reconnect else []))
    sides = [
        Side("raw", RAW, (*shape, "--door", "raw")),
        Side("NATS", NATS, (*shape, "--door", "nats")),
        Side("Parlour", PARLOUR, (*shape, "--door", "v1")),
    ]
    if dialects:
        sides[2:2] = [Side("0.1.0", AUTOGEN, (*shape, "--door", "dialect"))]
        sides.append(Side("Parlour, dialect", PARLOUR, (*shape, "--door", "dialect")))
    title = f"{count:,} idle workers"
    return Load(f"idle-{count}", title, tuple(sides), unit="bytes", most=wanted)


def series(slug: str, name: str, title: str, *shape: str, ours: tuple[str, ...] = (),
           beside_raw: bool = True) -> Load:  # fmt: skip
    """One point of a series; `raw` shows what of its cost is that of the sockets."""
    sides = [Side("Parlour", PARLOUR, ("call", "--door", "v1", *shape, *ours))]
    if beside_raw:
        sides.insert(0, Side("raw", RAW, ("call", "--door", "raw", *shape)))
    return Load(slug, title, tuple(sides), series=name)


def accepts(connections: int, in_flight: int, *, key: bool = False, wanted: dict) -> Load:
    """Messages of 256 bytes, acknowledged when they are on the disk."""
    several = ("accept", *shape(connections, in_flight))
    keys = ("--idempotency-key",) if key else ()
    count = connections * in_flight
    # HTTP/1.1 carries one message at a time on a connection.
    rest = ("accept", "--door", "rest", *shape(count, 1), *keys)
    sides = [
        Side("NATS, fsync each", NATS_FSYNC, (*several, "--door", "nats", *keys)),
        Side("NATS, no fsync", NATS_DISK, (*several, "--door", "nats", *keys)),
        Side("Parlour", PARLOUR_DISK, (*several, "--door", "v1", *keys)),
        Side("Parlour, REST" + (f", {count}×1" if in_flight > 1 else ""), PARLOUR_DISK, rest),
    ]
    if in_flight > 1:
        together = Side("Parlour, several frames a message", PARLOUR_DISK,
                        (*several, "--door", "v1", "--coalesce", *keys))  # fmt: skip
        sides.insert(-1, together)
    if not key:
        sides.insert(0, Side("raw", RAW_DISK, (*several, "--door", "raw")))
    slug = f"accept-{connections}x{in_flight}" + ("-key" if key else "")
    title = f"durable accept, {connections}×{in_flight}" + (", idempotency key" if key else "")
    return Load(slug, title, tuple(sides), unit="messages", wanted=wanted)


def against(fsync: tuple[float, float], raw: tuple[float, float] | None = None) -> dict:
    return {"NATS, fsync each": fsync} | ({"raw": raw} if raw else {})


def lives() -> Load:
    side = ("life", "--door", "v1", *shape(8, 64), *KEPT)
    sides = (Side("Parlour", PARLOUR_DISK, side),
             Side("Parlour, several frames a message", PARLOUR_DISK, (*side, "--coalesce")))  # fmt: skip
    return Load("life-8x64", "whole lives, 8×64, 10⁶ settled kept", sides, unit="lives",
                per_second=(40_000, 100_000), patience=900, settings=ROOM_FOR_KEPT)  # fmt: skip


def lives_over_rest() -> Load:
    side = Side("Parlour, REST, 512×1", PARLOUR_DISK, ("life", "--door", "rest", *shape(512, 1), *KEPT))
    return Load("life-512x1", "whole lives over REST, 10⁶ settled kept", (side,), unit="lives",
                patience=900, settings=ROOM_FOR_KEPT)  # fmt: skip


# As many are kept as were settled before, and not just as many as the default has room for.
KEPT = ("--kept", "1000000")
ROOM_FOR_KEPT = ("--set", "durable.retention_bytes=16GiB")


def reopening() -> Load:
    side = Side("Parlour", PARLOUR_DISK, ("reopen", "--pending", "1000000"))
    return Load("reopen", "reopening with 10⁶ pending", (side,), unit="ms", most=(2_000, 500), patience=1800)


def beside() -> Load:
    side = Side("Parlour", PARLOUR_DISK,
                ("beside", *shape(8, 1), "--senders", "8", "--sending", "64"))  # fmt: skip
    return Load("beside", "plain calls, 8×1, beside half the durable rate", (side,), unit="times",
                most=(2.0, 1.3))  # fmt: skip


def shape(connections: int, in_flight: int) -> tuple[str, ...]:
    return ("--connections", str(connections), "--in-flight", str(in_flight))


def two_threads() -> Load:
    """Two processors for the host, which the driver shares where there are no more."""
    has_third = 2 in os.sched_getaffinity(0)
    title = "16×64, two CPUs for the host" + ("" if has_third else " and the driver")
    side = Side("Parlour, two threads", PARLOUR, ("call", "--door", "v1", *shape(16, 64)))
    return Load("16x64-two-cpus", title, (side,), cpus="1,2" if has_third else "0,1",
                settings=("--set", "server.threads=2"))  # fmt: skip


PAYLOADS = (("100 B", 100), ("1 KiB", 1 << 10), ("10 KiB", 10 << 10), ("100 KiB", 100 << 10),
            ("1 MiB", MIB))  # fmt: skip

LOADS = [
    calls("1x1-one-cpu", "1×1, one CPU for everything", 1, 1, cpus="0",
          wanted={"NATS": (1.0, 1.2), "raw": (0.65, 0.8)}),
    calls("1x1", "1×1", 1, 1),
    calls("8x8", "8×8", 8, 8, wanted={"NATS": (1.0, 1.3), "raw": (0.45, 0.6)}),
    calls("64x1", "64×1", 64, 1, wanted={"NATS": (1.1, 1.5), "raw": (0.6, 0.8)}),
    calls("16x64", "16×64", 16, 64, wanted={"NATS": (1.0, 1.5), "raw": (0.35, None)}),
    two_threads(),
    calls("10kib-8x8", "10 KiB, 8×8", 8, 8, payload=10 << 10,
          wanted={"NATS": (1.5, 2.0), "raw": (0.8, 1.0)}),
    fanout("fanout-64", "fan-out to 100, 64 at a time", 64, {"NATS": (1.2, 1.5)}),
    fanout("fanout-1", "fan-out to 100, one at a time", 1, {"NATS": (1.3, 1.7)}),
    Load("publish-8x8", "acknowledged events to one subscriber, 8×8",
         (Side("Parlour", PARLOUR, ("publish", *shape(8, 8))),
          Side("Parlour, several frames a message", PARLOUR,
               ("publish", *shape(8, 8), "--coalesce"))),
         unit="events"),
    dialect("rpc-64x1", "/rpc to a dialect worker, 64×1", "rpc", {"0.1.0": (30, 36)}),
    # Without HTTP on the way 0.1.0 is within 15 times of what the sockets alone allow.
    dialect("dialect-64x1", "dialect at both ends, 64×1", "dialect"),
    rest(64, {"axum": (0.75, 0.9)}),
    rest(1),
    rest(1024),
    accepts(1, 1, wanted=against((0.9, 1.1), (0.8, 0.9))),
    accepts(1, 64, wanted=against((10, 20), (0.35, 0.6))),
    accepts(8, 8, wanted=against((6, 12), (0.35, 0.6))),
    accepts(8, 64, wanted=against((20, 40))),
    accepts(8, 64, key=True, wanted=against((12, 30))),
    lives(),
    lives_over_rest(),
    reopening(),
    beside(),
    libraries(64, {"async-nats": (1.0, 1.5)}),
    libraries(1),
    idle(1_000, wanted=(16 << 10, 10 << 10), dialects=True),
    idle(10_000, wanted=(16 << 10, 130 * MIB // 10_000), reconnect=True),
    *[series(f"payload-{size}", "payload", name, *shape(4, 1), "--payload", str(size))
      for name, size in PAYLOADS],
    *[series(f"workers-{count}", "workers", f"{count:,}", *shape(16, 64), "--workers", str(count),
             ours=("--keys", "5000"))
      for count in (1, 10, 100, 1_000)],
    *[series(f"types-{count}", "registered types", f"{count:,}", *shape(8, 8), "--types", str(count),
             beside_raw=False)
      for count in (0, 1_000, 10_000, 100_000)],
]  # fmt: skip
