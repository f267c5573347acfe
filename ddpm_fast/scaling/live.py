"""What the command shows while it measures: a live view on a terminal, plain lines elsewhere.

A dumb terminal cannot move its cursor, so it gets the lines. One too narrow for the table has a
line a device, as figures that are cut say nothing.
"""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ddpm_fast.runtime.monitor import Sample

LEAST_WIDTH = 80  # columns that the table needs

UNTOLD = "-"
FIGURES = {
    "busy": ("utilisation", "{:.0f} %"),
    "memory": ("memory_gib", "{:.1f} GiB"),
    "power": ("watts", "{:.0f} W"),
    "temperature": ("celsius", "{:.0f} C"),
    "clock": ("sm_mhz", "{:.0f} MHz"),
    "memory clock": ("memory_mhz", "{:.0f} MHz"),
}


class LiveView:
    """Use as a context. `word` is what a rank is called; rows: how many windows there will be."""

    def __init__(self, console: Console, *, word: str, windows: int) -> None:
        self.console, self.word = console, word
        self._rate: dict[str, float] = {}
        self._live = None
        self._world_size = 0
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total} windows"), TimeElapsedColumn(),
            console=console,
        )  # fmt: skip
        self._task = self._progress.add_task("starting", total=windows)
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveView:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._live.stop()

    def world(self, world_size: int) -> None:
        """Another world size begins."""
        self._world_size = world_size
        self._show(f"{self.ranks()}: starting")
        if not self._live:
            self.console.print(f"{self.ranks()}: starting")

    def ranks(self) -> str:
        n = self._world_size
        plural = "es" if self.word.endswith("s") else "s"
        return f"{n} {self.word}{plural if n > 1 else ''}"

    def event(self, event: dict[str, Any]) -> None:
        """Something that rank 0 said."""
        text = f"{self.ranks()}, {event['what']}"
        if "window" in event:
            self._progress.advance(self._task)
            text += f": {event['images_per_s']:.0f} img/s"
            if not self._live:
                self.console.print(f"{text} (window {event['window']})")
        elif not self._live:
            self.console.print(text)
        self._show(text)

    def refresh(self, samples: list[Sample]) -> None:
        """Show the newest samples of the machine."""
        if not self._live:
            return
        if self.console.width < LEAST_WIDTH:
            self._live.update(Group(self._progress_line(), *map(_line, samples)))
        else:
            self._live.update(Group(self._progress, _table(samples)))

    def _progress_line(self) -> Text:
        task = self._progress.tasks[0]
        return Text(f"{task.description}, {task.completed}/{task.total} windows", overflow="fold")

    def _show(self, text: str) -> None:
        self._progress.update(self._task, description=text)


def _line(sample: Sample) -> Text:
    """ "GPU 0: busy 97 %, memory 12.0 GiB", without what is not told; wrapped where it must be."""
    told = [f"{name} {value}" for name, value in _figures(sample).items() if value != UNTOLD]
    return Text(f"{sample.device}: {', '.join(told) or UNTOLD}", overflow="fold")


def _table(samples: list[Sample]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("device")
    for name in FIGURES:
        table.add_column(name, justify="right")
    for sample in samples:
        table.add_row(sample.device, *_figures(sample).values())
    return table


def _figures(sample: Sample) -> dict[str, str]:
    """What a device tells, by the name that it is shown under."""
    values = ((name, getattr(sample, key), form) for name, (key, form) in FIGURES.items())
    return {name: UNTOLD if value is None else form.format(value) for name, value, form in values}
