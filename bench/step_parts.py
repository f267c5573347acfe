"""Parts of a training step in the ways there are: upsampling, the first convolution, q_sample,
the optimizer. From these rows it is decided which way the package takes.

Of each part the first way is what the others are compared with, in figures and in what they
compute: a way whose result is another has its reason and no figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.model_parity import Parity, distance
from bench.results import Results
from bench.timing import Call, speedup, time_in_turns

SECONDS = 0.5
NEEDS_S = 7.0  # a part's two passes. Not yet measured
PARAMETERS = 35_746_307  # of the CIFAR-10 net, in 300 tensors
# Relative L2 between two ways: bf16 keeps 8 bits, and a sum of taps rounds the weights (1.7e-3);
# in fp32 the order of sums.
BF16, FP32 = 1e-2, 1e-5
MAX_NORM, EMA_WEIGHT, WEIGHTS_STD = 1.0, 1e-4, 0.01
# Of the changes by a step. An average of 0.01 moves by 1e-7, of which fp32's spacing is 1 %.
OPTIMIZER = 5e-2


@dataclass(frozen=True)
class Part:
    """
    ways       name -> the call that is timed; the first is the one to compare with
    results    name -> what that way computes, from the same inputs
    tolerance  relative L2 between two ways
    """

    name: str
    ways: Mapping[str, Call]
    results: Mapping[str, Sequence[Tensor]]
    tolerance: float

    def parity(self, way: str) -> Parity:
        first = next(iter(self.ways))
        far = distance(self.results[way], self.results[first])
        return Parity(far, self.tolerance, f"result of {first}")


def measure_step_parts(results: Results, device: torch.device, dry_run: bool) -> None:
    """Each part in the ways there are, in turns."""
    for part in (_upsample, _first_conv, _q_sample, _optimizer):
        name = part.__name__.removeprefix("_")
        if not results.over(name, 0.0 if dry_run else NEEDS_S):
            for each in part(device, dry_run):
                _measure(results, each, device, 0.1 if dry_run else SECONDS)


def _measure(results: Results, part: Part, device: torch.device, seconds: float) -> None:
    parity = {way: part.parity(way) for way in part.ways}
    green = {way: [call] for way, call in part.ways.items() if parity[way].green}
    samples = time_in_turns(green, device, seconds=seconds) if green else {}
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


def _dtype(device: torch.device) -> tuple[torch.dtype, float]:
    """And the tolerance between two ways in it."""
    return (torch.float32, FP32) if device.type == "cpu" else (torch.bfloat16, BF16)


def _random(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    values = torch.randn(tuple(shape), device=device).to(dtype)
    return values.contiguous(memory_format=torch.channels_last).requires_grad_()


def _upsample(device: torch.device, tiny: bool) -> list[Part]:
    """Nearest neighbour and a 3x3 convolution, as that or as one transposed 4x4 convolution."""
    n, channels, side = (2, 8, 4) if tiny else (256, 256, 16)
    dtype, tolerance = _dtype(device)
    x = _random((n, channels, side, side), device, dtype)
    weight = _random((channels, channels, 3, 3), device, dtype)
    # The taps of a 4x4 kernel at stride 2 that are sums of the 3x3's
    taps = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], device=device).float()

    def plain() -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)

    def transposed() -> Tensor:
        kernel = torch.einsum("ka,oiab,lb->iokl", taps, weight.float(), taps).to(dtype)
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(x, kernel, stride=2, padding=1)

    name = f"upsample {n}x{channels}x{side}x{side}"
    ways = {"plain": plain, "transposed": transposed}
    return _forward_and_backward(name, ways, (x, weight), tolerance)


def _first_conv(device: torch.device, tiny: bool) -> list[Part]:
    """The net's first convolution, of 3 channels, or of 8, as tensor cores take them: the images
    padded in the step, the weight too, so that the parameter stays as it is."""
    n, channels, side = (2, 8, 8) if tiny else (256, 128, 32)
    dtype, tolerance = _dtype(device)
    x = _random((n, 3, side, side), device, dtype).detach()  # images need no gradient
    weight = _random((channels, 3, 3, 3), device, dtype)
    ways = {
        "plain": lambda: F.conv2d(x, weight, padding=1),
        "padded to 8 channels": lambda: F.conv2d(_to_8(x), _to_8(weight), padding=1),
    }
    return _forward_and_backward(f"first conv {n}x3x{side}x{side}", ways, (weight,), tolerance)


def _to_8(x: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 8, H, W), in channels_last"""
    padded = F.pad(x, (0, 0, 0, 0, 0, 8 - x.shape[1]))
    return padded.contiguous(memory_format=torch.channels_last)


def _forward_and_backward(
    name: str, ways: Mapping[str, Callable[[], Tensor]], inputs: Sequence[Tensor], tolerance: float
) -> list[Part]:
    """Outputs, then the gradients of one dy; of `backward` only that pass is timed."""
    outputs = {way: call() for way, call in ways.items()}
    dy = torch.randn_like(next(iter(outputs.values())))
    backward = {
        way: lambda y=y: torch.autograd.grad(y, inputs, dy, retain_graph=True)
        for way, y in outputs.items()
    }
    forward = {way: torch.no_grad()(call) for way, call in ways.items()}
    results = {way: [y.detach()] for way, y in outputs.items()}
    gradients = {way: call() for way, call in backward.items()}
    return [
        Part(f"{name} forward", forward, results, tolerance),
        Part(f"{name} backward", backward, gradients, tolerance),
    ]


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
    from ddpm_fast.ema import move_averages

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
    from ddpm_fast.fused_adamw import FusedAdamW

    optimizer = FusedAdamW(parameters)
    ema_weights = torch.full((1,), EMA_WEIGHT, device=parameters[0].device)
    return lambda: optimizer.step(max_norm=MAX_NORM, emas=[averages], ema_weights=ema_weights)
