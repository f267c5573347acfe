"""What torch.autocast does on a device; nothing on the meta device, which it does not know."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What it casts fp32 tensors to; None where it is off."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def kept_in(dtype: torch.dtype, device_type: str) -> AbstractContextManager:
    """A context in which autocast does not cast tensors of `dtype`.

    Only where it would: torch caches no compiled graph that switches autocast between runs.
    """
    if autocast_dtype(device_type) in (None, dtype):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
