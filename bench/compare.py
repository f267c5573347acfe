"""What got slower between two files of pytest bench --benchmark-json: python -m bench.compare A B

A row is slower if B's quantile 0.1 is above A's quantile 0.9 and the ratio of the medians is above
the threshold, faster likewise. The threshold is there because the samples of one run know nothing
of what differs between two runs, such as memory's layout or the machine's temperature.
"""

from __future__ import annotations

import argparse
import json
import math
import reprlib
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.arguments import ArgumentParser
from bench.timing import Samples

LOW, HIGH = 0.1, 0.9  # quantiles; a file without samples has quartiles only
FILE_WIDTH = 120  # columns, where the output is no terminal
NAME_WIDTH = 24  # columns that a row's name needs to be read
# A time is from a picosecond to 30 years, or the file is broken. Ratios of such times are finite.
LEAST_S, MOST_S = 1e-12, 1e9
STYLES = {"slower": "bold red", "faster": "green", "": ""}


class BrokenFile(Exception):
    """What is wrong with a file, in one line that begins with its path."""


@dataclass(frozen=True)
class Timed:
    """A row of one file.

    name            the group and the row in it, else pytest's full name
    median_s        with the quantiles LOW and HIGH of its samples
    """

    name: str
    median_s: float
    low_s: float
    high_s: float


@dataclass(frozen=True)
class Run:
    """
    rows    by pytest's full name, in the file's order
    device  of all rows, such as "NVIDIA H200" or "CPU, x86_64, AMD EPYC"
    setting what else may explain a difference: commit, versions, threads
    """

    rows: dict[str, Timed]
    device: str
    setting: dict[str, str]


@dataclass(frozen=True)
class Pair:
    """A row of both files."""

    a: Timed
    b: Timed

    @property
    def ratio(self) -> float:
        """B's median over A's: above 1 is slower."""
        return self.b.median_s / self.a.median_s

    @property
    def interval(self) -> tuple[float, float]:
        """The ratio at the far ends of both rows' quantiles; noise if 1 lies in it."""
        return self.b.low_s / self.a.high_s, self.b.high_s / self.a.low_s

    def verdict(self, threshold_percent: float) -> str:
        """ "slower", "faster", or "" if noise or the threshold explains it."""
        low, high = self.interval
        if low > 1 and self.ratio > 1 + threshold_percent / 100:
            return "slower"
        if high < 1 and 1 / self.ratio > 1 + threshold_percent / 100:
            return "faster"
        return ""


def read(path: Path) -> Run:
    """
    raises  BrokenFile
    """
    try:
        return _run(_parsed(path))
    except ValueError as error:
        raise BrokenFile(f"{path}: {error}") from None
    except RecursionError:
        raise BrokenFile(f"{path}: nested too deeply for a --benchmark-json file") from None


def table(pairs: Iterable[Pair], threshold_percent: float) -> Table:
    """A line per row, in A's order."""
    found = Table(box=SIMPLE_HEAD, pad_edge=False)
    found.add_column("row", overflow="fold")
    for name in ("median A", "median B", "B / A", "interval", "verdict"):
        found.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True)
    for pair in pairs:
        verdict, (low, high) = pair.verdict(threshold_percent), pair.interval
        found.add_row(
            Text(pair.a.name),  # whose brackets are pytest's or a group's, no markup
            _time(pair.a.median_s), _time(pair.b.median_s), f"{pair.ratio:.3f}",
            f"{low:.2f} to {high:.2f}", verdict, style=STYLES[verdict],
        )  # fmt: skip
    return found


def lines(pairs: Iterable[Pair], threshold_percent: float) -> list[tuple[str, str]]:
    """What the table says and its style, a row each, where it has no room."""
    found = []
    for pair in pairs:
        verdict, (low, high) = pair.verdict(threshold_percent), pair.interval
        times = f"{_time(pair.a.median_s)} to {_time(pair.b.median_s)}"
        text = f"{pair.a.name}: {times}, B / A {pair.ratio:.3f} ({low:.2f} to {high:.2f})"
        found.append((f"{text} {verdict}".rstrip(), STYLES[verdict]))
    return found


def differences(a: Run, b: Run) -> list[str]:
    """Lines on what besides the code may explain a ratio."""
    names = list(dict.fromkeys([*a.setting, *b.setting]))
    settings = [(name, a.setting.get(name, "none"), b.setting.get(name, "none")) for name in names]
    return [f"{name}: A {old}, B {new}" for name, old, new in settings if old != new]


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BrokenFile(f"{path}: {error.strerror}") from None
    except ValueError as error:  # no JSON, or not even text
        raise BrokenFile(f"{path}: not JSON: {error}") from None


def _run(data: Any) -> Run:
    rows, devices = {}, {}
    where = _entry(data, "the file", "machine_info", dict)
    benchmarks = _entry(data, "the file", "benchmarks", list)
    if not benchmarks:
        raise ValueError("benchmarks is empty: no row was timed")
    for i, row in enumerate(benchmarks):
        fullname = _entry(row, f"benchmarks[{i}]", "fullname", str)
        if fullname in rows:
            raise ValueError(f"benchmarks[{i}].fullname: two rows are named {fullname!r}")
        rows[fullname] = _timed(row, f"benchmarks[{i}]")
        devices[_device(row, where)] = None
    info = _extra(benchmarks[0])
    setting = {"commit": str(info.get("commit", "unknown"))}
    if isinstance(info.get("versions"), dict):
        setting |= {name: str(version) for name, version in info["versions"].items()}
    if "threads" in info:
        setting["threads"] = str(info["threads"])
    return Run(rows, " and ".join(devices), setting)


def _timed(row: dict[str, Any], at: str) -> Timed:
    stats = _entry(row, at, "stats", dict)
    name = f"{row['group']}: {row.get('name')}" if row.get("group") else row["fullname"]
    at = f"{at}.stats"
    if "data" not in stats:
        median_s, q1, q3 = (_seconds(stats, at, each) for each in ("median", "q1", "q3"))
        return Timed(name, median_s, q1, q3)
    samples = _entry(stats, at, "data", list)
    if not samples:
        raise ValueError(f"{at}.data is empty: no sample was taken")
    data = {str(i): sample for i, sample in enumerate(samples)}
    seconds = [_seconds(data, f"{at}.data", key) for key in data]
    taken = Samples(tuple(1e3 * each for each in seconds))
    low_s, high_s = (1e-3 * taken.quantile_ms(fraction) for fraction in (LOW, HIGH))
    return Timed(name, statistics.median(seconds), low_s, high_s)


def _device(row: dict[str, Any], machine: dict[str, Any]) -> str:
    """As the row says; that of a CPU with its model, which the row does not know."""
    device = str(_extra(row).get("device") or f"CPU, {machine.get('machine', 'unknown')}")
    cpu = machine.get("cpu")
    model = cpu.get("brand_raw") if isinstance(cpu, dict) else None
    return f"{device}, {model}" if device.startswith("CPU") and model else device


def _extra(row: dict[str, Any]) -> dict[str, Any]:
    found = row.get("extra_info")
    return found if isinstance(found, dict) else {}


def _entry(owner: Any, at: str, key: str, kind: type) -> Any:
    if not isinstance(owner, dict):
        raise ValueError(f"{at} must be an object, is {type(owner).__name__}")
    if key not in owner:
        raise ValueError(f"{at} has no {key!r}, as files of pytest --benchmark-json have")
    if not isinstance(owner[key], kind):
        raise ValueError(f"{at}.{key} must be {kind.__name__}, is {type(owner[key]).__name__}")
    return owner[key]


def _seconds(owner: dict[str, Any], at: str, key: str) -> float:
    value = owner.get(key)
    if type(value) not in (int, float) or not LEAST_S <= value <= MOST_S:
        raise ValueError(
            f"{at}.{key} must be seconds from {LEAST_S:g} to {MOST_S:g}, is {reprlib.repr(value)}"
        )
    return float(value)


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.4g} {unit}"
    return f"{seconds * 1e6:.4g} us"


def _percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be a percentage of at least 0")
    return value


def _show(console: Console, a: Run, b: Run, threshold_percent: float) -> int:
    """The number of rows that got slower."""

    def say(line: str, style: str = "") -> None:
        console.print(Text(line), style=style)

    pairs = [Pair(row, b.rows[name]) for name, row in a.rows.items() if name in b.rows]
    shown = table(pairs, threshold_percent)
    columns = console.measure(shown, options=console.options.update(max_width=10_000)).maximum
    names = max(len(pair.a.name) for pair in pairs)
    if columns - names + min(names, NAME_WIDTH) <= console.width:
        console.print(shown)
    else:
        for line, style in lines(pairs, threshold_percent):
            say(line, style)
    for line in differences(a, b):
        say(line)
    for label, one, other in (("A", a, b), ("B", b, a)):
        alone = [row.name for fullname, row in one.rows.items() if fullname not in other.rows]
        if alone:
            say(f"only in {label}, {len(alone)}:")
        for name in alone:
            say(f"  {name}")
    # Where eager torch and every baseline moved alike, it is the machine that changed.
    say(f"median of B / A over all rows: {statistics.median(pair.ratio for pair in pairs):.3f}")
    by_verdict = {
        verdict: [pair for pair in pairs if pair.verdict(threshold_percent) == verdict]
        for verdict in ("slower", "faster")
    }
    for verdict, found in by_verdict.items():
        beyond = f"beyond the noise and {threshold_percent:g} %"
        say(f"{verdict} {beyond}: {len(found) or 'none'} of {len(pairs)}", style=STYLES[verdict])
        for pair in sorted(found, key=lambda pair: -abs(math.log(pair.ratio))):
            times = f"{_time(pair.a.median_s)} to {_time(pair.b.median_s)}"
            say(f"  {pair.a.name}: {times}, B / A {pair.ratio:.4g}")
    return len(by_verdict["slower"])


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a row got slower beyond the noise, 2 if the files cannot be compared."""
    parser = ArgumentParser(
        prog="python -m bench.compare", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("a", type=Path, metavar="A.json", help="before")
    parser.add_argument("b", type=Path, metavar="B.json", help="after")
    parser.add_argument(
        "--threshold", type=_percent, default=5.0, metavar="PERCENT",
        help="a smaller change of the median is none; default 5",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="also figures of different devices")
    args = parser.parse_args(argv)
    try:
        a, b = read(args.a), read(args.b)
    except BrokenFile as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    devices = f"{args.a} is of {a.device}, {args.b} of {b.device}"
    if a.device != b.device and not args.force:
        print(f"error: different devices: {devices}; --force compares them", file=sys.stderr)
        return 2
    if not a.rows.keys() & b.rows.keys():
        print(f"error: no row of {args.a} is in {args.b}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    if a.device != b.device:
        console.print(Text(f"different devices: {devices}"))
    return 1 if _show(console, a, b, args.threshold) else 0


if __name__ == "__main__":
    sys.exit(main())
