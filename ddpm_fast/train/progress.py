"""What a run shows while it goes: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ddpm_fast.train.run_folder import RunFolder


@dataclass(frozen=True)
class Measured:
    """A logged step.

    step  finished steps;  peak_gib  the process's or the GPU's
    data_wait  share of the time in which the step waited for the disk, on the rank that did most
    skew  the slowest rank's forward pass and wait for data over the median one's; None: one
          process, or not known
    images_per_s_each  of one of several processes;  mfu  from 0 to 1, mfu.py; None: not known
    """

    step: int
    loss: float
    lr: float
    images_per_s: float
    grad_norm: float
    peak_gib: float
    data_wait: float = 0.0
    skew: float | None = None
    images_per_s_each: float | None = None
    mfu: float | None = None

    def row(self) -> dict[str, float | None]:
        """For JSON, which has no NaN: null."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    def line(self) -> str:
        each = f" ({self.images_per_s_each:.0f} each)" if self.images_per_s_each else ""
        mfu = f"  MFU {self.mfu:.0%}" if self.mfu else ""
        waiting = f"  data wait {self.data_wait:.0%}" if self.data_wait >= 0.01 else ""
        return (
            f"loss {self.loss:.4f}  lr {self.lr:.1e}  {self.images_per_s:.0f} img/s{each}  "
            f"grad {self.grad_norm:.3f}  mem {self.peak_gib:.2f} GiB{mfu}{waiting}"
        )


class PatientConsole(Console):
    """A console whose reader may leave (`train | head`): the run goes on, log.txt has the rest."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Display:
    """Prints to the terminal and the run's log. Use as a context: the bar ends with it."""

    def __init__(
        self,
        folder: RunFolder,
        iterations: int,
        console: Console | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        self.folder, self.iterations = folder, iterations
        self.console = console or PatientConsole(highlight=False, soft_wrap=True, quiet=quiet)
        self._bar = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[measured]}  {task.fields[left]}"),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=iterations, measured="", left="")

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """A line for the terminal and log.txt."""
        self.console.print(line, markup=False)
        self.folder.log(line)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """A spinner with the time elapsed, on a terminal."""
        if self._bar is None:
            yield
            return
        self._bar.stop()
        columns = (SpinnerColumn(), TextColumn(what), TimeElapsedColumn())
        try:
            with Progress(*columns, console=self.console, transient=True) as spinner:
                spinner.add_task(what, total=None)
                yield
        finally:
            self._bar.start()

    def stepped(self, step: int) -> None:
        """`step` steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def measured(self, values: Measured, seconds_left: float) -> None:
        """A step was logged."""
        left = f"left {_clock(seconds_left)}"
        if self._bar is not None:
            self._bar.update(self._task, measured=values.line(), left=left)
        line = f"step {values.step}/{self.iterations}  {values.line()}  {left}"
        if self._bar is None:
            self.console.print(line, markup=False)
        self.folder.log(line)


def peak_gib(device: torch.device) -> float:
    """Most memory used so far: the GPU's allocator, or the process on CPU (0 if unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
