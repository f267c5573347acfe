"""python -m ddpm_fast.doctor"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ddpm_fast.cli.arguments import parse, run_command
from ddpm_fast.cli.values import check_ranges

PROG = "python -m ddpm_fast.doctor"


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Try every piece of ddpm_fast on this machine; show what works and what mends the rest.

    Exit code 0 when training can run here, 1 when it cannot.
    """

    json: bool = False
    """print the rows as JSON: name, found, status, mend"""
    compile: bool = False
    """compile every Triton kernel anew and print what each uses; takes minutes"""
    chaos: bool = False
    """instead: a small training under random kills must end as an undisturbed one"""
    minutes: float | None = None
    """of --chaos: how long there are kills at most; None: 2"""
    kills: int | None = None
    """of --chaos: how many; exit code 1 if the minutes did not suffice"""
    seed: int = 0
    """of --chaos: which kills, and when"""

    def __post_init__(self) -> None:
        for name in ("minutes", "kills"):
            if (value := getattr(self, name)) is not None and not self.chaos:
                raise ValueError(f"{name}={value} is for --chaos")
        check_ranges(self, {"minutes": (0.01, 1e5), "kills": (1, 10**6), "seed": (0, 2**63 - 1)})


def main(argv: Sequence[str] | None = None) -> int:
    """Examine the machine; 0 when training can run, 1 when not, 2 for bad arguments."""
    return run_command(PROG, _run, argv)


def _run(argv: Sequence[str]) -> int:
    options = parse(DoctorOptions, argv, prog=PROG)  # before torch: mistakes answer at once
    if options.chaos:
        from ddpm_fast.doctor.chaos import chaos

        return chaos(options.minutes or 2.0, options.seed, options.kills)
    from ddpm_fast.doctor import checks, kernels, table
    from ddpm_fast.doctor.rows import run_check

    rows = [run_check(check) for check in checks.CHECKS]
    table.show(rows, json=options.json)
    failed = int(any(row.status == "fails" for row in rows))
    return kernels.refresh() or failed if options.compile else failed


if __name__ == "__main__":
    sys.exit(main())
