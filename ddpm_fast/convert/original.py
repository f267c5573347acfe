"""Checkpoints of the original repository (dongwookim-ml/DDPM): a .pth of its GaussianDiffusion.

The state dict holds the schedule's buffers beside `model.*` and `ema_model.*`, whose names our
U-Net shares. Read with weights_only: no code from the file runs.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from ddpm_fast.checkpoint import CheckpointError
from ddpm_fast.diffusion.process import Diffusion


def read_pth(path: Path) -> dict[str, Tensor]:
    """The file's state dict on the CPU; CheckpointError if it is anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged pickle: the error says enough
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the reader raise nearly every kind
        if isinstance(error, OSError) and error.filename is not None:  # it could not be opened
            raise CheckpointError(f"{path}: {error.strerror}") from None
        first = str(error).split(". ")[0].split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a file of weights only: {first}") from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise CheckpointError(f"{path} must hold a state dict of tensors")
    return state


def net_weights(state: dict[str, Tensor], path: Path, *, ema: bool = True) -> dict[str, Tensor]:
    """The U-Net's weights, averaged ones if `ema`; CheckpointError if there are none."""
    prefix = "ema_model." if ema else "model."
    weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not weights:
        raise CheckpointError(
            f"{path} holds no {prefix}* weights; is it the original's checkpoint?"
        )
    return weights


def num_classes(state: dict[str, Tensor]) -> int | None:
    """How many classes the net was trained on; None: it is unconditional."""
    rows = [len(v) for k, v in state.items() if k.endswith("class_bias.weight")]
    return rows[0] if rows else None


def diffusion(state: dict[str, Tensor], path: Path) -> Diffusion:
    """The process of the file's own betas."""
    if "betas" not in state:
        raise CheckpointError(f"{path} holds no betas; is it the original's checkpoint?")
    return Diffusion.from_betas(state["betas"].double())
