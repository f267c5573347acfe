"""ddpm_fast: train and sample DDPM U-Nets at the hardware's speed.

The names below load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "UNet": "ddpm_fast.nn.unet",
    "UNetConfig": "ddpm_fast.nn.config",
    "Diffusion": "ddpm_fast.diffusion.process",
    "sample_images": "ddpm_fast.diffusion.sampler",
    "Sampler": "ddpm_fast.diffusion.sampler",
    "EMA": "ddpm_fast.optim.ema",
    "load": "ddpm_fast.checkpoints.load",
    "save": "ddpm_fast.checkpoints.load",
}

__all__ = [
    "EMA",
    "Diffusion",
    "Sampler",
    "UNet",
    "UNetConfig",
    "load",
    "ops",
    "sample_images",
    "save",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("ddpm_fast.ops")
    if name == "__version__":
        from importlib.metadata import version

        return version("ddpm-fast")
    if name not in _HOMES:
        raise AttributeError(f"module 'ddpm_fast' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
