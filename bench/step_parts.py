"""Parts of a training step beside the net's kernels: upsampling, q_sample, the optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.results import Results
from bench.timing import Call, time_in_turns

SECONDS = 0.5
PARAMETERS = 35_746_307  # of the CIFAR-10 net, in 300 tensors


def measure_step_parts(results: Results, device: torch.device, dry_run: bool) -> None:
    """Each part in the ways there are, in turns."""
    for part in (_upsample, _q_sample, _optimizer):
        name = part.__name__.removeprefix("_")
        if not results.over(name, 0.0 if dry_run else 15.0):
            for label, calls in part(device, dry_run).items():
                samples = time_in_turns(calls, device, seconds=0.1 if dry_run else SECONDS)
                for how, each in samples.items():
                    results.add(f"{label} {how}", **each.row())


def _upsample(device: torch.device, tiny: bool) -> dict[str, dict[str, list[Call]]]:
    """Nearest neighbour and a 3x3 convolution, as that or as one transposed 4x4 convolution."""
    n, channels, side = (2, 8, 4) if tiny else (256, 256, 16)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, device=device).to(dtype)
        return values.contiguous(memory_format=torch.channels_last).requires_grad_()

    x, weight = random(n, channels, side, side), random(channels, channels, 3, 3)
    # The taps of a 4x4 kernel at stride 2 that are sums of the 3x3's
    taps = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], device=device).float()

    def plain() -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)

    def transposed() -> Tensor:
        kernel = torch.einsum("ka,oiab,lb->iokl", taps, weight.float(), taps).to(dtype)
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(x, kernel, stride=2, padding=1)

    distance = ((plain() - transposed()).float().norm() / plain().float().norm()).item()
    if distance > 1e-2:  # bf16's rounding of the weights is 1.7e-3 of it
        raise AssertionError(f"the two ways to upsample differ by {distance:.1e}")
    ways = {"plain": plain, "transposed": transposed}
    name = f"upsample {n}x{channels}x{side}x{side}"
    return {
        f"{name} forward": {how: [torch.no_grad()(way)] for how, way in ways.items()},
        f"{name} backward": {how: [_backward(way, x, weight)] for how, way in ways.items()},
    }


def _backward(way: Callable[[], Tensor], x: Tensor, weight: Tensor) -> Call:
    y = way()
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, (x, weight), dy, retain_graph=True)


def _q_sample(device: torch.device, tiny: bool) -> dict[str, dict[str, list[Call]]]:
    """Ours as it is called, against plain torch with its own generator."""
    from ddpm_fast.diffusion.process import Diffusion

    n, proc = 4 if tiny else 256, Diffusion()
    x_0 = torch.rand(n, 3, 32, 32, device=device) * 2 - 1
    t = torch.randint(0, 1000, (n,), device=device)
    alphas_cumprod = proc.alphas_cumprod.to(device, torch.float32)

    def plain() -> tuple[Tensor, Tensor]:
        eps, abar_t = torch.randn_like(x_0), alphas_cumprod[t][:, None, None, None]
        return abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * eps, eps

    ways = {"ours": lambda: proc.q_sample(x_0, t, seed=1), "plain": plain}
    return {f"q_sample {n}x3x32x32": {how: [way] for how, way in ways.items()}}


def _optimizer(device: torch.device, tiny: bool) -> dict[str, dict[str, list[Call]]]:
    """Clip, AdamW and EMA as a training step has them now; 36 bytes a parameter are the floor."""
    size = (10_000 if tiny else PARAMETERS) // 300
    parameters = [torch.randn(size, device=device, requires_grad=True) for _ in range(300)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], 1e-4)

    return {f"clip, AdamW, EMA of {300 * size / 1e6:.2f} M": {"fused + foreach": [step]}}
