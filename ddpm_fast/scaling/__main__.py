"""python -m ddpm_fast.scaling"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm_fast.cli.arguments import run_command
from ddpm_fast.errors import UsageError
from ddpm_fast.scaling.options import PROG, parse_options, paths_of

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or show, compare, claim; 0, 2 for bad arguments, 1 for a failure."""
    return run_command(PROG, _run, argv)


def _run(argv: Sequence[str]) -> int:
    verbs = {"show": _show, "compare": _compare, "claim": _claim}
    if argv and argv[0] in verbs and "--help" not in argv:
        return verbs[argv[0]](argv[1:])
    options = parse_options(argv)  # before the heavy modules: --help and mistakes answer at once
    from ddpm_fast.runtime.ranks import check_impl
    from ddpm_fast.scaling import report
    from ddpm_fast.scaling.export import export
    from ddpm_fast.scaling.measure import measure
    from ddpm_fast.scaling.result import JSON_NAME

    check_impl("cpu" if options.backend == "gloo" else "cuda")
    console = _console()
    folder = Path(options.out or f"runs/scaling-{time.strftime('%Y%m%d-%H%M%S')}")
    if (folder / JSON_NAME).exists():
        raise UsageError(f"--out {folder} holds a result already; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be had, before the work
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror}; give another folder") from None
    result = measure(options, console)
    report.show(result, console)
    paths, why = export(result, folder, legacy=options.legacy_json)
    for line in [why, f"written to {folder}: {', '.join(path.name for path in paths)}"]:
        if line:
            console.print(line, markup=False)
    if result["failures"]:
        error = report.failure_line(result, result["failures"][0])
        print(f"{PROG}: error: {error.removeprefix('FAILED: ')}", file=sys.stderr)
        return 1
    return 0


def _show(argv: Sequence[str]) -> int:
    """The report of a result, or with --legacy-json the original's JSON."""
    from ddpm_fast.scaling.result import read

    (path,) = paths_of("show", argv, 1, ["--legacy-json"])
    result = read(Path(path))
    if "--legacy-json" in argv:
        from ddpm_fast.scaling.legacy import legacy_view

        print(json.dumps(legacy_view(result), indent=2))
        return 0
    from ddpm_fast.scaling import report

    report.show(result, _console())
    return 0


def _compare(argv: Sequence[str]) -> int:
    """Two results' rows; 1 if any got slower beyond both intervals, or was lost."""
    from ddpm_fast.scaling.compare import differences, not_comparable, only_in, pairs
    from ddpm_fast.scaling.result import read

    paths = paths_of("compare", argv, 2, ["--force"])
    a, b = (read(Path(path)) for path in paths)
    apart = not_comparable(a, b)
    if apart and "--force" not in argv:
        raise UsageError(
            f"{paths[0]} and {paths[1]} are of different work or machines ({'; '.join(apart)}); "
            "allowed: runs alike in these, or --force"
        )
    console = _console()
    for line in differences(a, b):
        console.print(f"differs: {line}", markup=False)
    found, lost = pairs(a, b), only_in(a, b)
    for pair in found:
        console.print(
            f"{pair.mode:<6} N={pair.world_size:<4} {pair.a:>8,.0f} -> {pair.b:>8,.0f} img/s "
            f"{pair.ratio:.2f}x {pair.verdict:<6} efficiency "
            f"{100 * pair.efficiency_a:.0f} -> {100 * pair.efficiency_b:.0f} %",
            markup=False,
        )
    if not found:
        console.print("no row is in both")
    for path, rows in ((paths[0], lost), (paths[1], only_in(b, a))):
        if rows:
            console.print(f"only in {path}: {', '.join(rows)}", markup=False)
    return int(bool(lost) or any(pair.verdict == "slower" for pair in found))


def _claim(argv: Sequence[str]) -> int:
    """What the original repository's claim needs, by the model."""
    paths_of("claim", argv, 0)
    from ddpm_fast.scaling import claim

    print(claim.in_words())
    return 0


def _console() -> Console:
    """Stdout's; it colours only a terminal."""
    from rich.console import Console

    return Console(highlight=False)


if __name__ == "__main__":
    sys.exit(main())
