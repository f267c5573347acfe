"""Whole models timed: one after the other for the suite, in turns for pytest; their figures."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby, product
from typing import Any

import torch

from bench import sampling
from bench.ceilings import Ceilings
from bench.failures import DeviceLost, failure, is_lost
from bench.gpu_busy import busy
from bench.model_parity import Parity, check, check_capture
from bench.model_work import work_of
from bench.models import MEMORY, SAMPLING, TRAINING, Model, Setup, side_of
from bench.results import Results
from bench.sample_command import measure_command
from bench.timing import Call, Samples, speedup, time_in_turns
from ddpm_fast.diffusion.nets import held_weights
from ddpm_fast.runtime.graphs import WARM_UP_CALLS

BATCHES = (512, 128)  # the next where one does not fit; of captured steps both, the preset's first
SAMPLED_IMAGES, DDIM_STEPS = (1, 256, 16), 50
# Seconds that a row takes; compiling forward and backward of this net, with 16 cores, most of it,
# and finding that in Inductor's cache. Not yet measured, as all of these
EAGER_S, COMPILED_S, CACHED_S = 8.0, 80.0, 40.0
AUTOTUNED_S = 180.0  # a forward pass by max-autotune
GRADIENTS_S = 60.0  # a baseline's compiled without dropout, for its parity check
SAMPLINGS = 12  # calls of a sampling row
HEADLINE_ROWS = 4  # ours and diffusers, 1 and 256 images: before the command's own row
LAUNCHES_S, IMAGE_S = 0.012, 1e-4  # of a forward pass: at least; an image's in bf16
OUT_OF_MEMORY = "out of the GPU's memory"


@dataclass
class Row:
    """What came of one setup: samples and columns, or `why_not`."""

    columns: dict[str, Any]
    samples: Samples | None = None
    why_not: str = ""


def figures(
    model: Model, what: str, samples: Samples, ceilings: Ceilings, steps: int = 1
) -> dict[str, float]:
    """Rates, and how near the median is to what the ceilings of the same run allow.

    what   "training step" or "forward", of which each image needs `steps`
    """
    work, images, ms = work_of(model.config, side_of(model.tiny)), model.images, samples.median_ms
    shares = work.shares(what, steps * images, ms, 2 if model.setup.bf16 else 4, ceilings)
    return {"images_per_s": float(f"{1e3 * images / ms:.5g}"), **shares}


def shares_of(row: dict[str, Any], ceilings: Ceilings, *, tiny: bool) -> dict[str, float]:
    """A row's MFU and share of the floor by other ceilings than it was added with."""
    config = Setup(net="ours", preset=row["preset"]).config(tiny)
    element_bytes = 2 if " bf16" in row["impl"] else 4
    work = work_of(config, side_of(tiny))
    return work.shares(row["what"], row["batch"], row["ms"], element_bytes, ceilings)


def measure_group(
    setups: Iterable[Setup],
    what: str,
    images: int,
    device: torch.device,
    ceilings: Ceilings,
    *,
    steps: int = 0,
    repeats: int | None = None,
    seconds: float = 1.0,
    tiny: bool = False,
) -> dict[str, Row]:
    """Setups by their labels, timed in turns, each after its parity check in this process.

    steps  above 0: DDIM sampling of `images` images in so many steps, instead of `what`
    """
    rows: dict[str, Row] = {}
    calls: dict[str, tuple[Model, Call]] = {}
    for setup in setups:
        row = rows[setup.label] = Row({}, why_not=setup.why_not(device))
        if not row.why_not:
            with _failure_of(row):
                calls[setup.label] = _ready(row, setup, what, images, device, steps, tiny)
    timed = {label: [call] for label, (_, call) in calls.items() if not rows[label].why_not}
    if timed:
        samples = time_in_turns(timed, device, seconds=seconds, repeats=repeats, launch_gaps=True)
        ours = _fastest(each for label, each in samples.items() if label.startswith("ours"))
        for label, each in samples.items():
            row, model = rows[label], calls[label][0]
            row.samples = each
            row.columns |= figures(model, what, each, ceilings, steps or 1)
            if ours is not None and not label.startswith("ours"):
                row.columns |= speedup(ours, each)
    return rows


def measure_models(
    results: Results, device: torch.device, ceilings: Ceilings, dry_run: bool
) -> None:
    """A training step and a forward pass of each setup, as far as time goes."""
    for setup, what, images, needs_s in model_order():
        _measure_alone(results, setup, what, device, ceilings, dry_run, needs_s, images=images)


def model_order() -> list[tuple[Setup, str, int | None, float]]:
    """(setup, what is timed, images, seconds it needs), in order of worth: captured steps at both
    of BATCHES, a net beside the other; no forward pass before the last training step. Images None:
    the largest of BATCHES that fits."""
    captured = [setup for setup in TRAINING if setup.captured]
    order = [
        (setup, "training step", images)
        for _, group in groupby(captured, key=lambda setup: setup.compile)
        for images, setup in product(reversed(BATCHES), list(group))
    ]
    order += [(setup, "training step", None) for setup in TRAINING if not setup.captured]
    order += [(setup, "forward", None) for setup in TRAINING if "forward" in setup.works]
    rows, compiled = [], set()
    for setup, what, images in order:
        code = (what, images or BATCHES[0], replace(setup, captured=False))
        needs_s = EAGER_S
        if setup.compile:
            needs_s = CACHED_S if code in compiled else COMPILED_S
            if setup.net != "ours" and what == "training step" and not _is_checked(code, compiled):
                needs_s += GRADIENTS_S
        rows.append((setup, what, images, needs_s if what == "training step" else needs_s / 2))
        compiled.add(code)
    return rows


def _is_checked(code: tuple, compiled: set[tuple]) -> bool:
    """Whether a baseline's gradients were compiled before, for this batch or another."""
    return any(each[::2] == code[::2] for each in compiled)


def measure_sampling(
    results: Results, device: torch.device, ceilings: Ceilings, dry_run: bool
) -> None:
    """images_per_s of DDIM at several numbers of images at once; after the eager ones at the
    headline's numbers the command's own."""
    for i, (setup, images, needs_s) in enumerate(sampling_order()):
        if i == HEADLINE_ROWS:
            measure_command(results, device, dry_run)
        _measure_alone(
            results, setup, "forward", device, ceilings, dry_run, needs_s,
            images=min(images, 2) if dry_run else images, steps=2 if dry_run else DDIM_STEPS,
        )  # fmt: skip


def sampling_order() -> list[tuple[Setup, int, float]]:
    """(setup, images, seconds it needs), in order of worth: before the next setups are asked,
    compiled ones after eager ones, these draw each number of images."""
    rows = []
    for _, group in groupby(SAMPLING, key=lambda setup: (setup.preset, bool(setup.compile))):
        setups = list(group)
        for images in SAMPLED_IMAGES:
            for setup in setups:
                step_s = max(LAUNCHES_S, images * (IMAGE_S if setup.bf16 else 4 * IMAGE_S))
                ready_s = COMPILED_S / 2 if setup.compile else EAGER_S
                if "max-autotune" in (setup.compile or ""):
                    ready_s = AUTOTUNED_S
                rows.append((setup, images, ready_s + SAMPLINGS * DDIM_STEPS * step_s))
    return rows


def measure_memory(
    results: Results, device: torch.device, ceilings: Ceilings, dry_run: bool
) -> None:
    """Peak of a training step; the compiled ones are the models' rows."""
    for setup in MEMORY:
        _measure_alone(results, setup, "training step", device, ceilings, dry_run, EAGER_S)


def _measure_alone(
    results: Results,
    setup: Setup,
    what: str,
    device: torch.device,
    ceilings: Ceilings,
    dry_run: bool,
    needs_s: float,
    *,
    images: int | None = None,
    steps: int = 0,
) -> None:
    """One row, if it is not there. With `images` None the largest of BATCHES that fits."""
    title = f"DDIM-{steps}" if steps else what
    shown = f"{title} {setup.preset} {setup.label}"
    if _is_there(results, shown, images):
        return
    named = f"{shown} batch {images}" if images else shown
    if results.over(named, 0.0 if dry_run else needs_s):
        return
    why = setup.why_not(torch.device("cuda") if dry_run else device)
    if dry_run and (setup.compile or setup.captured):
        why = "a dry run compiles and captures nothing"
    columns: dict[str, Any] = {"what": title, "preset": setup.preset, "impl": setup.label}
    if what == "training step":
        columns["dropout"] = setup.config().dropout
    if why:
        results.add(named, **columns, why_not=why)
        return
    for batch in (images,) if images else (2,) if dry_run else BATCHES:
        row = Row(columns | {"batch": batch})
        with _failure_of(row):
            _time_alone(row, setup, what, batch, device, ceilings, steps, dry_run)
        lost = row.why_not.startswith("fails") and is_lost(device)
        if not lost:
            _forget(device)
        if row.why_not != OUT_OF_MEMORY:
            break
    found = row.columns | ({"why_not": row.why_not} if row.why_not else {})
    results.add(f"{shown} batch {batch}", **found)
    if lost:
        raise DeviceLost(shown)


def _is_there(results: Results, shown: str, images: int | None) -> bool:
    """Whether a process before this one has added the row."""
    start = f"{shown} batch {images} " if images else f"{shown} batch "
    return any(name == shown or f"{name} ".startswith(start) for name in results.earlier)


def _time_alone(
    row: Row,
    setup: Setup,
    what: str,
    images: int,
    device: torch.device,
    ceilings: Ceilings,
    steps: int,
    tiny: bool,
) -> None:
    start = time.perf_counter()
    model, call = _ready(row, setup, what, images, device, steps, tiny)
    if row.why_not:
        return
    row.columns["ready_s"] = round(time.perf_counter() - start, 2)
    repeats = 2 if tiny else None
    samples = time_in_turns({"": [call]}, device, repeats=repeats, launch_gaps=True)[""]
    row.columns |= samples.row() | figures(model, what, samples, ceilings, steps or 1)
    if device.type == "cuda" and model.captured is not None:
        row.columns |= busy(call, device)


def _ready(
    row: Row,
    setup: Setup,
    what: str,
    images: int,
    device: torch.device,
    steps: int,
    tiny: bool,
) -> tuple[Model, Call]:
    """The call to time, after its parity check and a first call; notes both in `row`."""
    gc.collect()
    before = _allocated(device)
    model = Model(
        setup, device, images,
        training=what == "training step", sampling=steps > 0, tiny=tiny,
    )  # fmt: skip
    with held_weights(model.net) if steps else nullcontext():  # compiled as a sampler calls it
        checks = [check(model, what)]
    call: Call = model.step if model.training else model.forward
    if steps:
        checks.append(sampling.check_loop(setup.net, device))
        call = sampling.call_for(model, steps)
    if not _passed(row, checks):
        return model, call
    for _ in range(WARM_UP_CALLS if setup.captured else 1):
        call()
    if model.captured is not None:
        checks.append(check_capture(model))
        if not _passed(row, checks):
            return model, call
    our_loop = isinstance(call, sampling.OurLoop)
    why = call.sampler.why_no_graph if our_loop else model.captured and model.captured.why_not
    if why and device.type == "cuda":
        row.why_not = f"not captured: {why}"
    why_no_peak = _why_no_peak(setup, device, our_loop)
    if why_no_peak:
        row.columns["no_peak_gib"] = why_no_peak
    else:
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before  # the others' weights left out
        row.columns["peak_gib"] = round(peak / 2**30, 2)
    return model, call


def _passed(row: Row, checks: Sequence[Parity]) -> bool:
    """Whether all are green; what they found goes into the row."""
    worst = next((each for each in checks if not each.green), None)
    row.columns["parity"] = str(worst or "; ".join(map(str, checks)))
    if worst:
        row.why_not = f"parity: {worst}"
    return worst is None


def _why_no_peak(setup: Setup, device: torch.device, our_loop: bool) -> str:
    if device.type != "cuda":
        return "torch counts what a device's allocator gave out on CUDA only"
    if setup.in_graph or our_loop:
        return "a CUDA graph's memory is its own, of which torch's peak knows nothing"
    return ""


@contextmanager
def _failure_of(row: Row):
    """A net that fails, whoever's, has a row with its reason; the other rows go on."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        row.why_not = OUT_OF_MEMORY
    except Exception as error:
        row.why_not = failure(error)


def _fastest(samples: Iterable[Samples]) -> Samples | None:
    return min(samples, key=lambda each: each.median_ms, default=None)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _forget(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
