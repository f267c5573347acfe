"""The GPU suite's results as one table that a terminal's last page holds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.results import SUITE

MOST_CHARACTERS = 9_500
MOST_LINES = 60  # of one stage
WIDTH = 150
COLUMNS = (
    "ms", "gb_s", "tflop_s", "images_per_s", "mfu_percent", "gpu_busy_percent", "peak_gib",
    "percent_of_floor", "speedup",
)  # fmt: skip


def table(suite: dict[str, Any], out: Path) -> str:
    """The smoke's verdict, where it ran, then each stage with its rows; a line per kernel pass with
    all it was compared with. suite: what `out`/suite.json holds"""
    versions = " ".join(f"{name} {value}" for name, value in suite.get("versions", {}).items())
    dry_run = "DRY RUN, no figure means anything. " if suite["dry_run"] else ""
    where = [suite.get("device", "unknown"), f"commit {suite.get('commit', '?')}", versions]
    where += [f"SDPA {suite['sdpa_backend']}"] if suite.get("sdpa_backend") else []
    head = dry_run + ", ".join(where)
    verdict = [row["found"] for row in suite["stages"].get("smoke", {}).get("rows", [])[:1]]
    blocks = [[*verdict, head]]
    for stage, data in suite["stages"].items():
        count = len(data.get("left_out", []))
        left_out = f", {count} left out for lack of time" if count else ""
        title = f"== {stage}: {data['status']}, {data['seconds']:g} s{left_out}"
        blocks.append([title, *_lines(data)])
        if data["status"] != "done":
            blocks[-1] += [f"  | {line}" for line in data.get("log", "").splitlines()[-8:]]
    return _fit(blocks, out)


def _lines(data: dict[str, Any]) -> list[str]:
    """Failures of tests come before the counts: a long block loses its last lines."""
    rows = data.get("rows", [])
    if data.get("stage") == "kernels":
        return [_kernel_line(group) for group in _grouped(rows)]
    if data.get("stage") == "tests":
        rows = [*rows[1:], *rows[:1]]
    if data.get("stage") == "smoke":
        rows = sorted(rows[1:], key=lambda row: "why_not" not in row)
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
            shown = ("parity", "fails", "started")
            if row["impl"] == "ours" or any(word in row["why_not"] for word in shown):
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
                lines.append(f"... {len(block) - most} lines more in {out.name}/{SUITE}")
        text = "\n".join(lines)
        if len(text) <= MOST_CHARACTERS or most <= 2:
            return text[:MOST_CHARACTERS]
        most -= 2
