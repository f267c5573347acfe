"""Arguments of a sampler, checked and as Python's own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_fast.diffusion.arguments import as_float, as_int
from ddpm_fast.diffusion.nets import attribute
from ddpm_fast.diffusion.process import Diffusion
from ddpm_fast.diffusion.schedule import sampling_timesteps
from ddpm_fast.errors import nearest
from ddpm_fast.kernels.calling.arguments import given

SAMPLERS = ("ddim", "ddpm")
FIXED_VARIANCES = ("fixed_large", "fixed_small")  # the net predicts eps alone
DDIM_STEPS = 50


def process_of(net: Callable[..., Tensor], proc: Diffusion | None) -> Diffusion:
    """proc, or the net's own; a warning where both are there and differ."""
    own = attribute(net, "process")
    if proc is None:
        if own is None:
            raise ValueError("proc=None, but the net has no process of its own: give a Diffusion")
        return own
    if not isinstance(proc, Diffusion):
        raise ValueError(f"{given('proc', proc)} must be a Diffusion, or None for the net's own")
    if isinstance(own, Diffusion) and not proc.matches(own):
        warnings.warn(
            f"sampling with {proc}, but the net was trained with {own}: proc=None takes that",
            stacklevel=4,
        )
    return proc


def visited_timesteps(
    proc: Diffusion,
    sampler: str,
    steps: int | None,
    spacing: str,
    variance: str,
    eta: float,
    recompute_eps: bool,
) -> list[int]:
    """The timesteps visited, most noise first."""
    if sampler not in SAMPLERS:
        raise ValueError(
            f"sampler={sampler!r}{nearest(sampler, SAMPLERS)} must be one of {', '.join(SAMPLERS)}"
        )
    if variance not in FIXED_VARIANCES:
        raise ValueError(f"variance={variance!r} must be one of {', '.join(FIXED_VARIANCES)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must be from 0 to 1")
    if sampler == "ddim" and variance != FIXED_VARIANCES[0]:
        raise ValueError(f"variance={variance!r} is for sampler='ddpm'; ddim's noise is eta")
    if sampler == "ddpm" and (eta or not recompute_eps):
        name = f"eta={eta}" if eta else f"recompute_eps={recompute_eps}"
        raise ValueError(f"{name} is for sampler='ddim'; ddpm has its own noise and mean")
    if steps is None:
        steps = default_steps(sampler, proc.num_timesteps)
    return sampling_timesteps(proc.num_timesteps, steps, spacing)


def default_steps(sampler: str, num_timesteps: int) -> int:
    """Network calls an image where none are given."""
    return min(DDIM_STEPS, num_timesteps) if sampler == "ddim" else num_timesteps


def guidance_of(
    net: Callable[..., Tensor], guidance: float, null_class: int | None
) -> tuple[float, int | None]:
    """Check guidance and null_class; ValueError for one alone, or a net without classes."""
    guidance = as_float("guidance", guidance, "a finite number")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance={guidance} must be finite")
    if (guidance != 1) != (null_class is not None):
        raise ValueError(
            f"guidance={guidance} with null_class={null_class}: a guidance other than 1 needs "
            "the class that stands for none, and only it does"
        )
    if null_class is None:
        return guidance, None
    classes = attribute(net, "num_classes", math.inf)
    if classes is None:
        raise ValueError(f"guidance={guidance}, but the net was built without num_classes")
    null_class = as_int("null_class", null_class, "an int")
    if not 0 <= null_class < classes:
        raise ValueError(f"null_class={null_class} must be from 0 to {classes - 1}")
    return guidance, null_class


def count_of(num_images: int) -> int:
    num_images = as_int("num_images", num_images, "an int")
    if num_images < 0:
        raise ValueError(f"num_images={num_images} must not be negative")
    return num_images


def start_of(x_T: Tensor | None) -> Tensor | None:
    """x_T as a tensor; ValueError unless it is floating (N, C, H, W)."""
    if x_T is None:
        return None
    if not isinstance(x_T, Tensor):
        x_T = torch.as_tensor(x_T, device="cpu")
    if x_T.ndim != 4:
        raise ValueError(f"x_T has shape {tuple(x_T.shape)}, must be (N, C, H, W)")
    if not x_T.is_floating_point():
        raise ValueError(f"x_T has dtype {x_T.dtype}, must be floating")
    return x_T
