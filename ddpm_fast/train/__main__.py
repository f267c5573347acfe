"""python -m ddpm_fast.train"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ddpm_fast.cli.arguments import run_command
from ddpm_fast.train.command import parse_command
from ddpm_fast.train.config import PROG


def main(argv: Sequence[str] | None = None) -> int:
    """Train; 0 when the run ended or was asked to stop, 2 for bad arguments, 1 for a failure."""
    return run_command(PROG, _run, argv)


def _run(argv: Sequence[str]) -> None:
    invocation = parse_command(argv)  # before torch: --help and mistakes answer at once
    from ddpm_fast.train.loop import train

    train(invocation)


if __name__ == "__main__":
    sys.exit(main())
