"""Bars of figures as SVG, for a light page and for a dark one."""

from html import escape
from pathlib import Path

from loads import Load
from report import Results, figure

WIDTH, LABEL, VALUE, BAR, GAP, TOP = 720, 230, 110, 22, 10, 44

STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328; }
  .title { font-weight: 600; font-size: 14px; }
  .ours { fill: #0969da; } .theirs { fill: #8c959f; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .ours { fill: #4493f8; } .theirs { fill: #6e7681; }
  }
"""


def draw(results: Results, place: Path) -> None:
    """Writes one plot for each load that has figures, and one for each series."""
    place.mkdir(exist_ok=True)
    loads = dict.fromkeys(load for load, _ in results)
    for load in loads:
        sides = [(side, results[load, side]) for side in load.sides]
        rows = [(side.name, figure(load, found), side.is_ours) for side, found in sides if found.are_there]
        if rows and not load.series:
            (place / f"{load.slug}.svg").write_text(bars(f"{load.title}: {per(load)}", rows))
    for series in dict.fromkeys(load.series for load in loads if load.series):
        found = [
            (f"{load.title}, {side.name}", results[load, side], side.is_ours)
            for load in loads
            for side in load.sides
            if load.series == series
        ]
        rows = [(name, one.median("host_us_per_call"), is_ours) for name, one, is_ours in found if one.are_there]
        if rows:
            slug = series.replace(" ", "-")
            (place / f"{slug}.svg").write_text(bars(f"host's CPU per call in µs, by {series}", rows))


def per(load: Load) -> str:
    units = {
        "bytes": "bytes of the host's memory each",
        "ms": "ms until it is ready",
        "times": "p99 of calls, times what it is alone",
    }
    return units.get(load.unit, f"{load.unit} per second")


def bars(title: str, rows: list[tuple[str, float, bool]]) -> str:
    """A bar for each row, from zero, with its name before it and its value behind it."""
    height = TOP + len(rows) * (BAR + GAP)
    most = max(value for _, value, _ in rows) or 1
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<text class="title" x="0" y="20">{escape(title)}</text>',
    ]
    for place, (name, value, is_ours) in enumerate(rows):
        y = TOP + place * (BAR + GAP)
        length = max(1, round(value / most * (WIDTH - LABEL - VALUE)))
        kind = "ours" if is_ours else "theirs"
        shown = f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"
        lines += [
            f'<text x="0" y="{y + 16}">{escape(name)}</text>',
            f'<rect class="{kind}" x="{LABEL}" y="{y}" width="{length}" height="{BAR}" rx="3"/>',
            f'<text x="{LABEL + length + 8}" y="{y + 16}">{shown}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"
