"""Where Triton kernels are launched: whether they can be, on what device, for which chip."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from ddpm_fast.kernels.calling.impl import interpreting

_HAS_TRITON = find_spec("triton") is not None
INTERPRETED_ARCH = 90  # whose launch numbers the interpreter takes


def arch_of(device: torch.device) -> int:
    """90 for compute capability 9.0; a constant to torch.compile."""
    return INTERPRETED_ARCH if device.type != "cuda" else _cuda_arch(device.index)


def _cuda_arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


# What @torch.compiler.assume_constant_result does; that would import the compiler with this module.
_cuda_arch._dynamo_marked_constant = True


@functools.cache
def device_name_of(device: torch.device) -> str:
    """The device's name, such as "NVIDIA H200"; "" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def on_device_of(x: Tensor) -> AbstractContextManager:
    """A context in which launches go to x's device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def why_no_triton() -> str | None:
    """Why there is no Triton, with what mends it; None if there is."""
    return None if _HAS_TRITON else "Triton is not installed: pip install triton"


def why_not_fused(device_type: str) -> str | None:
    """Why our Triton kernels cannot run on such a device, with what mends it; None if they can."""
    if device_type == "cpu" and not interpreting():
        return (
            "the Triton kernels run on cuda, and on cpu only with TRITON_INTERPRET=1 (slow, for"
            " tests)"
        )
    if device_type not in ("cpu", "cuda"):
        return f"the Triton kernels run on cuda, not on {device_type}"
    return why_no_triton()
