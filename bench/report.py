"""Results of the GPU suite as Markdown, one HTML page, README's table: python -m bench.report

Takes the suite.json of one run or of several. A row is shown only if its parity check was green in
the same run; the others are listed with the reason. With none, the page is the roofline as a model
predicts it for each device whose ceilings are known; with one, what was measured stands beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.arguments import ArgumentParser
from bench.ceilings import MOST_PERCENT, is_above
from bench.environment import COMMIT_VARIABLE, UNKNOWN_COMMIT
from bench.report_data import (
    BadResults,
    Comparison,
    DryRun,
    Row,
    Section,
    Suite,
    comparisons,
    load,
    short,
)
from bench.report_roofline import as_json, roofline_sections, rooflines
from bench.roofline import GIVEN

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
MOST_MISSING = 40  # lines of what was not measured
README_WORK = ("training step", "DDIM", "peak memory")


def sections(suite: Suite) -> list[Section]:
    """Everything that a page says of one run."""
    compared = comparisons(suite)
    found = [Section(suite.device, [suite.where, f"results: {suite.path}", *suite.notes()])]
    if compared:
        head = ["what", "ours", "", "compared with", "", "ratio (from the 20 to 80 % quantiles)"]
        found.append(Section("Ours and the others", [], [head, *map(_compared_cells, compared)]))
    for stage, title in (("models", "Whole nets"), ("sampling", "Sampling")):
        if rows := suite.rows(stage):
            found.append(Section(title, [_FLOOR], [list(_MODEL_COLUMNS), *map(_model_cells, rows)]))
    if rows := suite.rows("command"):
        found.append(Section("Images in files", [_command(row) for row in rows]))
    if rows := suite.rows("memory"):
        cells = [[row["impl"], _number(row, "peak_gib", ".2f")] for row in rows]
        found.append(Section("Memory of a training step", [], [["net", "peak GiB"], *cells]))
    if rows := suite.rows("long_run"):
        found.append(Section("A real training run", [_long_run(row) for row in rows]))
    if rows := suite.rows("kernels"):
        head = ["kernel and pass", "ours ms", "% of floor", "over eager", "compiled", "best peer"]
        found.append(Section("Kernels", [_KERNELS], [head, *_kernel_cells(rows)]))
    if rows := suite.rows("parts"):
        head = ["part and pass", "way", "ms", "over the first way", "parity"]
        found.append(Section("Parts of a training step", [_PARTS], [head, *_part_cells(rows)]))
    if suite.refused:
        cells = [[stage, name, why] for stage, name, why in suite.refused]
        found.append(
            Section("Left out: no green parity check", [], [["stage", "row", "why"], *cells])
        )
    if suite.missing:
        cells = [[stage, name, why] for stage, name, why in suite.missing[:MOST_MISSING]]
        more = len(suite.missing) - MOST_MISSING
        lines = [f"and {more} more, which the file names"] if more > 0 else []
        found.append(Section("Not measured", lines, [["stage", "row", "why"], *cells]))
    return found


_FLOOR = (
    "MFU: of the matrix product's rate in the same run. Floor: products at that rate, then norms"
    f" and optimizer at the copy's. (!): above {MOST_PERCENT:.0f} %, so that floor is too low."
    " GPU busy: time of the kernels that torch.profiler saw, of the wall time without it."
)
_KERNELS = (
    "Floor: the larger of least bytes and operations at the ceilings of the same run, L2-cold."
    f" (!): above {MOST_PERCENT:.0f} %, so the ceiling was taken too low, or a cache helped."
)
_PARTS = (
    "Each part alone, in all ways that compute the same, timed in turns; the last column is how far"
    " a way's result is from the first one's. Which way the package takes is decided by these rows."
)
_MODEL_COLUMNS: dict[str, Callable[[Row], str]] = {
    "what": lambda row: f"{row['what']}, {row['preset']}, {row['batch']}",
    "net": lambda row: row["impl"],
    "ms": lambda row: _ms(row),
    "img/s": lambda row: short(row["images_per_s"]),
    "MFU %": lambda row: _number(row, "mfu_percent", ".1f"),
    "% of floor": lambda row: _percent_of_floor(row, ".1f"),
    "GPU busy %": lambda row: _number(row, "gpu_busy_percent", ".1f"),
    "peak GiB": lambda row: _number(row, "peak_gib", ".2f"),
    "parity": lambda row: row["parity"].removeprefix("green: "),
}


def markdown(found: Sequence[Section]) -> str:
    parts = ["# Measurements and predictions"]
    for section in found:
        parts.append(f"## {section.title}")
        parts += ["\n".join(f"- {line}" for line in section.lines)] if section.lines else []
        parts += [markdown_table(section.table)] if section.table else []
    return "\n\n".join(parts) + "\n"


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])


def readme_table(suites: Sequence[Suite]) -> str:
    """The few lines that README shows of each run."""
    parts = []
    for suite in suites:
        compared = [each for each in comparisons(suite) if each.what.startswith(README_WORK)]
        rows = [
            [each.what, f"{each.ours}: {each.ours_figure}",
             f"{each.baseline}: {each.baseline_figure}", each.shown_ratio]
            for each in compared
        ]  # fmt: skip
        rows += [
            ["training run, 1 minute", _long_run(row), "", ""] for row in suite.rows("long_run")
        ]
        rows += [[row["what"], _command(row), "", ""] for row in suite.rows("command")]
        table = markdown_table([["what", "ours", "compared with", "ratio"], *rows])
        parts += [f"On {suite.where}:", table]
    return "\n\n".join(parts)


def put_between_markers(path: Path, text: str) -> None:
    """Replace what stands between README's marker comments; BadResults if they are not there."""
    try:
        old = path.read_text()
    except OSError as error:
        raise BadResults(f"{path}: {error.strerror or error}") from None
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise BadResults(f"{path}: lacks the lines {BEGIN} and {END}, between which the table goes")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def _compared_cells(each: Comparison) -> list[str]:
    return [
        each.what, each.ours, each.ours_figure, each.baseline, each.baseline_figure,
        each.shown_ratio,
    ]  # fmt: skip


def _model_cells(row: Row) -> list[str]:
    return [cell(row) for cell in _MODEL_COLUMNS.values()]


def _kernel_cells(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each pass of ours; a peer's speedup is ours over it."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row["name"].removesuffix(row["impl"]).strip(), {})[row["impl"]] = row
    cells = []
    for name, by_impl in groups.items():
        ours = by_impl.pop("ours", None)
        if ours is None:
            continue
        eager, compiled = (by_impl.pop(impl, {}) for impl in ("eager", "compiled"))
        peer = min(by_impl.values(), key=lambda row: row["ms"], default={})
        shown = f"{_speedup(peer)} {peer['impl']}" if peer else "-"
        floor = _percent_of_floor(ours, ".0f")
        cells.append([name, f"{ours['ms']:.4g}", floor, _speedup(eager), _speedup(compiled), shown])
    return cells


def _part_cells(rows: Sequence[Row]) -> list[list[str]]:
    return [
        [row["what"], row["impl"], _ms(row), _speedup(row), row["parity"].removeprefix("green: ")]
        for row in rows
    ]


def _long_run(row: Row) -> str:
    memory = f", peak {row['peak_gib']:.1f} GiB" if row.get("peak_gib") else ""
    mfu, floor = _number(row, "mfu_percent", ".1f"), _percent_of_floor(row, ".1f")
    shares = "" if mfu == "-" else f", MFU {mfu} %, {floor} % of the floor"
    return f"{row['name']}: {short(row['images_per_s'])} img/s{shares}{memory}"


def _command(row: Row) -> str:
    rate = f"{short(row['images_per_s'])} img/s"
    return f"{row['name']}: {rate}; 50,000 images in {row['extrapolated_s']:.0f} s (extrapolated)"


def _ms(row: Row) -> str:
    return f"{row['ms']:.4g} ({row['ms_q20']:.4g} to {row['ms_q80']:.4g})"


def _speedup(row: Row) -> str:
    return f"{row['speedup']:.2f}x" if row.get("speedup") else "-"


def _number(row: Row, name: str, form: str) -> str:
    return format(row[name], form) if isinstance(row.get(name), int | float) else "-"


def _percent_of_floor(row: Row, form: str) -> str:
    shown = _number(row, "percent_of_floor", form)
    return f"{shown} (!)" if shown != "-" and is_above(row["percent_of_floor"]) else shown


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")


def main(argv: Sequence[str] | None = None) -> int:
    """Read the arguments and write; 1 for a dry run's results, 2 for what cannot be read."""
    parser = ArgumentParser(
        prog="python -m bench.report", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("results", nargs="*", type=Path, metavar="SUITE_JSON")
    parser.add_argument(
        "--device", choices=GIVEN, help="without a SUITE_JSON: predict for this one only"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="one page with its plots in it")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help=f"put the table between {BEGIN} and {END}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rooflines' rows")
    args = parser.parse_args(argv)
    try:
        if args.device and args.results:
            raise BadResults(f"--device {args.device}: a SUITE_JSON names its own device")
        if args.readme and not args.results:
            raise BadResults(f"--readme {args.readme}: its table is of a SUITE_JSON, name one")
        suites = [load(path) for path in args.results]
        unknown = [suite.path for suite in suites if suite.commit == UNKNOWN_COMMIT]
        if args.readme and unknown:
            raise BadResults(
                f"{unknown[0]}: its commit is unknown, README shows results of a known one:"
                f" measure with {COMMIT_VARIABLE} set where .git is absent"
            )
        roofs = rooflines(suites, args.device)
        found = [section for suite in suites for section in sections(suite)]
        found += [section for roof in roofs for section in roofline_sections(roof)]
        if args.html:
            from bench.report_html import page

            args.html.write_text(page(suites, found))
        if args.markdown:
            args.markdown.write_text(markdown(found))
        if args.json:
            args.json.write_text(json.dumps([as_json(roof) for roof in roofs], indent=1) + "\n")
        if args.readme:
            put_between_markers(args.readme, readme_table(suites))
    except (BadResults, DryRun, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, DryRun) else 2
    if not (args.html or args.markdown or args.readme or args.json):
        print(markdown(found), end="")
    refused = sum(len(suite.refused) for suite in suites)
    if refused:
        print(f"left out {refused} rows without a green parity check", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
