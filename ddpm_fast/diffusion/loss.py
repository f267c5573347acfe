"""Distances between predicted and true noise, averaged over every element.

Plain torch: forward and backward of it took 0.03 % of a training step of the digits preset (2 CPU
cores), so there is nothing for a fused kernel to win; on a GPU not measured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.errors import nearest

_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}
LOSSES = tuple(_LOSSES)


def check_loss(kind: str) -> str:
    """`kind` itself; ValueError unless it is one of LOSSES."""
    if kind not in _LOSSES:
        raise ValueError(f"loss={kind!r}{nearest(kind, LOSSES)} must be one of {', '.join(LOSSES)}")
    return kind


def distance(prediction: Tensor, target: Tensor, kind: str = "l2") -> Tensor:
    """Mean |d|, d^2, or Huber of width 1 ("l1", "l2", "huber") of d = prediction - target.

    prediction, target  (N, C, H, W); compared in fp32, in fp64 for a prediction in it
    returns             () of that dtype
    """
    dtype = torch.promote_types(torch.float32, prediction.dtype)
    return _LOSSES[check_loss(kind)](prediction.to(dtype), target.to(dtype))
