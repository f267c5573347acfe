"""All files of a result into its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ddpm_fast.scaling import report
from ddpm_fast.scaling.legacy import legacy_view
from ddpm_fast.scaling.page import write_page
from ddpm_fast.scaling.picture import draw_terminal
from ddpm_fast.scaling.plots import draw_plots
from ddpm_fast.scaling.result import CSV_NAME, JSON_NAME, write, write_csv

PAGE_NAME, PICTURE_NAME, LEGACY_NAME = "report.html", "report.png", "legacy.json"


def export(result: dict[str, Any], folder: Path, *, legacy: bool = False) -> tuple[list[Path], str]:
    """Write them; (their paths, why some are missing or ""). The JSON is written first."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / JSON_NAME, folder / CSV_NAME]
    write(paths[0], result)
    write_csv(paths[1], result)
    if legacy:
        paths.append(folder / LEGACY_NAME)
        paths[-1].write_text(json.dumps(legacy_view(result), indent=2) + "\n")
    pictures: list[Path] = []
    why = ""
    try:
        pictures = draw_plots(result, folder)
        draw_terminal(folder / PICTURE_NAME, lambda console: report.show(result, console))
        paths += [*pictures, folder / PICTURE_NAME]
    except ImportError as error:
        why = f"no pictures: {error.name or error} is not installed (pip install matplotlib)"
    paths.append(folder / PAGE_NAME)
    write_page(paths[-1], result, pictures)
    return paths, why
