"""What failed, in one line, and whether this process can still use its device."""

from __future__ import annotations

import torch


class DeviceLost(Exception):
    """Every further call in this process would fail: says whose row it was."""


def failure(error: Exception) -> str:
    """The text of a row without a figure."""
    return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def is_lost(device: torch.device) -> bool:
    """Whether an error, such as an illegal access, was one that CUDA repeats for ever after."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
