"""Which device a command runs on, and what its lack of memory looks like."""

from __future__ import annotations

import warnings

import torch

from ddpm_fast.errors import UsageError


def pick_device(name: str) -> torch.device:
    """ "auto" -> CUDA if there is one, else the CPU; UsageError for a device that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"{count} CUDA device{'s' * (count != 1)}" if count else "no CUDA device"
        raise UsageError(
            f"--device {name}: this machine has {found} that torch {torch.__version__} can use; "
            "allowed here: " + ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
        )
    return device


def set_tf32(on: bool = False) -> None:
    """fp32 convolutions and matrix products on CUDA alike multiply in TF32; else neither does.

    torch's own default is one of each, and so is no precision: every command calls this first.
    """
    with warnings.catch_warnings():  # some versions recommend the newer switch
        warnings.simplefilter("ignore", UserWarning)
        # These set the newer fp32_precision too; set the other way round, reading these raises.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on CUDA or on the CPU, by torch, the driver or a library."""
    said = (
        "out of memory",
        "ALLOC_FAILED",
        "can't allocate memory",
        "could not create a primitive",
    )
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)
