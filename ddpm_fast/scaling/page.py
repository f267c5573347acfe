"""A result as one HTML file that needs no other: report, plots and the result's JSON inside."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ddpm_fast.scaling import report

STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:62em;margin:2em auto;padding:0 1em}"
    "pre{overflow-x:auto;background:#f6f6f6;padding:1em;line-height:1.25}"
    "img{max-width:100%;width:28em}"
)


def write_page(path: Path, result: dict[str, Any], pictures: Sequence[Path]) -> None:
    """Write the page; pictures are PNG files, which are copied into it."""
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    console = Console(file=file, width=100, highlight=False, color_system=None)
    report.show(result, console)
    file.seek(0)
    text = html.escape(file.read())
    kind = "GPUs" if result["kind"] == "gpu" else "CPU processes, not GPUs"
    title = html.escape(f"ddpm_fast scaling: {result['preset']}, {kind}")
    images = "\n".join(_image(picture) for picture in pictures)
    data = html.escape(json.dumps(result, indent=1))
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>\n<pre>{text}</pre>\n{images}\n"
        f"<details><summary>result.json</summary><pre>{data}</pre></details></body></html>\n",
        "utf-8",
    )


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = html.escape(path.stem.replace("_", " "))
    return f'<img alt="{name}" src="data:image/png;base64,{data}">'
