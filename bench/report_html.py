"""The report as one HTML page that needs nothing beside it: the plots are PNGs within."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

from bench.report_data import BadResults, Bar, Row, Section, Suite, short
from bench.roofline import PARTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2330; --line: #dde2ea; --track: #eef1f5; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171c; --ink: #dfe4ec; --line: #39414d; --track: #232830; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--page); }
table { border-collapse: collapse; margin: .7rem 0; font-size: 13px; display: block;
  overflow-x: auto; }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid var(--line); }
th { border-bottom: 2px solid #8c97a8; }
h1, h2, p { overflow-wrap: anywhere; }
h2 { margin-top: 2.2rem; }
img { max-width: 100%; }
.row { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 5fr); gap: .1rem 1rem;
  margin: .45rem 0; font-size: 13px; line-height: 1.35; }
.bar { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: .7rem; }
.track { display: flex; height: 1em; margin: .15em 0; background: var(--track); }
.track i, .key i { background-color: var(--part); }
.key span { display: inline-block; margin-right: 1em; }
.key i { display: inline-block; width: 2em; height: .8em; margin-right: .4em; }
.PREDICTED i { background-image: repeating-linear-gradient(45deg, transparent 0 3px,
  var(--page) 3px 6px); }
.floor i { opacity: .45; }
@media (max-width: 640px) { .row, .bar { grid-template-columns: minmax(0, 1fr); gap: 0; } }
"""
OURS, OTHERS = "#1f6feb", "#a8b1bf"
COLOURS = dict(zip(PARTS, ("#1f6feb", "#d9822b", "#8e5bd0", "#2c9c69", "#c2477f", "#8a94a3"),
                   strict=True))  # fmt: skip


def page(suites: Sequence[Suite], sections: Sequence[Section]) -> str:
    """raises BadResults if matplotlib is not installed"""
    parts = [_section(section) for section in sections]
    for suite in suites:
        parts += [_image(title, figure) for title, figure in _plots(suite)]
    title = "ddpm_fast: measurements and predictions"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{title}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(line)}</p>" for line in section.lines]
    if section.plot:
        parts += [_key(section), *(_group(what, bars) for what, bars in section.plot)]
    if section.table:
        head, *rows = section.table
        cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
        body = "\n".join(f"<tr>{line}</tr>" for line in [cells, *lines])
        table = f"<table>\n{body}\n</table>"
        folded = f"<details><summary>The same as a table</summary>\n{table}\n</details>"
        parts.append(folded if section.plot else table)
    return "\n".join(parts)


def _key(section: Section) -> str:
    """What hatched and solid mean, and the colours of the parts that the bars have."""
    pieces = {part for _, bars in section.plot for bar in bars for part, _ in bar.pieces}
    keys = [(kind, kind, "var(--ink)") for kind in ("PREDICTED", "measured")]
    keys += [("", part, colour) for part, colour in COLOURS.items() if part in pieces]
    shown = [
        f'<span class="{kind}"><i style="--part:{colour}"></i>{name}</span>'
        for kind, name, colour in keys
    ]
    return f'<p class="key">{" ".join(shown)}</p>'


def _group(what: str, bars: Sequence[Bar]) -> str:
    lines = []
    for bar in bars:
        track = "".join(
            f'<i title="{part}" style="width:{width:.2f}%;--part:{COLOURS.get(part, OURS)}"></i>'
            for part, width in bar.pieces
        )
        text = f"<span>{escape(bar.text)}</span>"
        lines.append(f'<div class="bar"><span class="track {bar.kind}">{track}</span>{text}</div>')
    return f'<div class="row"><span>{escape(what)}</span><div>{"".join(lines)}</div></div>'


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
    return found


def _bars(bars: Sequence[tuple[str, float]], unit: str, title: str) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadResults("--html needs matplotlib: pip install matplotlib") from None
    bars = sorted(bars, key=lambda bar: -bar[1])
    figure = Figure(figsize=(9, 0.9 + 0.32 * len(bars)), layout="constrained")
    axes = figure.subplots()
    colors = [OURS if name.startswith("ours") else OTHERS for name, _ in bars]
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
