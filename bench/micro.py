"""The benchmarks of parlour-core: run, and read from what they print."""

import re
import subprocess
from dataclasses import dataclass

from hosts import ROOT

# A benchmark's name or argument with its times; then, where it allocates, counts under headings.
TIMES = re.compile(r"^(?P<tree>[│ ]*[├╰]─ )(?P<name>\S+)\s+[\d.]+ \S+ +│ [^│]+│ (?P<median>[\d.]+ \S+)")
GROUP = re.compile(r"^(?P<tree>[│ ]*[├╰]─ )(?P<name>\S+)")
HEADING = re.compile(r"^[│ ]*(?P<what>max alloc|alloc|dealloc|grow|shrink):")
COUNT = re.compile(r"^[│ ]*?(?P<count>[\d.]+) ")


@dataclass
class Micro:
    """One benchmark: its median, and how often it allocates, or makes an allocation larger."""

    name: str
    median: str
    allocations: float = 0


def micro() -> list[Micro]:
    """Runs the benchmarks on the processor that hosts are measured on."""
    command = ["cargo", "bench", "--quiet", "--package", "parlour-core", "--bench", "core"]
    subprocess.run([*command, "--no-run"], cwd=ROOT, check=True)
    options = ["--color", "never", "--max-time", "0.5", "--skip-ext-time", "true"]
    done = subprocess.run(["taskset", "-c", "1", *command, "--", *options], cwd=ROOT,
                          capture_output=True, text=True, check=True)  # fmt: skip
    return read(done.stdout)


def read(text: str) -> list[Micro]:
    """What the benchmarks printed."""
    found: list[Micro] = []
    path: list[str] = []
    heading = ""
    for line in text.splitlines():
        named = TIMES.match(line) or GROUP.match(line)
        if named:
            depth = len(named["tree"]) // 3 - 1
            path[depth:] = [named["name"]]
            heading = ""
            if "median" in named.groupdict():
                found.append(Micro(" ".join(path), named["median"]))
        elif above := HEADING.match(line):
            heading = above["what"]
        elif heading in ("alloc", "grow") and found and (count := COUNT.match(line)):
            # The line below gives the same in bytes.
            found[-1].allocations += float(count["count"])
            heading = ""
    return found
