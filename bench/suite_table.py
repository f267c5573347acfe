"""The GPU suite's results as one table that a terminal's last page holds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.results import read_json

MOST_CHARACTERS = 9_500
MOST_LINES = 60  # of one stage
WIDTH = 150
COLUMNS = ("ms", "gb_s", "tflop_s", "images_per_s", "peak_gib", "percent_of_floor", "speedup")


def table(out: Path, summary: dict[str, Any]) -> str:
    """Where it ran, then each stage with its rows; a line per kernel pass with all it was compared
    with."""
    versions = " ".join(f"{name} {value}" for name, value in summary.get("versions", {}).items())
    dry_run = "DRY RUN, no figure means anything. " if summary["dry_run"] else ""
    head = f"{dry_run}{summary['device']}, commit {summary.get('commit', '?')}, {versions}"
    blocks = [[head]]
    for entry in summary["stages"]:
        left_out = f", {entry['left_out']} left out for lack of time" if entry["left_out"] else ""
        title = f"== {entry['stage']}: {entry['status']}, {entry['seconds']:g} s{left_out}"
        data = read_json(out / f"{entry['stage']}.json")
        blocks.append([title, *_lines(data)])
        if entry["status"] != "done":
            blocks[-1] += [f"  | {line}" for line in data.get("log", "").splitlines()[-8:]]
    return _fit(blocks, out)


def _lines(data: dict[str, Any]) -> list[str]:
    rows = data.get("rows", [])
    if data.get("stage") == "kernels":
        return [_kernel_line(group) for group in _grouped(rows)]
    return [_plain_line(row) for row in rows]


def _plain_line(row: dict[str, Any]) -> str:
    shown = [f"{name}={row[name]}" for name in COLUMNS if row.get(name) is not None]
    shown += [str(row[name]) for name in ("why_not", "found") if row.get(name)]
    return f"{row['name']:<58} {' '.join(shown)}"


def _grouped(rows: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["name"].removesuffix(row["impl"]), []).append(row)
    return list(groups.values())


def _kernel_line(group: list[dict[str, Any]]) -> str:
    """Ours with its time and percentage of the floor; the others with our speedup over them."""
    cells = []
    for row in group:
        if "ms" not in row:
            # One that is not installed, or not made for this, is in the JSON.
            if row["impl"] == "ours" or "parity" in row["why_not"] or "fails" in row["why_not"]:
                cells.append(f"{row['impl']} {row['why_not'][:60]}")
        elif "speedup" in row:
            cells.append(f"{row['impl']} x{row['speedup']:.3g}")
        else:
            cells.append(f"{row['impl']} {row['ms']:.4g} ms {row['percent_of_floor']:.0f} %")
    return f"{group[0]['name'].removesuffix(group[0]['impl']):<58} {', '.join(cells)}"


def _fit(blocks: list[list[str]], out: Path) -> str:
    """At most MOST_CHARACTERS: the longest stages lose their last lines first."""
    most = MOST_LINES
    while True:
        lines = []
        for block, width in zip(blocks, (2 * WIDTH, *[WIDTH] * len(blocks)), strict=False):
            lines += [line.rstrip()[:width] for line in block[:most]]
            if len(block) > most:
                lines.append(f"... {len(block) - most} lines more in {out.name}/")
        text = "\n".join(lines)
        if len(text) <= MOST_CHARACTERS or most <= 2:
            return text[:MOST_CHARACTERS]
        most -= 2
