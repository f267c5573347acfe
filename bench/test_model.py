"""Whole U-Nets beside the original's design and diffusers: pytest bench --benchmark-only.

Of a group all are timed in turns, each after its parity check in this process; a row has a figure
only if that was green. extra_info holds the check's distance, images/s, TFLOP/s, MFU, the
percentage of the floor, the dropout of a training step, peak memory (on CUDA; no_peak_gib says why
not) and, for a baseline, how much faster our fastest is. At the end all of these ratios are one
table. On a CPU: batch 4, fp32, eager.

The CPU's target, a training step 1.05 times as fast as diffusers' eager one by at least 15 pairs in
turns, is the ratios, with and without dropout, of
    python -m pytest bench/test_model.py --benchmark-only -k "training and seed"
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from bench.model_rows import Row, measure_group
from bench.models import SAMPLING, TRAINING
from bench.ratios import Ratio
from bench.replay import replay
from bench.timing import Samples

ON_GPU = torch.cuda.is_available()
BATCH = 256 if ON_GPU else 4
DDIM_STEPS = 10 if ON_GPU else 2
SECONDS = 2.0  # for a group's figures
TARGET_PAIRS, OTHER_PAIRS = 15, 3  # on a CPU
PRESETS = ("seed-cifar10", "cifar10")
DROPOUT = 0.1  # the presets'


def rows_of(setups, preset):
    return [setup for setup in setups if setup.preset == preset]


def dropouts(preset, what):
    """Of the rows: a forward pass is in eval mode. On a CPU one preset without it, too."""
    if what == "forward":
        return (None,)
    return (DROPOUT,) if ON_GPU or preset == "cifar10" else (DROPOUT, 0.0)


def pairs(preset, what, steps):
    """Rounds of a group, None: as many as SECONDS hold. cifar10's net is of seed-cifar10's sizes,
    so that on a CPU its training step only needs to be seen."""
    if ON_GPU or (what == "forward" and not steps):
        return None
    return TARGET_PAIRS if preset == "seed-cifar10" and not steps else OTHER_PAIRS


def title(preset, what, dropout, steps):
    shown = "" if dropout is None else f" dropout {dropout:g}"
    return f"{f'DDIM-{steps}' if steps else what} {preset}{shown}"


ROWS = [
    pytest.param(
        preset, what, BATCH, dropout, 0, setup.label,
        id=f"{title(preset, what, dropout, 0)} {setup.label}",
    )
    for preset in PRESETS
    for what in ("training step", "forward")
    for dropout in dropouts(preset, what)
    for setup in rows_of(TRAINING, preset)
    if what in setup.works
]  # fmt: skip
SAMPLING_ROWS = [
    pytest.param(
        preset, "forward", images, None, DDIM_STEPS, setup.label,
        id=f"sampling {images} {preset} {setup.label}",
    )
    for preset in PRESETS
    for images in (1, 16, 256)
    for setup in rows_of(SAMPLING, preset)
]  # fmt: skip


@pytest.fixture(scope="module")
def group(device, ceilings, ratios):
    """group(preset, what, images, dropout, steps) -> rows by label, timed when first asked for."""

    @functools.cache
    def measured(
        preset: str, what: str, images: int, dropout: float | None, steps: int
    ) -> dict[str, Row]:
        setups = [
            replace(setup, dropout=dropout)
            for setup in rows_of(SAMPLING if steps else TRAINING, preset)
            if what in setup.works
        ]
        repeats = pairs(preset, what, steps)
        found = measure_group(
            setups, what, images, device, ceilings, steps=steps, repeats=repeats, seconds=SECONDS
        )
        ours = best_of_ours(found)
        work = f"{title(preset, what, dropout, steps)} batch {images}"
        for label, row in found.items():
            if "speedup" in row.columns:
                by_quantile = {key: row.columns[key] for key in row.columns if "speedup" in key}
                ratios.append(Ratio(work, ours, label, **by_quantile, pairs=len(row.samples.ms)))
        return found

    return measured


def best_of_ours(rows: dict[str, Row]) -> str:
    ours = {
        label: row.samples
        for label, row in rows.items()
        if label.startswith("ours") and row.samples
    }
    return min(ours, key=lambda label: ours[label].median_ms, default="")


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize(
    ("preset", "what", "images", "dropout", "steps", "label"), ROWS + SAMPLING_ROWS
)
def test_model(preset, what, images, dropout, steps, label, group, device, record):
    if not ON_GPU and images == 256:
        pytest.skip("256 images take minutes on a CPU")
    if not ON_GPU and steps and preset == "seed-cifar10":
        pytest.skip("on a CPU sampled once: cifar10 is of the same sizes")
    setup = next(
        each for each in rows_of(SAMPLING if steps else TRAINING, preset) if each.label == label
    )
    if why := setup.why_not(device):
        pytest.skip(f"{label}: {why}")
    row = group(preset, what, images, dropout, steps)[label]
    if row.why_not:
        pytest.fail(f"no figure for {label}: {row.why_not}")
    assert isinstance(row.samples, Samples)
    name = f"{title(preset, what, dropout, steps)} batch {images}"
    record(name, label, row.samples, row.columns | {"dropout": dropout})
