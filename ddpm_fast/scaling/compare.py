"""Two results side by side: what got faster or slower by more than both intervals explain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Of the same machine, words in which two runs must agree to be compared row by row
SAME = ("kind", "backend", "preset", "precision", "compile", "batch_per_rank", "global_batch")


@dataclass(frozen=True)
class Pair:
    """A row of both results; ratio is B's images/s over A's."""

    mode: str
    world_size: int
    a: float
    b: float
    efficiency_a: float
    efficiency_b: float
    ratio: float
    verdict: str


def pairs(a: dict[str, Any], b: dict[str, Any]) -> list[Pair]:
    """Rows that both have, in A's order."""
    others = {(row["mode"], row["world_size"]): row for row in b["rows"]}
    out = []
    for row in a["rows"]:
        other = others.get((row["mode"], row["world_size"]))
        if other is None:
            continue
        if other["images_per_s_high"] < row["images_per_s_low"]:
            verdict = "slower"
        elif other["images_per_s_low"] > row["images_per_s_high"]:
            verdict = "faster"
        else:
            verdict = "same"
        out.append(
            Pair(row["mode"], row["world_size"], row["images_per_s"], other["images_per_s"],
                 row["efficiency"], other["efficiency"],
                 other["images_per_s"] / row["images_per_s"], verdict)
        )  # fmt: skip
    return out


def only_in(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """ "weak N=8" for each row of A that B lacks."""
    others = {(row["mode"], row["world_size"]) for row in b["rows"]}
    keys = [(row["mode"], row["world_size"]) for row in a["rows"]]
    return [f"{mode} N={n}" for mode, n in keys if (mode, n) not in others]


def not_comparable(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What differs so that one run says nothing of the other: the work, or the machine."""
    lines = [f"{name}: {a[name]} and {b[name]}" for name in SAME if a[name] != b[name]]
    for name in ("cpu", "cores", "devices"):
        old, new = a["machine"][name], b["machine"][name]
        if old != new:
            lines.append(f"machine.{name}: {_short(old)} and {_short(new)}")
    return lines


def _short(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return "; ".join(f"{value.count(name)} x {name}" for name in dict.fromkeys(value)) or "none"


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Lines on what besides speed differs, and so may explain it."""
    lines = not_comparable(a, b)
    for name in sorted({*a["versions"], *b["versions"]}):
        old, new = a["versions"].get(name, "none"), b["versions"].get(name, "none")
        if old != new:
            lines.append(f"{name}: {old} and {new}")
    return lines
