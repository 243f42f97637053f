"""The page of figures, bench/RESULTS.md."""

import argparse
import datetime
import os
import platform
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from hosts import BENCH, Host, versions
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
    return figures.median("bytes_per_worker" if load.unit == "bytes" else "per_second")


def page(
    results: Results, missing: dict[Host, str], micros: list[Micro], options: argparse.Namespace
) -> str:
    now = datetime.datetime.now(datetime.timezone.utc)
    loads = list(dict.fromkeys(load for load, _ in results))
    alone = [load for load in loads if not load.series]
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
    slugs = [*(load.slug for load in alone), *dict.fromkeys(load.series for load in loads if load.series)]
    lines += [f"![{slug}](plots/{slug.replace(' ', '-')}.svg)" for slug in slugs]
    return "\n".join(lines) + "\n"


def ratios(load: Load, side: Side, results: Results) -> list[str]:
    """Parlour's figure beside each peer's."""
    ours = results[load, side]
    if not ours.are_there:
        return [f"| {load.title} | {side.name} | missing: {tidy(ours.missing)} | | | | |"]
    value = figure(load, ours)
    rows = []
    if load.most:
        least, aim = load.most
        verdict = "met" if value <= least else "**not met**"
        rows.append(
            f"| {load.title} | {side.name} | {value:,.0f} bytes each | | {least:,} | {aim:,} | {verdict} |"
        )
        return rows
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
        shown = emphasis(f"{ratio:.2f} × {other.name}", ours, theirs)
        rows.append(
            f"| {load.title} | {side.name} | {value:,.0f} {load.unit}/s | {shown} | {' | '.join(cells)} |"
        )
    return rows or [f"| {load.title} | {side.name} | {value:,.0f} {load.unit}/s | | | | |"]


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
