"""What the test files of q_sample and posterior_step share: a schedule, counters, times."""

import pytest
import torch
from torch import Tensor

T = 1000
ABAR = (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0)
COUNTERS = {"seed": 2**40 + 7, "step": 5, "first_index": 11}
IMPLS = ("fused", "reference")
FORMATS = (torch.contiguous_format, torch.channels_last)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def times(n: int) -> Tensor:
    return torch.tensor([0, 1, 500, T - 1, 17])[torch.arange(n) % 5]


def on_cuda(arguments: dict) -> dict:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments.items()}
