"""The report as one HTML page that needs nothing beside it: the plots are PNGs within."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

from bench.report_data import BadResults, Row, Suite, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bench.report import Section

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c2330; }
table { border-collapse: collapse; margin: .7rem 0; font-size: 13px; }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #dde2ea; }
th { border-bottom: 2px solid #8c97a8; }
h2 { margin-top: 2.2rem; }
img { max-width: 100%; }
"""
OURS, OTHERS = "#1f6feb", "#a8b1bf"
MOST_BARS = 40


def page(suites: Sequence[Suite], sections: Sequence[Section]) -> str:
    """raises BadResults if matplotlib is not installed"""
    parts = [_section(section) for section in sections]
    for suite in suites:
        parts += [_image(title, figure) for title, figure in _plots(suite)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>ddpm_fast: measurements</title><style>{STYLE}</style></head><body>\n"
        "<h1>ddpm_fast: measurements</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(line)}</p>" for line in section.lines]
    if section.table:
        head, *rows = section.table
        cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
        body = "\n".join(f"<tr>{line}</tr>" for line in [cells, *lines])
        parts.append(f"<table>\n{body}\n</table>")
    return "\n".join(parts)


def _plots(suite: Suite) -> list[tuple[str, Figure]]:
    found = []
    for stage in ("models", "sampling"):
        works: dict[tuple, list[Row]] = {}
        for row in suite.rows(stage):
            batch = row["batch"] if stage == "sampling" else ""
            works.setdefault((row["what"], row["preset"], batch), []).append(row)
        for (what, preset, batch), rows in works.items():
            bars = [(row["impl"], row["images_per_s"]) for row in rows]
            title = f"{what}, {preset} {batch}".strip()
            found.append((title, _bars(bars, "images per second", title)))
    kernels = [row for row in suite.rows("kernels") if row["impl"] == "ours"]
    floors = [
        (row["name"].removesuffix(" ours"), row["percent_of_floor"])
        for row in kernels
        if "percent_of_floor" in row
    ]
    if floors:
        title = "kernels: share of the floor"
        found.append((title, _bars(floors[:MOST_BARS], "% of the floor", title, ours=True)))
    return found


def _bars(bars: Sequence[tuple[str, float]], unit: str, title: str, ours: bool = False) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadResults("--html needs matplotlib: pip install matplotlib") from None
    bars = bars if ours else sorted(bars, key=lambda bar: -bar[1])
    figure = Figure(figsize=(9, 0.9 + 0.32 * len(bars)), layout="constrained")
    axes = figure.subplots()
    colors = [OURS if ours or name.startswith("ours") else OTHERS for name, _ in bars]
    found = axes.barh([name for name, _ in bars], [value for _, value in bars], color=colors)
    axes.bar_label(found, [short(value) for _, value in bars], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left")
    return figure


def _image(title: str, figure: Figure) -> str:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{escape(title)}" src="data:image/png;base64,{data}"></p>'
