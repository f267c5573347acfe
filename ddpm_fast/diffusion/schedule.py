"""Noise schedules as fp64 tables, and the timesteps a sampler visits.

alphas_cumprod[t] = prod over s <= t of (1 - betas[s]); t = 0 is the least noise.
Tables are fp64 because 1 - alphas_cumprod cancels in fp32 at small t (2e-4 relative at t = 1).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.diffusion.arguments import as_int
from ddpm_fast.errors import nearest

SCHEDULES = ("linear", "cosine", "sigmoid")
SPACINGS = ("leading", "linspace", "trailing", "quadratic")
MAX_BETA = 0.999
STARTS_FROM = 0.9  # of T: below, images are not noise yet


def make_betas(schedule: str, num_timesteps: int, low: float = 1e-4, high: float = 0.02) -> Tensor:
    """The variances added at each step.

    schedule       "linear", "cosine" or "sigmoid"
    num_timesteps  T >= 1
    low, high      ends of the linear schedule at T = 1000, scaled by 1000 / T; others ignore them
    returns        (T,) float64, each in (0, 1)
    raises         ValueError for an unknown schedule or betas outside (0, 1)
    source         Ho et al. 2020, section 4; Nichol & Dhariwal 2021, eq. 17; Jabri et al. 2022
    """
    rule = "a positive integer"
    num_timesteps = as_int("num_timesteps", num_timesteps, rule)
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps={num_timesteps} must be {rule}")
    match schedule:
        case "linear":
            return _linear(num_timesteps, low, high)
        case "cosine":
            return _from_alphas_cumprod(_cosine_abar, num_timesteps)
        case "sigmoid":
            return _from_alphas_cumprod(_sigmoid_abar, num_timesteps)
    raise ValueError(
        f"schedule={schedule!r}{nearest(schedule, SCHEDULES)} must be one of {', '.join(SCHEDULES)}"
    )


def _linear(num_timesteps: int, low: float, high: float) -> Tensor:
    scale = 1000 / num_timesteps
    if not 0 < low * scale <= high * scale < 1:
        raise ValueError(
            f"linear schedule from {low} to {high}, times 1000 / {num_timesteps} = {scale:g}, "
            "must stay in (0, 1) and not fall: take more timesteps or another schedule"
        )
    return torch.linspace(
        low * scale, high * scale, num_timesteps, dtype=torch.float64, device="cpu"
    )


def _from_alphas_cumprod(abar, num_timesteps: int) -> Tensor:
    """betas of a continuous abar(u), u in [0, 1], capped at MAX_BETA."""
    steps = torch.arange(num_timesteps + 1, dtype=torch.float64, device="cpu")
    table = abar(steps / num_timesteps)
    return (1 - table[1:] / table[:-1]).clamp(max=MAX_BETA)


def _cosine_abar(u: Tensor, offset: float = 0.008) -> Tensor:
    return torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2


def _sigmoid_abar(u: Tensor, start: float = -3.0, end: float = 3.0) -> Tensor:
    first, last = torch.sigmoid(torch.tensor([start, end], dtype=torch.float64, device="cpu"))
    return (last - torch.sigmoid(u * (end - start) + start)) / (last - first)


def sampling_timesteps(num_timesteps: int, steps: int, spacing: str = "trailing") -> list[int]:
    """The timesteps a sampler visits, most noise first, strictly falling.

    num_timesteps  T
    steps          1 <= steps <= T
    spacing        "trailing": from T - 1 down; "leading": multiples of T // steps from 0;
                   "linspace": T - 1 to 0; "quadratic": dense at little noise, from 0.8 T down
    raises         ValueError for steps or spacing outside these
    source         diffusers' DDIMScheduler (offset 0); Song et al. 2020, appendix D.2

    Only "trailing" and "linspace" begin at T - 1 for all T and steps: see low_start.
    """
    rule = f"from 1 to num_timesteps={num_timesteps}"
    steps = as_int("steps", steps, rule)
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps={steps} must be {rule}")
    index = np.arange(steps)
    match spacing:
        case "leading":
            times = index * (num_timesteps // steps)
        case "linspace" if steps == 1:  # NumPy's single point is the low end
            times = np.array([num_timesteps - 1])
        case "linspace":
            times = np.linspace(0, num_timesteps - 1, steps).round()
        case "trailing":
            times = np.round(np.arange(num_timesteps, 0, -num_timesteps / steps))[:steps][::-1] - 1
        case "quadratic":
            times = np.floor(np.linspace(0, math.sqrt(0.8 * num_timesteps), steps) ** 2)
            times = np.maximum(times, index)  # many steps: the parabola would repeat its start
        case _:
            raise ValueError(
                f"spacing={spacing!r}{nearest(spacing, SPACINGS)} must be one of "
                f"{', '.join(SPACINGS)}"
            )
    return [int(t) for t in times[::-1]]


def low_start(num_timesteps: int, times: list[int], spacing: str) -> str | None:
    """A warning for timesteps that begin where x_t is not noise yet; None: they do not."""
    if times[0] >= STARTS_FROM * (num_timesteps - 1):
        return None
    return (
        f"spacing={spacing!r} with steps={len(times)} begins at t = {times[0]} of {num_timesteps}, "
        f"where images are not pure noise yet: begin at t = {num_timesteps - 1} by "
        "spacing='trailing', or give x_T"
    )
