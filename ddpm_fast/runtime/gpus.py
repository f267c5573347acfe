"""Which GPUs a process and those beside it use, by the names that NVML knows them by."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def nvml_uuid(uuid: Any) -> str:
    """torch's UUID of a GPU as NVML writes it."""
    return f"GPU-{str(uuid).removeprefix('GPU-')}"


def visible_gpus(indices: Iterable[int]) -> dict[int, str]:
    """torch's index -> UUID. The two count differently under CUDA_VISIBLE_DEVICES."""
    import torch

    return {i: nvml_uuid(torch.cuda.get_device_properties(i).uuid) for i in indices}


def gpus_in_use(device: torch.device) -> dict[int, str]:
    """As visible_gpus, of this process and of those that torchrun started with it here."""
    if device.type != "cuda":
        return {}
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own = device.index or 0
    return visible_gpus(range(beside) if beside > own else [own])
