"""How the GPUs are joined, as a matrix of narrow columns or as lines of GPUs with equal links."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

FEW = 3  # pairs of groups that have a line each


def link_table(machine: dict[str, Any]) -> Table:
    """A row and a column a GPU; * marks P2P. No cell is ever broken."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    numbers = range(len(machine["p2p"]))
    table.add_column("links, * P2P", no_wrap=True)
    for j in numbers:
        table.add_column(str(j), no_wrap=True)
    for i in numbers:
        cells = ["X" if i == j else _name(machine, i, j, "*", "") for j in numbers]
        table.add_row(f"GPU {i}", *cells)
    return table


def link_lines(machine: dict[str, Any]) -> list[str]:
    """ "GPU 0-7: all pairs NV18, P2P" and, for pairs of groups, "GPU 0-3 to GPU 4-7: SYS, no P2P".

    A group is of GPUs whose links to all others are the same. Where there are many groups, the
    usual link between them has one line, the last.
    """
    groups = _groups(machine)
    lines, between = [], {}
    for number, group in enumerate(groups):
        if len(group) > 1:
            which = "all pairs " if len(group) > 2 else ""
            link = _name(machine, group[0], group[1], ", P2P", ", no P2P")
            lines.append(f"GPU {_ranges(group)}: {which}{link}")
        for other in groups[number + 1 :]:
            link = _name(machine, group[0], other[0], ", P2P", ", no P2P")
            between.setdefault(link, []).append((group, other))
    usual = max(between, key=lambda link: len(between[link]), default=None)
    for link, pairs in between.items():
        if link != usual or len(pairs) <= FEW:
            lines += [f"GPU {_ranges(a)} to GPU {_ranges(b)}: {link}" for a, b in pairs]
    if usual and len(between[usual]) > FEW:
        lines.append(f"all other pairs: {usual}")
    return lines


def _name(machine: dict[str, Any], i: int, j: int, able: str, unable: str) -> str:
    link = machine["links"][i][j] if machine["links"] else "?"
    return link + (able if machine["p2p"][i][j] else unable)


def _groups(machine: dict[str, Any]) -> list[list[int]]:
    """GPUs in order, each in the first group to whose members it is as they are to each other."""
    numbers = range(len(machine["p2p"]))
    groups: list[list[int]] = []
    for i in numbers:
        for group in groups:
            if _fits(machine, i, group, numbers):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def _fits(machine: dict[str, Any], i: int, group: Sequence[int], numbers: Sequence[int]) -> bool:
    def name(a: int, b: int) -> Any:
        return _name(machine, a, b, "*", ""), _name(machine, b, a, "*", "")

    first = group[0]
    alike = all(name(i, j) == name(first, j) for j in numbers if j not in (i, first))
    within = len(group) == 1 or name(i, first) == name(first, group[1])
    return alike and within


def _ranges(numbers: Sequence[int]) -> str:
    """ "0-3,6" """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
