"""How far a download or a decode is: the caller's callback, a bar on a terminal, or a line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# on_progress(what, done, total): total is 0 while it is unknown
OnProgress = Callable[[str, int, int], None]


@contextmanager
def reporting(
    what: str, total: int, *, unit: str = "images", on_progress: OnProgress | None = None
) -> Iterator[Callable[[int], None]]:
    """Yield update(done), which shows that `done` of `total` are done.

    what         "downloading <URL>", "decoding <folder>"
    total        in `unit`s, 0 if unknown
    unit         "images" or "bytes"
    on_progress  gets (what, done, total) in place of all output; None: stderr, a bar on a terminal
                 and a single line otherwise
    """
    if on_progress is not None:
        yield lambda done: on_progress(what, done, total)
    elif sys.stderr.isatty():
        with _bar(what, total, unit) as update:
            yield update
    else:
        size = f"{total / 1e6:.1f} MB" if unit == "bytes" else f"{total} {unit}"
        print(f"{what} ({size if total else 'size unknown'})", file=sys.stderr, flush=True)
        yield lambda done: None


@contextmanager
def _bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    from rich import progress  # 60 ms that only a terminal pays
    from rich.console import Console

    if unit == "bytes":
        amount = (progress.DownloadColumn(), progress.TransferSpeedColumn())
    else:
        amount = (progress.MofNCompleteColumn(),)
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        *amount,
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total or None)
        yield lambda done: bar.update(task, completed=done)
