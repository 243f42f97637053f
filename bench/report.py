"""The page of figures, bench/RESULTS.md."""

import argparse
import datetime
import operator
import os
import platform
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from hosts import BENCH, Host, file_system, versions
from loads import MIB, Load, Side
from micro import Micro

# A figure is a limit of the host if the host used this much of its processor, and the driver less than that.
SATURATED, UNSATURATED = 0.95, 0.9
# What was tried where a figure is not met, and what explains one.
NOTES = BENCH / "NOTES.md"
# What others may use of the machine, in processors, before a figure says little.
DISTURBED = 0.15


@dataclass
class Figures:
    """What the rounds of one side of a load gave, or why there is nothing."""

    missing: str = ""
    rounds: list[dict] = field(default_factory=list)

    @property
    def are_there(self) -> bool:
        return bool(self.rounds) and not self.missing

    def median(self, key: str) -> float:
        return statistics.median(round.get(key) or 0 for round in self.rounds)


Results = dict[tuple[Load, Side], Figures]


def figure(load: Load, figures: Figures) -> float:
    keys = {"bytes": "bytes_per_worker", "ms": "ready_ms", "times": "times"}
    return figures.median(keys.get(load.unit, "per_second"))


def shown(load: Load, value: float) -> str:
    match load.unit:
        case "bytes":
            return f"{value:,.0f} bytes each"
        case "ms":
            return f"{value:,.0f} ms"
        case "times":
            return f"{value:.2f} times"
    return f"{value:,.0f} {load.unit}/s"


def page(
    results: Results, missing: dict[Host, str], micros: list[Micro], options: argparse.Namespace
) -> str:
    now = datetime.datetime.now(datetime.timezone.utc)
    loads = list(dict.fromkeys(load for load, _ in results))
    alone = [load for load in loads if not load.series and not load.is_durable]
    durable = [load for load in loads if load.is_durable]
    lines = [
        "# Figures",
        "",
        "Written by `bench/compare`. C×K is C connections with K calls in flight on each; payloads are of 100 bytes",
        "unless said otherwise. One thread of the driver holds callers and worker on CPU 0; the host is alone on CPU 1",
        "unless said otherwise, Parlour with one thread. Each side of a load has the same driver and its own wire",
        f"protocol. Medians of up to {options.rounds} interleaved rounds of {options.duration:g} s.",
        "",
        "- `raw` is a forwarder of WebSocket frames that reads no more than four bytes of each (`bench/peers`).",
        "- `*` marks what is no limit of the host: it used less than 95 % of its CPU, or the driver more than 90 %.",
        "- `others` is what else ran on the machine, in CPUs; above 15 % a figure says little, and is in *italics*.",
        "- µs of a fan-out are until the last subscriber has the last event of a batch.",
        "",
        *machine(),
        *[f"- {line}" for line in versions(options, missing)],
        f"- {now:%Y-%m-%d %H:%M} UTC",
        "",
        "## Beside the peers",
        "",
        "| work | side | figure | ratio | at least | aim | |",
        "| --- | --- | --: | --: | --: | --: | --- |",
    ]
    for load in alone:
        lines += [row for side in load.sides if side.is_ours for row in ratios(load, side, results)]
    lines += [
        "",
        "## All loads",
        "",
        "| load | side | per second | p50 µs | p99 µs | p99.9 µs | host CPU | µs each | driver CPU | host RSS | others |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for load in alone:
        if load.unit != "bytes":
            lines += [row(load, side, results[load, side]) for side in load.sides]
    lines += [
        "",
        *(kept(durable, results, options) if durable else []),
        "## Memory of idle workers",
        "",
        "Then all connections break at once, and all workers come back at once. Times count from the first connection",
        "attempt until a worker is registered.",
        "",
        "| load | side | before MiB | after MiB | bytes each | half back | all back | host CPU | MiB then |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for load in alone:
        if load.unit == "bytes":
            lines += [memory(load, side, results[load, side]) for side in load.sides]
    lines += [
        "",
        "## As something grows",
        "",
        "Calls through `parlour.v1`, and what the same costs the blind forwarder: what grows there too is the sockets'.",
        "Payloads at 4×1, workers at 16×64, types at 8×8.",
        "",
        "| what grows | to | side | calls/s | host CPU | host µs a call | driver CPU | others |",
        "| --- | --: | --- | --: | --: | --: | --: | --: |",
    ]
    lines += [growth(load, side, results[load, side]) for load in loads if load.series for side in load.sides]
    if micros:
        lines += [
            "",
            "## The core alone",
            "",
            "`cargo bench -p parlour-core`: medians, and how often memory is allocated or an allocation grows.",
            "",
            "| what | time | allocations |",
            "| --- | --: | --: |",
            *[f"| {one.name} | {one.median} | {one.allocations:g} |" for one in micros],
        ]
    if NOTES.exists():
        lines += ["", NOTES.read_text().strip()]
    lines += ["", "## Plots", ""]
    slugs = [*(load.slug for load in (*alone, *durable)), *dict.fromkeys(load.series for load in loads if load.series)]
    lines += [f"![{slug}](plots/{slug.replace(' ', '-')}.svg)" for slug in slugs]
    return "\n".join(lines) + "\n"


def ratios(load: Load, side: Side, results: Results) -> list[str]:
    """Parlour's figure beside each peer's."""
    ours = results[load, side]
    if not ours.are_there:
        return [f"| {load.title} | {side.name} | missing: {tidy(ours.missing)} | | | | |"]
    value = figure(load, ours)
    if limits := load.most or load.per_second:
        least, aim = limits
        reaches = operator.le if load.most else operator.ge
        verdict = "aim met" if reaches(value, aim) else "met" if reaches(value, least) else "**not met**"
        figure_shown = emphasis(shown(load, value), ours)
        return [f"| {load.title} | {side.name} | {figure_shown} | | {least:,} | {aim:,} | {verdict} |"]
    rows = []
    for other in load.sides:
        theirs = results[load, other]
        if other.is_ours or not theirs.are_there or not figure(load, theirs):
            continue
        ratio = value / figure(load, theirs)
        cells = ["", "", ""]
        if other.name in load.wanted:
            least, aim = load.wanted[other.name]
            verdict = "met" if ratio >= least else "**not met**"
            if aim and ratio >= aim:
                verdict = "aim met"
            cells = [f"{least:g}", f"{aim:g}" if aim else "", verdict]
        times = emphasis(f"{ratio:.2f} × {other.name}", ours, theirs)
        rows.append(
            f"| {load.title} | {side.name} | {shown(load, value)} | {times} | {' | '.join(cells)} |"
        )
    return rows or [f"| {load.title} | {side.name} | {shown(load, value)} | | | | |"]


def kept(loads: list[Load], results: Results, options: argparse.Namespace) -> list[str]:
    """What is acknowledged when it is on the disk."""
    lines = [
        "## Messages that outlive the host",
        "",
        "Payloads are of 256 bytes, and each is acknowledged once it is on the disk, except where NATS is said not to",
        f"fsync. The files are on {file_system(options.data)}, in a directory that is new for each measurement.",
        "",
        "- HTTP/1.1 carries one message at a time on a connection: over REST, C×K is C·K connections.",
        "- `raw` appends what a round of reads brings to a file, calls `fdatasync` once, and then answers.",
        "- NATS is JetStream with one stream in files: with `sync_interval: always`, and as it is by default, where it",
        "  acknowledges without an fsync. With an idempotency key its messages have a `Nats-Msg-Id`.",
        "- A life is over when its message was accepted, delivered to an agent, answered and settled.",
        "- Plain calls have their p99 alone, then beside messages that come evenly, half as many as the host is capable of.",
        "",
        "| work | side | figure | ratio | at least | aim | |",
        "| --- | --- | --: | --: | --: | --: | --- |",
        *[line for load in loads for side in load.sides if side.is_ours for line in ratios(load, side, results)],
        "",
        "| load | side | per second | p50 µs | p99 µs | p99.9 µs | host CPU | µs each | driver CPU | host RSS | others |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
        *[row(load, side, results[load, side]) for load in loads if load.unit != "ms" for side in load.sides],
        "",
    ]
    for load in loads:
        for side in load.sides:
            found = results[load, side]
            if load.unit == "ms" and found.are_there:
                lines += [reopened(found), ""]
            if load.unit == "times" and found.are_there:
                lines += [disturbed(found), ""]
    return lines


def reopened(figures: Figures) -> str:
    of = figures.median
    return (
        f"Reopened after `kill -9` with {of('pending'):,.0f} messages that wait, {of('data_bytes') / MIB:,.0f} MiB of files"
        f" in the page cache: ready after {of('ready_ms'):,.0f} ms and {of('host_cpu_ms'):,.0f} ms of CPU,"
        f" {of('rss_bytes') / MIB:,.0f} MiB of memory then (500 MiB at most are wanted) and {of('peak_rss_bytes') / MIB:,.0f} at the"
        f" most; {of('rss_before_bytes') / MIB:,.0f} MiB before it was killed."
    )


def disturbed(figures: Figures) -> str:
    of = figures.median
    return (
        f"Plain calls: p99 {of('p99_alone_us'):,.0f} µs at {of('per_second_alone'):,.0f} a second alone,"
        f" {of('p99_us'):,.0f} µs at {of('per_second'):,.0f} beside {of('accepted_per_second'):,.0f} durable messages a second;"
        f" {of('saturated_per_second'):,.0f} of those alone."
    )


def row(load: Load, side: Side, figures: Figures) -> str:
    if not figures.are_there:
        return f"| {load.title} | {side.name} | missing: {tidy(figures.missing)} |" + " |" * 8
    host, driver = figures.median("host_cpu"), figures.median("driver_cpu")
    cpus = load.cpus.split(",")
    if "0" in cpus:
        is_limit = host + driver >= SATURATED * len(cpus)
    else:
        is_limit = host >= SATURATED and driver < UNSATURATED
    cells = [
        *[load.title, side.name],
        emphasis(f"{figures.median('per_second'):,.0f}", figures) + ("" if is_limit else " *"),
        *[f"{figures.median(key):,.0f}" for key in ("p50_us", "p99_us", "p999_us")],
        *[f"{host:.0%}", f"{figures.median('host_us_per_call'):,.2f}", f"{driver:.0%}"],
        *[f"{figures.median('host_rss_bytes') / MIB:.1f} MiB", f"{figures.median('others'):.0%}"],
    ]
    return f"| {' | '.join(cells)} |"


def memory(load: Load, side: Side, figures: Figures) -> str:
    if not figures.are_there:
        return f"| {load.title} | {side.name} | missing: {tidy(figures.missing)} |" + " |" * 6
    before, after = figures.median("rss_before_bytes"), figures.median("rss_after_bytes")
    cells = [f"{before / MIB:.1f}", f"{after / MIB:.1f}", f"{figures.median('bytes_per_worker'):,.0f}"]
    if "all_back_ms" in figures.rounds[0]:
        keys = ("back_p50_ms", "all_back_ms", "back_host_cpu_ms")
        cells += [f"{figures.median(key):,.0f} ms" for key in keys]
        cells.append(f"{figures.median('back_rss_bytes') / MIB:.1f}")
    else:
        cells += [""] * 4
    return f"| {load.title} | {side.name} | {' | '.join(cells)} |"


def growth(load: Load, side: Side, figures: Figures) -> str:
    if not figures.are_there:
        return f"| {load.series} | {load.title} | {side.name} | missing: {tidy(figures.missing)} | | | | |"
    cells = [
        *[load.series, load.title, side.name, emphasis(f"{figures.median('per_second'):,.0f}", figures)],
        *[f"{figures.median('host_cpu'):.0%}", f"{figures.median('host_us_per_call'):,.2f}"],
        *[f"{figures.median('driver_cpu'):.0%}", f"{figures.median('others'):.0%}"],
    ]
    return f"| {' | '.join(cells)} |"


def emphasis(text: str, *figures: Figures) -> str:
    """What others disturbed is set in italics."""
    return f"*{text}*" if any(one.median("others") > DISTURBED for one in figures) else text


def tidy(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:300]


def machine() -> list[str]:
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return [
        f"- {os.cpu_count()} CPUs, {cpu[1] if cpu else 'unknown'}; {platform.system()} {platform.release()},"
        f" TCP congestion control {congestion.read_text().strip() if congestion.exists() else 'unknown'}",
    ]
