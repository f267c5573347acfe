"""From noise to images: ancestral and DDIM sampling over any f(x, t, y) that predicts noise.

Image i is a function of (seed, i): its start and its noise come from counters, so batches may be
cut anywhere. Batches are padded to `batch_size`, because a convolution may choose another
algorithm, and so other roundings, at another size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm_fast import ops
from ddpm_fast.diffusion.prediction import VARIANCES, ddim_step, ddpm_step
from ddpm_fast.diffusion.process import Diffusion
from ddpm_fast.diffusion.schedule import sampling_timesteps
from ddpm_fast.errors import nearest
from ddpm_fast.kernels.philox import Stream

SAMPLERS = ("ddim", "ddpm")
DDIM_STEPS = 50

# (timestep, x_prev, x_0), after each step; the tensors are (batch_size, C, H, W)
OnStep = Callable[[int, Tensor, Tensor], None]


def sample_images(
    net: Callable[..., Tensor],
    proc: Diffusion,
    num_images: int,
    *,
    sampler: str = "ddim",
    steps: int | None = None,
    eta: float = 0.0,
    spacing: str = "leading",
    variance: str = "fixed_large",
    clip: bool = True,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    batch_size: int = 64,
    y: Tensor | None = None,
    recompute_eps: bool = True,
    seed: int = 0,
    first_index: int = 0,
    x_T: Tensor | None = None,
    device: torch.device | str | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw images.

    net           a U-Net, or any f(x, t, y) -> eps; a module is run in eval mode
    num_images    N >= 0
    sampler       "ddim" or "ddpm" (ancestral);  steps  None: 50 for ddim, T for ddpm
    eta           DDIM's share of noise, 0 = deterministic
    spacing       "leading", "linspace", "trailing" or "quadratic"
    variance      "fixed_large" or "fixed_small", for ddpm
    clip          clamp each x_0 estimate to [-1, 1];  recompute_eps  see ddim_step
    image_size    pixels; None: the net's own;  channels  None: the net's own
    y             (N,) int64 classes, for a net that has them
    seed          with first_index + i it names image i, whatever the batches
    x_T           (N, C, H, W) to start from instead of counted noise
    device        None: that of the net's parameters, else of x_T, else the CPU
    on_step       called after each step of each batch
    returns       (N, C, H, W) fp32, clamped to [-1, 1] when clip
    raises        ValueError naming the value and what is allowed
    source        Ho et al. 2020, algorithm 2; Song et al. 2020, eq. 12
    """
    if num_images < 0 or batch_size < 1:
        raise ValueError(
            f"num_images={num_images}, batch_size={batch_size}: must be at least 0 and 1"
        )
    plan = _plan(proc, sampler, steps, spacing, variance, eta)
    plan.clip, plan.recompute_eps, plan.seed = clip, recompute_eps, seed
    device = _device(net, x_T, device)
    shape = _image_shape(net, x_T, image_size, channels)
    for name, given in (("y", y), ("x_T", x_T)):
        if given is not None and given.shape[0] != num_images:
            raise ValueError(f"{name} has {given.shape[0]} rows, must be num_images={num_images}")

    images = torch.empty((num_images, *shape), device=device)
    with torch.inference_mode(), _eval_mode(net):
        for start in range(0, num_images, batch_size):
            rows = slice(start, start + batch_size)
            batch_y = None if y is None else _pad(y[rows].to(device), batch_size)
            if x_T is None:
                x = plan.noise(
                    (batch_size, *shape), Stream.SAMPLER_START, 0, first_index + start, device
                )
            else:
                x = _pad(x_T[rows].to(device, torch.float32), batch_size)
            x = _denoise(net, x, batch_y, plan, first_index + start, on_step)
            images[rows] = x[: images[rows].shape[0]]
    return images.clamp(-1, 1) if clip else images


@dataclass
class _Plan:
    """Everything a batch needs beside its start."""

    sampler: str
    steps: list[tuple[int, float, float]]  # (t, abar_t, abar_prev), most noise first
    variance: str
    eta: float
    clip: bool = True
    recompute_eps: bool = True
    seed: int = 0

    def noise(self, shape: tuple[int, ...], stream: int, step: int, first: int, device) -> Tensor:
        return ops.philox_normal(
            shape, seed=self.seed, stream=stream, step=step, first_index=first, device=device
        )


def _plan(
    proc: Diffusion, sampler: str, steps: int | None, spacing: str, variance: str, eta: float
) -> _Plan:
    if sampler not in SAMPLERS:
        raise ValueError(
            f"sampler={sampler!r}{nearest(sampler, SAMPLERS)} must be one of {', '.join(SAMPLERS)}"
        )
    if variance not in VARIANCES:
        raise ValueError(f"variance={variance!r} must be one of {', '.join(VARIANCES)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must be from 0 to 1")
    if steps is None:
        steps = min(DDIM_STEPS, proc.num_timesteps) if sampler == "ddim" else proc.num_timesteps
    times = sampling_timesteps(proc.num_timesteps, steps, spacing)
    previous = [*times[1:], -1]
    rows = [(t, proc.abar(t), proc.abar(p)) for t, p in zip(times, previous, strict=True)]
    return _Plan(sampler, rows, variance, eta)


def _denoise(
    net: Callable[..., Tensor],
    x: Tensor,
    y: Tensor | None,
    plan: _Plan,
    first: int,
    on_step: OnStep | None,
) -> Tensor:
    """(B, C, H, W) of noise -> (B, C, H, W) of images."""
    last = plan.steps[-1][0]
    for t, abar_t, abar_prev in plan.steps:
        times = torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)
        eps = net(x, times) if y is None else net(x, times, y)
        noisy = t != last and (plan.sampler == "ddpm" or plan.eta > 0)
        noise = (
            plan.noise(tuple(x.shape), Stream.SAMPLER_NOISE, t, first, x.device) if noisy else None
        )
        if plan.sampler == "ddpm":
            x, x_0 = ddpm_step(
                x, eps, abar_t, abar_prev, clip=plan.clip, variance=plan.variance, noise=noise
            )
        else:
            x, x_0 = ddim_step(
                x, eps, abar_t, abar_prev, eta=plan.eta, clip=plan.clip,
                recompute_eps=plan.recompute_eps, noise=noise,
            )  # fmt: skip
        if on_step is not None:
            on_step(t, x, x_0)
    return x


def _device(
    net: Callable[..., Tensor], x_T: Tensor | None, device: torch.device | str | None
) -> torch.device:
    if device is not None:
        return torch.device(device)
    if isinstance(net, nn.Module):
        for parameter in net.parameters():
            return parameter.device
    return torch.device("cpu") if x_T is None else x_T.device


def _image_shape(
    net: Callable[..., Tensor],
    x_T: Tensor | None,
    image_size: int | tuple[int, int] | None,
    channels: int | None,
) -> tuple[int, int, int]:
    """(C, H, W) from x_T, else from what was given, else from the net."""
    if x_T is not None:
        if x_T.ndim != 4:
            raise ValueError(f"x_T has shape {tuple(x_T.shape)}, must be (N, C, H, W)")
        return tuple(x_T.shape[1:])
    size = getattr(net, "image_size", None) if image_size is None else image_size
    channels = getattr(net, "img_channels", None) if channels is None else channels
    if size is None or channels is None:
        raise ValueError("image_size and channels are unknown: give both, or x_T (N, C, H, W)")
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def _pad(rows: Tensor, batch_size: int) -> Tensor:
    """Repeat the last row until there are batch_size."""
    missing = batch_size - rows.shape[0]
    return rows if missing == 0 else torch.cat((rows, rows[-1:].expand(missing, *rows.shape[1:])))


@contextmanager
def _eval_mode(net: Callable[..., Tensor]) -> Iterator[None]:
    """No dropout while sampling; the mode comes back afterwards."""
    training = isinstance(net, nn.Module) and net.training
    if training:
        net.eval()
    try:
        yield
    finally:
        if training:
            net.train()
