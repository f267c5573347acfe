"""The trainer itself, as a process: images per second of a real run, and whether compiled or
captured steps have the losses of eager ones."""

from __future__ import annotations

import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from bench import environment
from bench.results import SUITE, Results, read_json

IMAGES, SIDE = 10_000, 32  # random ones: a step's time does not depend on what they show
LONG_S = 60.0
STOP_S = 20.0  # for the checkpoint of an interrupted run
PARITY_STEPS = 10
# Of the losses, relative. bf16 rounds outputs to 4e-3; losses are means of 3072 squares an image.
TOLERANCE = 1e-2

TINY = (
    *("--base-channels", "8", "--channel-mults", "1,2", "--num-groups", "4", "--device", "cpu"),
    *("--attention-resolutions", "1", "--time-emb-dim", "8", "--precision", "fp32"),
)
EAGER = ("--no-compile",)
AS_TRAINED = "compiled and captured, not deterministic"
WAYS = {  # in order of worth; those after the first compiled one find what it has compiled
    "captured": ("--no-compile", "--cuda-graph", "on"),
    "compiled and captured": ("--compile", "--cuda-graph", "on"),
    # cuDNN's fastest algorithms and torch's own choice of attention: the path that trains
    AS_TRAINED: ("--no-deterministic", "--compile", "--cuda-graph", "on"),
    "compiled": ("--compile",),
}
# Seconds of a run of PARITY_STEPS, from its imports to its checkpoint. Not yet measured
EAGER_RUN_S, COMPILED_RUN_S = 30.0, 80.0
STARTS_S = 50.0  # of the long run: imports, compiling what the parity's runs have cached


class RunFailed(Exception):
    """A training run ended by itself, or wrote no metrics in time."""


def measure_graph_parity(results: Results, dry_run: bool) -> None:
    """Losses of the first steps, each way against eager: the largest relative difference."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        # Without the last flag no two runs would have the same bits; one way takes it back.
        base = [*_flags(work, dry_run), "--log-every", "1", "--deterministic"]
        has_graph = offers_cuda_graph()
        eager_flags = [*EAGER, *(("--cuda-graph", "off") if has_graph else ())]
        eager = _losses([*base, *eager_flags], work, results.left_s())
        results.add(f"eager, {PARITY_STEPS} steps", last_loss=eager[-1])
        ways = WAYS
        if dry_run:
            ways = {"eager again": EAGER, AS_TRAINED: ("--no-deterministic", *EAGER)}
        for way, flags in ways.items():
            if "--cuda-graph" in flags and not has_graph:
                results.add(way, impl=way, why_not="the trainer has no --cuda-graph")
                continue
            needs_s = COMPILED_RUN_S if "--compile" in flags else EAGER_RUN_S
            if results.over(way, 0.0 if dry_run else needs_s):
                continue
            without_graph = [] if "--cuda-graph" in flags or not has_graph else ["off"]
            more = [word for off in without_graph for word in ("--cuda-graph", off)]
            try:
                losses = _losses([*base, *flags, *more], work, results.left_s())
            except RunFailed as error:
                results.add(way, impl=way, why_not=str(error))
                continue
            each = [abs(a - b) / abs(b) for a, b in zip(losses, eager, strict=True)]
            far = math.nan if any(map(math.isnan, each)) else max(each)  # max() may hide a NaN
            color = "green" if far <= TOLERANCE else "red"
            parity = f"{color}: losses {far:.1e} of {TOLERANCE:.0e}"
            found = "bitwise the same" if losses == eager else f"largest difference {far:.1e}"
            results.add(way, impl=way, parity=parity, found=found)


def measure_long_run(
    results: Results, dry_run: bool, shares: Callable[[int, float], dict[str, float]]
) -> None:
    """img/s of a minute of training: the median of the second half of what it logged.

    shares  (images, ms of a step with so many) -> its MFU and the like; called after the run
    """
    way = "eager" if dry_run else "compiled and captured" if offers_cuda_graph() else "compiled"
    flags, seconds = WAYS.get(way, EAGER), 6.0 if dry_run else LONG_S
    every, batch = ("2", 4) if dry_run else ("20", 512)
    name = f"train cifar10 {way} batch {batch}"
    if results.over(name, 0.0 if dry_run else STARTS_S + seconds / 2 + STOP_S):
        return
    with tempfile.TemporaryDirectory() as folder:
        lines = run_trainer(
            [*_flags(Path(folder), dry_run), *flags, "--log-every", every], Path(folder),
            limit_s=results.left_s(), steady_s=seconds, lines=4 if dry_run else None,
        )  # fmt: skip
    steady = [line["images_per_s"] for line in lines[len(lines) // 2 :]]
    rate = statistics.median(steady)
    peak = max(line.get("peak_gib", 0.0) for line in lines)
    results.add(
        name, what="training run", preset="cifar10", impl=f"ours {way}", batch=batch,
        parity=_parity_of(results, way), images_per_s=rate, **shares(batch, 1e3 * batch / rate),
        images_per_s_min=min(steady), images_per_s_max=max(steady), steps=lines[-1]["step"],
        peak_gib=peak, last_loss=lines[-1]["loss"],
    )  # fmt: skip


def run_trainer(
    flags: Sequence[str],
    work: Path,
    *,
    limit_s: float,
    steady_s: float = math.inf,
    lines: int | None = None,
) -> list[dict[str, float]]:
    """Train in a process and return the lines of its metrics.jsonl.

    limit_s   in all, its stop included
    steady_s  after the first logged step it is stopped
    lines     or when it has logged so many
    raises    RunFailed if it logged fewer, or not even two, with its last words
    """
    run = Path(tempfile.mkdtemp(dir=work), "run")
    command = [sys.executable, "-m", "ddpm_fast.train", *flags, "--run-dir", str(run)]
    log = run.with_name("output.txt")
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, cwd=environment.ROOT, stdout=output, stderr=subprocess.STDOUT
        )
    path, start, first = run / "metrics.jsonl", time.monotonic(), None
    try:
        while process.poll() is None:
            found, now = read_metrics(path), time.monotonic()
            first = now if first is None and found else first
            enough = lines is not None and len(found) >= lines
            late = now - start > max(limit_s - STOP_S, limit_s / 2)
            steady = first is not None and now - first > steady_s and len(found) >= (lines or 2)
            if enough or late or steady:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)  # it saves a checkpoint and ends
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    finally:
        process.kill()
        process.wait()
    found = read_metrics(path)
    if len(found) < (lines or 2):
        said = " ".join(log.read_text(errors="replace").split())[-300:]
        raise RunFailed(f"{len(found)} logged steps: {said}")
    return found


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The whole lines of metrics.jsonl; [] where there is none."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def offers_cuda_graph() -> bool:
    """Whether the trainer has that flag; RunFailed, with its last words, if it does not start."""
    done = subprocess.run(
        [sys.executable, "-m", "ddpm_fast.train", "--help"],
        cwd=environment.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        said = " ".join(done.stderr.split())[-300:]
        raise RunFailed(f"the trainer's --help has exit code {done.returncode}: {said}")
    return "--cuda-graph" in done.stdout


def _losses(flags: Sequence[str], work: Path, seconds: float) -> list[float]:
    lines = run_trainer(flags, work, limit_s=seconds, lines=PARITY_STEPS)
    return [line["loss"] for line in lines[:PARITY_STEPS]]


def _flags(work: Path, dry_run: bool) -> list[str]:
    """Of a run of the cifar10 preset on random images that are written to `work`."""
    shape = (64 if dry_run else IMAGES, 3, SIDE, SIDE)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = work / "random.npz"
    np.savez(path, images=pixels)
    flags = ["--preset", "cifar10", "--data", str(path), "--iterations", "1000000"]
    flags += ["--sample-every", "0", "--checkpoint-every", "0", "--flip", "on"]
    # A learning rate of 0 for the parity's first steps would hide wrong gradients.
    flags += ["--warmup-steps", "10", "--batch-size", "4" if dry_run else "512"]
    return [*flags, *(TINY if dry_run else ())]


def _parity_of(results: Results, way: str) -> str:
    """What the stage graph_parity of this run found for this way to train."""
    stages = read_json(results.path.with_name(SUITE)).get("stages", {})
    rows = stages.get("graph_parity", {}).get("rows", [])
    found = [row.get("parity") for row in rows if row["name"] == way]
    return (found and found[0]) or "not checked in this run"
