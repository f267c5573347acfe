"""Parts of a training step in the ways there are: q_sample, the optimizer, convolutions. From
these rows it is decided which way the package takes.

Of each part the first way is what the others are compared with, in figures and in what they
compute: a way whose result is another has its reason and no figure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.convolutions import LIMITS, algorithms, convolutions
from bench.failures import DeviceLost, failure, is_lost
from bench.part import FP32, Part
from bench.results import Results
from bench.timing import Call, speedup

SECONDS = 0.3
NEEDS_S = 5.0  # a part's two passes. Not yet measured
IMAGES = 256
PARAMETERS = 35_746_307  # of the CIFAR-10 net, in 300 tensors
MAX_NORM, EMA_WEIGHT, WEIGHTS_STD = 1.0, 1e-4, 0.01
# Of the changes by a step. An average of 0.01 moves by 1e-7, of which fp32's spacing is 1 %.
OPTIMIZER = 5e-2


def measure_step_parts(results: Results, device: torch.device, dry_run: bool) -> None:
    """Each part in the ways there are, in turns; the convolutions for each of LIMITS."""
    for make in (_q_sample, _optimizer):
        name = make.__name__.removeprefix("_")
        _measure_all(results, name, partial(make, device, dry_run), device, dry_run)
    for i, (limit_name, limit) in enumerate(LIMITS.items()):
        images = 2 if dry_run else IMAGES + 8 * i  # a shape that was timed keeps its algorithm
        with algorithms(limit):
            for name, make in convolutions(device, images, dry_run).items():
                _measure_all(results, f"{name}, {limit_name}", make, device, dry_run, limit_name)


def _measure_all(
    results: Results,
    name: str,
    make: Callable[[], list[Part]],
    device: torch.device,
    dry_run: bool,
    suffix: str = "",
) -> None:
    """The rows of what `make` makes; what fails in it is its own."""
    tried = results.data.setdefault("tried", [])  # also by a process before this one
    if name in tried or results.over(name, 0.0 if dry_run else NEEDS_S):
        return
    tried.append(name)
    try:
        for part in make():
            named = replace(part, name=f"{part.name}, {suffix}") if suffix else part
            _measure(results, named, device, 0.1 if dry_run else SECONDS)
    except Exception as error:
        results.add(name, what=name, impl="all ways", why_not=failure(error))
        if is_lost(device):
            raise DeviceLost(name) from error


def _measure(results: Results, part: Part, device: torch.device, seconds: float) -> None:
    parity, samples = part.timed(device, seconds=seconds)
    first = next(iter(part.ways))
    for way, found in parity.items():
        columns = {"what": part.name, "impl": way, "parity": str(found)}
        if not found.green:
            columns["why_not"] = f"parity: {found}"
        else:
            columns |= samples[way].row()
            if way != first:
                columns |= speedup(samples[way], samples[first])
        results.add(f"{part.name} {way}", **columns)


def _q_sample(device: torch.device, tiny: bool) -> list[Part]:
    """Ours as it is called, against plain torch with its own generator; held against each other
    with the same noise."""
    from ddpm_fast.diffusion.process import Diffusion

    n, proc = 4 if tiny else 256, Diffusion()
    x_0 = torch.rand(n, 3, 32, 32, device=device) * 2 - 1
    t = torch.randint(0, 1000, (n,), device=device)
    alphas_cumprod = proc.alphas_cumprod.to(device, torch.float32)

    def plain(eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        eps = torch.randn_like(x_0) if eps is None else eps
        abar_t = alphas_cumprod[t][:, None, None, None]
        return abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * eps, eps

    eps = torch.randn_like(x_0)
    results = {"plain": plain(eps), "ours": proc.q_sample(x_0, t, noise=eps)}
    ways = {"plain": plain, "ours": lambda: proc.q_sample(x_0, t, seed=1)}
    return [Part(f"q_sample {n}x3x32x32", ways, results, FP32)]


def _optimizer(device: torch.device, tiny: bool) -> list[Part]:
    """Clip, AdamW and EMA by torch's kernels, and in one pass; 36 bytes a parameter the floor."""
    size = (10_000 if tiny else PARAMETERS) // 300
    steps = {
        "fused + foreach": _foreach_step,
        "fused, as the trainer": _trainers_step,
        "FusedAdamW": _fused_step,
    }
    ways, results = {}, {}
    for way, make in steps.items():
        generator = torch.Generator().manual_seed(0)
        drawn = WEIGHTS_STD * torch.randn(2, 300, size, generator=generator).to(device)
        parameters = [each.clone().requires_grad_() for each in drawn[0]]
        for parameter, gradient in zip(parameters, drawn[1], strict=True):
            parameter.grad = gradient.clone()
        averages = [parameter.detach().clone() for parameter in parameters]
        ways[way] = make(parameters, averages)
        ways[way]()
        changed = [new.detach() - old for new, old in zip(parameters, drawn[0], strict=True)]
        moved = [new - old for new, old in zip(averages, drawn[0], strict=True)]
        results[way] = [*changed, *(each / EMA_WEIGHT for each in moved)]
    name = f"clip, AdamW, EMA of {300 * size / 1e6:.2f} M"
    return [Part(name, ways, results, OPTIMIZER)]


def _foreach_step(parameters: list[Tensor], averages: list[Tensor]) -> Call:
    """With a share of the average that the host knows: not to be captured while it changes."""
    return _torchs_step(
        parameters, lambda weights: torch._foreach_lerp_(averages, weights, EMA_WEIGHT)
    )


def _trainers_step(parameters: list[Tensor], averages: list[Tensor]) -> Call:
    from ddpm_fast.optim.ema import move_averages

    share = torch.tensor(EMA_WEIGHT, device=parameters[0].device)
    return _torchs_step(parameters, lambda weights: move_averages(averages, weights, share))


def _torchs_step(parameters: list[Tensor], average: Callable[[list[Tensor]], None]) -> Call:
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)
        optimizer.step()
        average([each.detach() for each in parameters])

    return step


def _fused_step(parameters: list[Tensor], averages: list[Tensor]) -> Call:
    from ddpm_fast.optim.fused_adamw import FusedAdamW

    optimizer = FusedAdamW(parameters)
    ema_weights = torch.full((1,), EMA_WEIGHT, device=parameters[0].device)
    return lambda: optimizer.step(max_norm=MAX_NORM, emas=[averages], ema_weights=ema_weights)
