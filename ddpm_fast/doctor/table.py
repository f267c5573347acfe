"""Rows as a table for people, readable in 80 columns and without colour, or as JSON."""

from __future__ import annotations

import io
import json as json_module
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from ddpm_fast.doctor.rows import Row

WIDTH = 80
# In the order of weight
STYLES = {"ok": "green", "optional": "dim", "slower": "yellow", "fails": "bold red"}


def show(rows: Sequence[Row], *, json: bool = False) -> None:
    """Print the rows to stdout."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a row may hold any path or message
    if json:
        print(json_module.dumps([asdict(row) for row in rows], indent=1))
        return
    try:
        _print_table(rows)
    except ImportError:  # rich is one of the pieces that may be missing
        for row in rows:
            print(f"{row.name:<14} {row.status:<9} {row.found}")
        print()
    _print_mends(rows)
    print(_verdict(rows))


def _print_table(rows: Sequence[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Piece", no_wrap=True)
    table.add_column("Status", no_wrap=True)
    table.add_column("Found", overflow="fold")
    for row in rows:
        # Text, not str: a message's square brackets are no markup.
        table.add_row(row.name, Text(row.status, STYLES[row.status]), Text(row.found))
    Console(highlight=False).print(table)


def _print_mends(rows: Sequence[Row]) -> None:
    """Each command once, on a line of its own that is never broken, so that it can be copied."""
    mended: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: list(STYLES).index(row.status), reverse=True):
        if row.mend:
            mended.setdefault(row.mend, []).append(row)
    for mend, those in mended.items():
        optional = all(row.status == "optional" for row in those)
        names = ", ".join(row.name for row in those)
        title = f"To {'have' if optional else 'mend'} {names}:"
        print(textwrap.fill(title, WIDTH), f"    {mend}", "", sep="\n")


def _verdict(rows: Sequence[Row]) -> str:
    failing = [row.name for row in rows if row.status == "fails"]
    if failing:
        text = f"Training cannot run on this machine. What fails: {', '.join(failing)}"
        return textwrap.fill(text, WIDTH)
    return "Training can run on this machine: python -m ddpm_fast.train --compile"
