"""The command `sample` itself, from checkpoint to PNG files: how long 50,000 images take."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import sampling
from bench.failures import DeviceLost, failure, is_lost
from bench.model_parity import check
from bench.models import Model, Setup, weights_of
from bench.results import Results
from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.diffusion.process import Diffusion
from ddpm_fast.nn.config import UNetConfig
from ddpm_fast.sampling.command import draw
from ddpm_fast.sampling.options import SampleOptions

IMAGES, STEPS = 50_000, 50  # of the target
BATCH, MORE_BATCHES = 512, 4  # images at a time; batches after the first, which is captured
NEEDS_S = 60.0  # compiling among it; not yet measured
NAME = f"sample command DDIM-{STEPS} cifar10"


def measure_command(results: Results, device: torch.device, dry_run: bool) -> None:
    """The row; what fails in it is its own."""
    if NAME in results.earlier or results.over(NAME, 0.0 if dry_run else NEEDS_S):
        return
    columns = {"what": f"DDIM-{STEPS} to PNG files", "preset": "cifar10"}
    columns |= {"impl": "ours sample command"}
    try:
        results.add(NAME, **columns | _measured(device, dry_run))
    except Exception as error:
        results.add(NAME, **columns, why_not=failure(error))
        if is_lost(device):
            raise DeviceLost(NAME) from error


def _measured(device: torch.device, dry_run: bool) -> dict[str, Any]:
    """One batch, as the first of a process and again, then some more: what each of these takes."""
    setup = Setup(net="ours", bf16=device.type == "cuda")
    found = [
        check(Model(setup, device, 2, sampling=True, tiny=dry_run), "forward"),
        sampling.check_loop("ours", device),
    ]
    if worst := next((each for each in found if not each.green), None):
        return {"parity": str(worst), "why_not": f"parity: {worst}"}
    batch = 2 if dry_run else BATCH
    counts = batch, batch, batch * (2 if dry_run else 1 + MORE_BATCHES)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        trained = write_checkpoint(work, setup.config(dry_run))
        options = dict(device=device.type, steps=2 if dry_run else STEPS, batch_size=batch)
        options["compile"] = "on" if device.type == "cuda" else "off"  # as IMAGES have it by auto
        seconds = [_draw(trained, work / str(i), n, options) for i, n in enumerate(counts)]
    parity = "; ".join(map(str, found))
    return {"parity": parity, "batch": batch, **extrapolated(counts, seconds)}


def extrapolated(counts: Sequence[int], seconds: Sequence[float]) -> dict[str, Any]:
    """Of three calls: the first one's time, which compiles and tunes, and the rate between the
    others; the images of IMAGES that the first has not drawn take theirs at that rate."""
    more, more_s = counts[2] - counts[1], seconds[2] - seconds[1]
    if more_s <= 0:
        return {"why_not": f"{more} more images took {more_s:.2g} s: the machine was busy"}
    all_s = seconds[0] + (IMAGES - counts[0]) * more_s / more
    return {
        "images_per_s": float(f"{more / more_s:.5g}"),
        "extrapolated_s": round(all_s, 1),
        "found": f"{IMAGES:,} images in {all_s:.1f} s, EXTRAPOLATED: {seconds[0]:.1f} s for the"
        f" first {counts[0]:,} of a process, then at the rate of {more:,} more",
    }


def write_checkpoint(folder: Path, config: UNetConfig) -> Path:
    """A run's folder with the random weights of the other rows."""
    side = config.image_size or 32
    facts = {
        "net": {**config.to_json(), "image_size": side},
        "diffusion": Diffusion("linear", sampling.TIMESTEPS).to_json(),
    }
    checkpoint.save(folder / "checkpoints", 1, {"ema": weights_of(config)}, facts, keep=1)
    return folder


def _draw(trained: Path, out: Path, count: int, options: dict[str, Any]) -> float:
    """Seconds of the command, once it is imported."""
    start = time.perf_counter()
    draw(SampleOptions(
        checkpoint=str(trained), num_images=count, out=str(out), grid=False, **options
    ))  # fmt: skip
    seconds = time.perf_counter() - start
    written = len(list(out.glob("*.png")))
    if written != count:
        raise AssertionError(f"{written} files of {count} images")
    return seconds
