"""The checks of bench.smoke, each a function of a device and of whether sizes are to be tiny.

A check returns what it found, as JSON values. What is wrong is an entry "red"; whatever it raises
is red too.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench import environment, packages
from bench.failures import failure
from bench.models import Model, Setup
from ddpm_fast.kernels import MODULES

Found = dict[str, Any]
STEPS = 8  # of the trainer; three warm up, the fourth is captured
SMALL_CASES, LARGE_CASES = 4, 2  # of a kernel
IMAGES = 128
REPEATS = 20  # of a convolution


@dataclass(frozen=True)
class Check:
    """One check.

    run        (device, tiny) -> what it found
    limit_s    that it may take
    alone      timed, so nothing runs beside it
    optional   not red where no time is left for it
    interprets in a dry run Triton's kernels run in the interpreter
    """

    run: Callable[[torch.device, bool], Found]
    limit_s: float
    alone: bool = False
    optional: bool = False
    interprets: bool = False


def describe(device: torch.device, tiny: bool) -> Found:
    """Versions, cuDNN, the attention that trains."""
    return environment.describe()


def find_packages(device: torch.device, tiny: bool) -> Found:
    missing = packages.missing()
    needed = {name: why for name, why in missing.items() if name not in packages.OPTIONAL}
    return {"packages": packages.shown(missing)} | (
        {"red": packages.shown(needed)} if needed else {}
    )


def build_extension(device: torch.device, tiny: bool) -> Found:
    """Build the extension; a tiny check only loads the installed one."""
    from bench.extension_build import build, built

    if not tiny:
        build()
    return {"extension": built()}


def compare_kernel(name: str, device: torch.device, tiny: bool) -> Found:
    """Forward and backward against fp64, in large and small cases."""
    from bench.kernel_rows import has_backward
    from bench.parity import mismatch
    from bench.subjects import Subject, dtype_for

    spec = import_module(f"ddpm_fast.kernels.{name}.op").SPEC
    dtype = dtype_for(spec, device)
    ours = Subject("ours", spec.fused, spec.tolerance[dtype])
    small = [case for case in spec.cases if case.small]
    large = [case for case in spec.cases if not case.small]
    wrong = {}
    for case in small[:1] if tiny else [*small[:SMALL_CASES], *large[:LARGE_CASES]]:
        try:
            backward = has_backward(spec, case.values, dtype, device)
            wrong[case.name] = mismatch(spec, ours, case.values, dtype, device, backward=backward)
        except Exception as error:
            wrong[case.name] = failure(error)
    red = "; ".join(f"{case}: {why}" for case, why in wrong.items() if why)
    return {"cases": list(wrong)} | ({"red": red} if red else {})


def train(options: dict[str, Any], device: torch.device, tiny: bool) -> Found:
    """Losses of the trainer's own first steps on the digits, by the algorithms that train."""
    from ddpm_fast.data import open_images
    from ddpm_fast.train.config import TrainConfig
    from ddpm_fast.train.setup import choose_algorithms, make_step, wrap_net

    if tiny:
        options = {**options, "cuda_graph": "auto", "base_channels": 8, "num_groups": 4}
    choose_algorithms(device, deterministic=False)
    # At the full rate from the first step on, so that a wrong gradient shows in the next loss; at
    # twice this rate a rounding grows 30-fold within these steps.
    config = TrainConfig(
        dropout=0.1, warmup_steps=0, learning_rate=1e-3, device=device.type, **options
    )
    step = make_step(config, open_images("digits", data_root="."), device)
    wrap_net(step, print)
    losses = []
    for i in range(STEPS):
        step(i)
        losses.append(step.loss.item())
    found = {"losses": losses, "captured": step.captured, "compiled": step.compiled}
    red = [] if step.healthy else ["a loss or gradient is not finite"]
    if options["cuda_graph"] == "on" and not step.captured:
        red.append(f"not captured: {step.why_no_graph}")
    if options["compile"] and not step.compiled and not tiny:
        red.append("not compiled")
    return found | ({"red": "; ".join(red)} if red else {})


def sample(device: torch.device, tiny: bool) -> Found:
    """The net that samples and our loop against plain ones; then the loop over the net."""
    from bench import sampling
    from bench.model_parity import check

    model = Model(_setup("ours", tiny), device, 2 if tiny else IMAGES, sampling=True, tiny=tiny)
    parity = [check(model, "forward"), sampling.check_loop("ours", device)]
    loop = sampling.call_for(model, 2 if tiny else STEPS)
    images = loop()
    red = [str(each) for each in parity if not each.green]
    if not images.isfinite().all():
        red.append("an image is not finite")
    if device.type == "cuda" and loop.sampler.why_no_graph:
        red.append(f"not captured: {loop.sampler.why_no_graph}")
    return {"parity": list(map(str, parity))} | ({"red": "; ".join(red)} if red else {})


def save_and_load(device: torch.device, tiny: bool) -> Found:
    """A checkpoint as a run writes it, from the device through a thread; the same bits back."""
    from ddpm_fast.checkpoints import own as checkpoint
    from ddpm_fast.checkpoints.writer import CheckpointWriter

    net = Model(_setup("ours", tiny), device, 1, tiny=tiny).net
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with CheckpointWriter(Path(folder), keep=1) as writer:
            writer.save(1, {"model": net.state_dict()}, {})
        seconds = round(time.perf_counter() - start, 2)
        read = checkpoint.load_newest(Path(folder), print).parts["model"]
    kept = net.state_dict()
    wrong = [name for name in kept if not torch.equal(kept[name].cpu(), read[name])]
    return {"write_s": seconds} | ({"red": f"other bits: {wrong[0]}"} if wrong else {})


def compile_step(net: str, device: torch.device, tiny: bool) -> Found:
    """Compile the step of a profile into Inductor's cache."""
    images = 2 if tiny else IMAGES
    Model(_setup(net, tiny, "default"), device, images, training=True, tiny=tiny).step()
    return {}


def profile_step(net: str, compile: str | None, device: torch.device, tiny: bool) -> Found:
    """A captured training step of the CIFAR-10 net: its rate, its kernels by name. To decide by,
    not to publish: without the models stage's parity checks."""
    from bench.step_profile import profile_of, record
    from bench.timing import time_in_turns

    setup, images = _setup(net, tiny, compile, captured=not tiny), 2 if tiny else IMAGES
    start = time.perf_counter()
    model = Model(setup, device, images, training=True, tiny=tiny)
    for _ in range(2 if tiny else 6):
        model.step()
    ready_s = time.perf_counter() - start
    steps = 2 if tiny else 20
    samples = time_in_turns({"": [model.step]}, device, repeats=steps, launch_gaps=True)[""]
    found = {
        "net": setup.label, "images": images, "ready_s": round(ready_s, 1), **samples.row(),
        "images_per_s": float(f"{1e3 * images / samples.median_ms:.4g}"),
        "profile": profile_of(record(model.step, device, steps), steps),
    }  # fmt: skip
    why = model.captured.why_not if model.captured else None
    return found | ({"red": f"not captured: {why}"} if why else {})


def time_convolutions(limit: int, device: torch.device, tiny: bool) -> Found:
    """Microseconds of each, forward and backward, in each of its ways."""
    from bench.convolutions import algorithms, convolutions

    us: dict[str, dict[str, float]] = {}
    red = []
    with algorithms(limit):
        for name, make in convolutions(device, 2 if tiny else IMAGES, tiny).items():
            try:
                for part in make():
                    parity, samples = part.timed(device, repeats=2 if tiny else REPEATS)
                    us[part.name] = {w: round(1e3 * s.median_ms, 1) for w, s in samples.items()}
                    red += [f"{part.name} {w}: {p}" for w, p in parity.items() if not p.green]
            except Exception as error:  # one shape's; the others go on
                red.append(f"{name}: {failure(error)}")
    return {"us": us} | ({"red": "; ".join(red)} if red else {})


def _setup(net: str, tiny: bool, compile: str | None = None, *, captured: bool = False) -> Setup:
    """bf16 in every way on a GPU; tiny: fp32 eager, as a CPU runs it."""
    if tiny:
        return Setup(net=net, bf16=False)
    return Setup(net=net, compile=compile, captured=captured)


def _trained(**options: Any) -> Check:
    limit_s = 120.0 if options.get("compile") else 60.0
    defaults = {"compile": False, "optimizer": "adamw", "cuda_graph": "on"}
    return Check(partial(train, defaults | options), limit_s)


def _compiled(net: str) -> Check:
    return Check(partial(compile_step, net), 150.0, optional=True)


def _timed(run: Callable[..., Found], *arguments: Any, limit_s: float) -> Check:
    return Check(partial(run, *arguments), limit_s, alone=True, optional=True)


# In their order. Those that compile come first of what runs beside each other: they take longest.
CHECKS = {
    "environment": Check(describe, 45.0),
    "packages": Check(find_packages, 60.0),
    "build": Check(build_extension, 120.0),
    "compile ours": _compiled("ours"),
    "compile diffusers": _compiled("diffusers"),
    "step compiled captured": _trained(compile=True),
    "step eager": _trained(cuda_graph="off"),
    "step captured": _trained(),
    "step one pass": _trained(optimizer="adamw-one-pass"),
    **{
        f"kernel {name}": Check(partial(compare_kernel, name), 75.0, interprets=True)
        for name in MODULES
    },
    "sampler": Check(sample, 75.0),
    "checkpoint": Check(save_and_load, 60.0),
    "profile ours compiled": _timed(profile_step, "ours", "default", limit_s=120.0),
    "profile diffusers compiled": _timed(profile_step, "diffusers", "default", limit_s=150.0),
    "profile ours eager": _timed(profile_step, "ours", None, limit_s=60.0),
    "convolutions 10 algorithms": _timed(time_convolutions, 10, limit_s=60.0),
    "convolutions all algorithms": _timed(time_convolutions, 0, limit_s=90.0),
}
FIRST = ("environment", "packages", "build")  # before all others, which need the extension
EQUAL_LOSSES = ("step eager", "step captured", "step one pass", "step compiled captured")
