"""The scaling command's flags and the checks that need no machine. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ddpm_fast.cli.arguments import parse
from ddpm_fast.cli.values import check_ranges
from ddpm_fast.errors import UsageError
from ddpm_fast.nn import config as nn_config

PROG = "python -m ddpm_fast.scaling"
DEMO_BATCH = 16
RENAMED = {"world-sizes": "gpus", "backends": "backend"}
PROCESSES_A_CORE = 16  # at most; they take turns
RANGES = {
    "gpus": (1, 2**16),
    "batch_size": (1, 2**20),
    "global_batch": (1, 2**20),
    "windows": (5, 10**4),
    "window_s": (0.05, 600),
    "predict": (1, 2**20),
    "time_limit": (10, 10**7),
}
BATCHES = {"digits": 64, "cifar10": 128, "seed-cifar10": 128}  # as the trainer's presets


@dataclass(frozen=True, kw_only=True)
class ScalingOptions:
    """Measure how training scales over GPUs, weak and strong, and predict what was not measured.

    Leaves a report, result.json, result.csv, plots and one HTML page in --out.
    Also: `show RESULT.json`, `compare A.json B.json`, `claim` (the original repository's).
    """

    gpus: tuple[int, ...] = ()
    """how many, as 1,2,4,8; none: powers of two up to all, as far as they divide the batch"""
    backend: Literal["nccl", "gloo"] = "nccl"
    """nccl: GPUs; gloo: as many CPU processes, which say nothing of GPUs"""
    preset: str | None = None
    """net: cifar10, seed-cifar10, digits; None: cifar10, or digits for --demo"""
    batch_size: int | None = None
    """images a GPU (weak) and in all (strong); None: the preset's"""
    global_batch: int | None = None
    """images of a strong step, all GPUs together; None: batch_size"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 autocast or fp32; auto: bf16 on GPUs"""
    compile: bool = False
    """compile the step with torch.compile"""
    demo: bool = False
    """a small net and short windows: about half a minute a world size"""
    windows: int = 5
    """timed windows a row, at least 5"""
    window_s: float | None = None
    """seconds a window; None: 2, or 0.5 for --demo"""
    predict: tuple[int, ...] = ()
    """world sizes to predict by the model, as 8,64,1024"""
    interconnect: str | None = None
    """published figures for predictions, as h200-nvlink; None: what was measured"""
    legacy_json: bool = False
    """also write legacy.json, with the original repository's field names"""
    time_limit: int = 900
    """seconds that one world size may take"""
    out: str | None = None
    """folder for the results; None: runs/scaling-<time>"""

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)

    @property
    def net(self) -> str:
        return self.preset or ("digits" if self.demo else "cifar10")

    @property
    def batch(self) -> int:
        return self.batch_size or (DEMO_BATCH if self.demo else BATCHES[self.net])

    @property
    def strong_batch(self) -> int:
        return self.global_batch or self.batch

    @property
    def seconds_a_window(self) -> float:
        return self.window_s or (0.5 if self.demo else 2.0)


def parse_options(argv: Sequence[str]) -> ScalingOptions:
    """argv -> ScalingOptions; UsageError for what no machine can run."""
    options = parse(ScalingOptions, argv, prog=PROG, renamed=RENAMED)
    try:
        nn_config.preset(options.net)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if options.interconnect:
        from ddpm_fast.scaling.interconnects import interconnect

        if options.backend == "gloo":
            raise UsageError(
                "--interconnect is for GPUs: allowed without --backend gloo, whose rows are of CPU "
                "processes"
            )
        interconnect(options.interconnect)
    cores = os.cpu_count() or 1
    if options.backend == "gloo" and max(options.gpus, default=1) > PROCESSES_A_CORE * cores:
        raise UsageError(
            f"--gpus {max(options.gpus)} CPU processes on {cores} cores; allowed: up to "
            f"{PROCESSES_A_CORE * cores}, and more by --predict"
        )
    if options.gpus:
        check_divides(options, options.gpus)
    return options


def check_divides(options: ScalingOptions, worlds: Sequence[int]) -> None:
    """UsageError for a strong batch that a world size does not divide."""
    total = options.strong_batch
    odd = [n for n in worlds if total % n]
    if odd:
        raise UsageError(
            f"--{_batch_flag(options)} {total} is the strong rows' whole batch and must be "
            f"divisible by each of --gpus: by {odd[0]} it is not; {batches_near(total, worlds)}"
        )


def dividing(options: ScalingOptions, worlds: Sequence[int]) -> tuple[list[int], str]:
    """Those of the default world sizes that divide the strong batch, and a note on the others."""
    total = options.strong_batch
    odd = [n for n in worlds if total % n]
    if not odd:
        return list(worlds), ""
    return [n for n in worlds if n not in odd], (
        f"N = {', '.join(map(str, odd))} left out: the strong rows' {total} images cannot be "
        f"divided by it; with --{_batch_flag(options)} {batches_near(total, worlds)}"
    )


def batches_near(total: int, worlds: Sequence[int]) -> str:
    """ "12 and 18 are": the nearest batches that all world sizes divide."""
    unit = math.lcm(*worlds)
    near = [size for size in (total - total % unit, total + unit - total % unit) if size]
    return f"{' and '.join(map(str, near))} {'are' if len(near) > 1 else 'is'}"


def _batch_flag(options: ScalingOptions) -> str:
    return "global-batch" if options.global_batch else "batch-size"


def paths_of(verb: str, argv: Sequence[str], count: int, flags: Sequence[str] = ()) -> list[str]:
    """The files that `show` or `compare` is given; UsageError for another number or flag."""
    allowed = " ".join(f"[{flag}]" for flag in flags)
    usage = f"{verb} {'RESULT.json' if count == 1 else 'A.json B.json'} {allowed}".strip()
    for word in argv:
        if word.startswith("-") and word not in flags:
            raise UsageError(f"unknown flag {word}; allowed: {usage}")
    paths = [word for word in argv if not word.startswith("-")]
    if len(paths) != count:
        raise UsageError(f"{verb} was given {len(paths)} files; allowed: {usage}")
    return paths
