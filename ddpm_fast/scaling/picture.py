"""A terminal's text as a PNG: each character in its cell, in matplotlib's monospaced font."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import DIMMED_MONOKAI

FONT_PIXELS, LINE_PIXELS, MARGIN = 18, 23, 16


def draw_terminal(path: Path, show: Callable[[Console], None], *, width: int = 80) -> None:
    """Write what `show` prints to a console of `width` columns; ImportError without matplotlib."""
    from matplotlib import get_data_path

    fonts = Path(get_data_path(), "fonts", "ttf")
    plain = ImageFont.truetype(str(fonts / "DejaVuSansMono.ttf"), FONT_PIXELS)
    bold = ImageFont.truetype(str(fonts / "DejaVuSansMono-Bold.ttf"), FONT_PIXELS)
    cell = plain.getlength("M")
    lines = _lines(show, width)
    size = (round(width * cell) + 2 * MARGIN, len(lines) * LINE_PIXELS + 2 * MARGIN)
    theme = DIMMED_MONOKAI
    image = Image.new("RGB", size, tuple(theme.background_color))
    pen = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        column = 0
        for text, style in line:
            colour = style.color or Color.default()
            fill = tuple(colour.get_truecolor(theme))
            font = bold if style.bold else plain
            for character in text:
                at = (MARGIN + column * cell, MARGIN + number * LINE_PIXELS)
                pen.text(at, character, fill, font)
                column += 1
    image.save(path)


def _lines(show: Callable[[Console], None], width: int) -> list[list[tuple[str, Style]]]:
    """What is printed, as pieces of one style, line by line."""
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    console = Console(
        file=file, record=True, width=width, highlight=False, force_terminal=True,
        color_system="truecolor", legacy_windows=False,
    )  # fmt: skip
    show(console)
    lines: list[list[tuple[str, Style]]] = [[]]
    for segment in console._record_buffer:
        if segment.control:
            continue
        for number, piece in enumerate(segment.text.split("\n")):
            if number:
                lines.append([])
            lines[-1].append((piece, segment.style or Style.null()))
    while lines and not any(text.strip() for text, _ in lines[-1]):
        lines.pop()
    return lines
