"""A result for people: tables that fit 80 columns, without colour when piped, lines when narrower.

What was measured and what is PREDICTED stand in one table and never look the same.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ddpm_fast.scaling.doubts import doubts
from ddpm_fast.scaling.predict import MOST_SIMULATED
from ddpm_fast.scaling.result import base_row, count, has_own_peaks, memory_of, rank_word
from ddpm_fast.scaling.topology import link_lines, link_table
from ddpm_fast.scaling.verdict import verdict

LEAST_WIDTH = 80  # columns that the tables need
BAR = 9
PARTS = {
    "compute": "compute",
    "exposed_communication": "exposed",
    "overlapped_communication": "overlapped",
    "data": "data",
    "optimizer": "optimizer",
}


def show(result: dict[str, Any], console: Console) -> None:
    """Print the report."""
    narrow = console.width < LEAST_WIDTH
    for line in _head(result):
        _say(console, line, indent=12)
    _print_links(result, console)
    console.print()
    for mode in ("weak", "strong"):
        rows = mode_rows(result, mode)
        if len(rows) > 1 or (rows and mode == "weak"):
            _print_throughput(result, mode, rows, console, narrow)
    if result["rows"]:
        _print_split(result, console, narrow)
        _print_ranks(result, console, narrow)
    _print_all_reduces(result, console)
    _print_model(result, console)
    for failure in result["failures"]:
        _say(console, failure_line(result, failure), "bold red")
    for note in [*result["notes"], *doubts(result)]:
        _say(console, f"Note: {note}")
    console.print()
    for number, sentence in enumerate(verdict(result)):
        _say(console, ("Verdict: " if number == 0 else "  ") + sentence, "bold")


def _say(console: Console, text: str, style: str = "", *, indent: int | None = None) -> None:
    """A line, broken at words, with the rest indented a little more than its beginning."""
    columns = len(text) - len(text.lstrip()) + 2 if indent is None else indent
    wrapped = textwrap.fill(
        text, console.width, subsequent_indent=" " * columns, break_on_hyphens=False
    )
    console.print(Text(wrapped, style))


def failure_line(result: dict[str, Any], failure: dict[str, Any]) -> str:
    """ "With 2 processes rank 1 failed: ..." """
    n, who = failure["world_size"], failure["rank"]
    rank = "" if who is None else f" rank {who}"
    return f"FAILED: with {count(n, rank_word(result))}{rank}: {failure['message']}"


def mode_rows(result: dict[str, Any], mode: str) -> list[dict[str, Any]]:
    """Measured rows of a mode, its base first."""
    rows = [row for row in result["rows"] if row["mode"] == mode]
    if not result["rows"]:
        return []
    base = base_row(result["rows"], mode, result["global_batch"])
    return rows if base in rows else [base, *rows]


def _head(result: dict[str, Any]) -> Iterable[str]:
    machine, versions = result["machine"], result["versions"]
    what = "GPUs" if result["kind"] == "gpu" else "CPU processes (gloo), NOT GPUs"
    yield f"Scaling of ddpm_fast training over {what}"
    devices = machine["devices"]
    named = {name: devices.count(name) for name in devices}
    gpus = "; ".join(f"{n} x {name}" for name, n in named.items())
    yield f"  machine   {gpus or 'no GPU used'}"
    yield f"            {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB"
    parameters = result["parameters"]
    size = f", {parameters / 1e6:.1f} M parameters" if parameters else ""
    yield (
        f"  training  {result['preset']}{size}, {result['precision']}, batch "
        f"{result['batch_per_rank']} (weak: each; strong: {result['global_batch']} in all)"
    )
    yield (
        f"  step      {'compiled' if result['compile'] else 'eager'}, not captured as a graph, "
        "Adam, synthetic images kept on the device"
    )
    made = ", ".join(f"{name} {v}" for name, v in versions.items())
    yield f"  versions  {made}"
    yield f"  measured  {result['created']}, {result['seconds']:.0f} s"


def _print_links(result: dict[str, Any], console: Console) -> None:
    """As a matrix, or where that has no room in lines."""
    machine = result["machine"]
    if len(machine["p2p"]) < 2:
        return
    table = link_table(machine)
    whole = console.options.update(max_width=10_000)  # a console's own width would be the most
    if console.measure(table, options=whole).maximum <= console.width:
        console.print(table)
        return
    for number, line in enumerate(link_lines(machine)):
        _say(console, f"{'  links   ' if number == 0 else ' ' * 10}  {line}", indent=14)


def _print_throughput(
    result: dict[str, Any],
    mode: str,
    rows: Sequence[dict[str, Any]],
    console: Console,
    narrow: bool,
) -> None:
    word = rank_word(result)
    title = {
        "weak": f"Weak: {result['batch_per_rank']} images each {word}",
        "strong": f"Strong: {result['global_batch']} images in all",
    }[mode]
    predicted = [row for row in result["predicted"] if row["mode"] == mode]
    cells = [_cells(row, console) for row in rows] + [_cells(row, console) for row in predicted]
    heads = ["img/s", "+- (95 %)", f"each {word}", "speedup", "efficiency", "of ideal"]
    styles = [""] * len(rows) + ["yellow italic"] * len(predicted)
    if narrow:
        _print_lines(title, word, heads, [*rows, *predicted], cells, console)
        return
    table = _table("N", heads, title)
    for row, values, style in zip([*rows, *predicted], cells, styles, strict=True):
        table.add_row(str(row["world_size"]), *values, style=style)
    console.print(table)
    serial = [f"N = {row['world_size']} {row['serial_fraction']:.2f}"
              for row in rows if row["serial_fraction"] is not None]  # fmt: skip
    if serial:
        _say(console, f"Serial fraction (Karp and Flatt): {', '.join(serial)}")
        console.print()


def _cells(row: dict[str, Any], console: Console) -> list[str]:
    measured = "label" not in row
    half = (row["images_per_s_high"] - row["images_per_s_low"]) / 2 if measured else 0
    return [
        f"{row['images_per_s']:,.0f}",
        f"{100 * half / row['images_per_s']:.1f} %" if measured else "PREDICTED",
        f"{row['images_per_s'] / row['world_size']:,.0f}",
        f"{row['speedup']:.2f}x",
        f"{100 * row['efficiency']:.0f} %{_interval(row)}",
        _bar(row["efficiency"], measured, console),
    ]


def _interval(row: dict[str, Any]) -> str:
    """ " (86-94)", of the efficiency; that of the speedup is as many times N."""
    ends = row.get("efficiency_low"), row.get("efficiency_high")
    if None in ends or ends[0] == ends[1]:  # a file of before they were kept, or the base
        return ""
    return f" ({100 * ends[0]:.0f}-{100 * ends[1]:.0f})"


def _bar(share: float, measured: bool, console: Console) -> str:
    """Full is ideal; a prediction's is hollow."""
    utf = console.encoding.startswith("utf")
    full, hollow, rest = ("█", "▒", "·") if utf else ("#", "=", ".")
    filled = round(min(1.0, share) * BAR)
    return (full if measured else hollow) * filled + rest * (BAR - filled)


def _print_split(result: dict[str, Any], console: Console, narrow: bool) -> None:
    title = "A step of the median window, ms: exposed and overlapped (an estimate) communication"
    heads = ["step", *PARTS.values()]
    cells = [
        [f"{row['step_ms']:.1f}", *(f"{row['split_ms'][part]:.1f}" for part in PARTS)]
        for row in result["rows"]
    ]
    _print_rows(result, title, heads, cells, console, narrow)


def _print_ranks(result: dict[str, Any], console: Console, narrow: bool) -> None:
    reserved = any(
        rank["reserved_gib"] is not None for row in result["rows"] for rank in row["peak_memory"]
    )
    since = "" if all(map(has_own_peaks, result["rows"])) else " since its start"
    what = f"peak memory of every rank{since}" + " (reserved)" * reserved
    heads = [f"{what}, GiB", "skew", "J/image"]
    cells = []
    for row in result["rows"]:
        shown = " ".join(_memory(memory_of(rank)) for rank in row["peak_memory"])
        if reserved:
            taken = " ".join(_memory(rank["reserved_gib"]) for rank in row["peak_memory"])
            shown = f"{shown} ({taken})"
        joules = row["joules_per_image"]
        cells.append([shown, f"{row['skew']:.2f}", "n/a" if joules is None else f"{joules:.3g}"])
    title = "Ranks (skew: slowest over fastest, without communication)"
    _print_rows(result, title, heads, cells, console, narrow)
    first = result["rows"][0]
    steps = ", ".join(
        f"{name}{since if name == 'peak' else ''} {gib:.2f}"
        for name, gib in first["memory_phases_gib"].items()
    )
    _say(console, f"Memory of rank 0 alone, GiB after each: {steps}")


def _memory(gib: float | None) -> str:
    return "?" if gib is None else f"{gib:.2f}"


def _print_all_reduces(result: dict[str, Any], console: Console) -> None:
    """Bus bandwidth by size: (S / t) 2 (n - 1) / n, as nccl-tests."""
    rows = result["all_reduce"]
    if not rows:
        return
    console.print()
    _say(console, "All-reduces on their own: bus bandwidth by message", "bold")
    for n in sorted({row["world_size"] for row in rows}):
        sizes = ", ".join(
            f"{_bytes(row['bytes'])} {row['bus_gbytes_per_s']:.3g} ({row['seconds'] * 1e6:,.0f} us)"
            for row in rows
            if row["world_size"] == n
        )
        _say(console, f"  {count(n, rank_word(result))}, GB/s: {sizes}")


def _bytes(size: int) -> str:
    return f"{size / 2**20:.3g} MiB" if size >= 2**20 else f"{size / 2**10:.3g} KiB"


def _print_rows(
    result: dict[str, Any], title: str, heads: list[str], cells: list[list[str]],
    console: Console, narrow: bool,
) -> None:  # fmt: skip
    rows = result["rows"]
    if narrow:
        _print_lines(title, rank_word(result), heads, rows, cells, console)
        return
    table = _table("N", ["mode", *heads], title)
    for row, values in zip(rows, cells, strict=True):
        table.add_row(str(row["world_size"]), row["mode"], *values)
    console.print(table)


def _print_lines(
    title: str, word: str, heads: list[str], rows: Sequence[dict[str, Any]],
    cells: list[list[str]], console: Console,
) -> None:  # fmt: skip
    """A paragraph a row, where a table has no room."""
    console.print()
    _say(console, title, "bold")
    for row, values in zip(rows, cells, strict=True):
        label = f", {row['label']}" if "label" in row else ""  # said first, not as an interval
        shown = ", ".join(
            f"{head} {value}"
            for head, value in zip(heads, values, strict=True)
            if value != row.get("label")
        )
        _say(console, f"{count(row['world_size'], word)} ({row['mode']}){label}: {shown}")


def _print_model(result: dict[str, Any], console: Console) -> None:
    model = result["model"]
    if model is None:
        return
    console.print()
    _say(console, "The model behind PREDICTED rows (an estimate)", "bold")
    for fit in model["fits"]:
        _say(
            console,
            f"  all-reduce among {fit['world_size']}: {fit['alpha_us']:.0f} us a hop, "
            f"{fit['bus_gbytes_per_s']:.2f} GB/s, residual {100 * fit['rms_residual']:.0f} % RMS",
        )
    off = ", ".join(f"{r['world_size']} {r['mode']} {100 * r['relative']:+.0f} %"
                    for r in model["residuals"])  # fmt: skip
    _say(console, f"  model against measured steps: {off}")
    for given, rows in _inputs(result["predicted"]).items():
        _say(console, f"  inputs for N = {', '.join(rows)}: {given}")
    for row in result["predicted"]:
        simulated = row["simulated_step_ms"]
        if simulated is not None:
            _say(
                console,
                f"  N = {row['world_size']} {row['mode']}: step {row['step_ms']:.1f} ms by the "
                f"formula, {simulated:.1f} ms simulated message by message; stragglers in both",
            )
        elif row["world_size"] > MOST_SIMULATED:
            _say(
                console,
                f"  N = {row['world_size']} {row['mode']}: not simulated, as the messages of more "
                f"than {MOST_SIMULATED} ranks take minutes",
            )
    _say(console, f"  link: {model['link_source']}")
    for line in model["assumed"]:
        _say(console, f"  assumed: {line}")


def _inputs(predicted: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Inputs in words -> the rows that have them, as "64 weak"."""
    of: dict[str, list[str]] = {}
    for row in predicted:
        given = ", ".join(f"{name} {value:.3g}" for name, value in row["inputs"].items())
        of.setdefault(given, []).append(f"{row['world_size']} {row['mode']}")
    return of


def _table(first: str, heads: Sequence[str], title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left",
                  title_style="bold")  # fmt: skip
    table.add_column(first, no_wrap=True)
    for head in heads:
        left = head in ("mode", "of ideal") or head.startswith("peak")
        table.add_column(head, justify="left" if left else "right")
    return table
