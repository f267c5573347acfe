"""What the tests of checkpoints share: a small state that holds one value."""

import os

import pytest
import torch

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork or rlimits")
WAIT_S = 30  # for what comes at once; only a hang takes so long


def parts(value, size=64):
    """Two parts whose every element tells which save they come from."""
    return {
        "model": {"w": torch.full((size, 8), float(value)), "b": torch.full((8,), float(value))},
        "ema": {"w": torch.full((size, 8), float(value))},
    }


def value_of(saved):
    """The value that all of a checkpoint's tensors hold."""
    (value,) = {t.unique().item() for part in saved.parts.values() for t in part.values()}
    return value
