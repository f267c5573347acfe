"""python -m ddpm_fast.sample"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ddpm_fast.cli.arguments import run_command
from ddpm_fast.sampling.options import PROG, parse_options


def main(argv: Sequence[str] | None = None) -> int:
    """Draw images; 0 when done, 2 for bad arguments, 1 for a failure."""
    return run_command(PROG, _run, argv)


def _run(argv: Sequence[str]) -> None:
    options = parse_options(argv)  # before torch: --help and mistakes answer at once
    from ddpm_fast.sampling.command import draw

    draw(options)


if __name__ == "__main__":
    sys.exit(main())
