"""How much faster ours is than each baseline, collected while a bench session runs."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Ratio:
    """
    work      such as "training step seed-cifar10 batch 4"
    ours      label of our fastest
    speedup   median over pairs that were timed in the same round, with its 20 and 80 % quantiles
    """

    work: str
    ours: str
    baseline: str
    speedup: float
    speedup_q20: float
    speedup_q80: float
    pairs: int


def ratio_table(ratios: list[Ratio], width: int, title: str) -> str:
    """Plain text of at most `width` columns; "" without ratios."""
    if not ratios:
        return ""
    table = Table(title=title, title_justify="left")
    for name in ("what", "ours", "baseline"):
        table.add_column(name, overflow="fold")
    for name in ("ratio", "20 to 80 %", "pairs"):
        table.add_column(name, justify="right", no_wrap=True)
    for ratio in ratios:
        range_ = f"{ratio.speedup_q20:.2f} to {ratio.speedup_q80:.2f}"
        table.add_row(
            ratio.work, ratio.ours, ratio.baseline, f"{ratio.speedup:.2f}x", range_,
            str(ratio.pairs),
        )  # fmt: skip
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue().rstrip()
