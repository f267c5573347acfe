"""Weights in a .pth or .pt: the original repository's (dongwookim-ml/DDPM), or a plain state dict.

The original's holds the schedule's buffers beside `model.*` and `ema_model.*`, whose names our
U-Net shares. Other people's hold the net's names alone, behind wrappers' prefixes (`module.`,
`_orig_mod.`) or inside a checkpoint (`{"state_dict": ...}`). Read with weights_only: no code from
the file runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ddpm_fast.checkpoints.own import CheckpointError
from ddpm_fast.diffusion.process import Diffusion
from ddpm_fast.nn.state_dict import AVERAGED_PREFIXES, TRAINED_PREFIXES, under, without_wrappers

# Where a checkpoint keeps its weights, in order of preference: averages, then trained ones.
AVERAGES = ("ema", "ema_model", "ema_state_dict")
TRAINED = ("state_dict", "model", "model_state_dict", "net")
NESTED = 4  # most levels


def read_weights(path: Path, *, ema: bool = True) -> dict[str, Tensor]:
    """The file's state dict on the CPU, without wrappers' prefixes.

    path    a .safetensors, else a pickle
    ema     of a checkpoint that keeps both apart: the averages, or the trained weights
    raises  CheckpointError  it is anything else, or cannot be opened
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged pickle: the error says enough
            if path.suffix == ".safetensors":
                state = load_file(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the reader raise nearly every kind
        if isinstance(error, OSError) and error.filename is not None:  # it could not be opened
            raise CheckpointError(f"{path}: {error.strerror}") from None
        first = str(error).split(". ")[0].split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a file of weights only: {first}") from None
    return without_wrappers(_state_dict(state, path, ema))


def _state_dict(content: Any, path: Path, ema: bool) -> Mapping[str, Tensor]:
    """The content itself, or the state dict nested in it."""
    order = (*AVERAGES, *TRAINED) if ema else (*TRAINED, *AVERAGES)
    for _ in range(NESTED):
        if not isinstance(content, Mapping):
            break
        names = all(isinstance(name, str) for name in content)
        if names and all(isinstance(value, Tensor) for value in content.values()):
            return content
        nested = (content[name] for name in order if isinstance(content.get(name), Mapping))
        content = next(nested, None)
    raise CheckpointError(
        f"{path} must hold a state dict of tensors, itself or under one of {', '.join(order)}"
    )


def net_weights(state: dict[str, Tensor], path: Path, *, ema: bool = True) -> dict[str, Tensor]:
    """The U-Net's weights, by the prefix of their names; all where no name has one.

    Where the file is not the original's, it may hold one kind alone: for averages that are not
    there the trained weights are taken.
    raises  CheckpointError  those that were asked for are not there
    """
    prefixes = AVERAGED_PREFIXES if ema else TRAINED_PREFIXES
    if ema and "betas" not in state:
        prefixes += TRAINED_PREFIXES
    weights, prefix = under(state, prefixes)
    known = any(name.startswith(AVERAGED_PREFIXES + TRAINED_PREFIXES) for name in state)
    if not prefix and (not state or "betas" in state or known):
        raise CheckpointError(f"{path} holds no {prefixes[0]}* weights; see ema={ema}")
    return weights


def num_classes(state: dict[str, Tensor]) -> int | None:
    """How many classes the net was trained on; None: it is unconditional."""
    for name, value in state.items():
        if name.endswith("class_bias.weight") and value.ndim == 2:
            return len(value)
    return None


def diffusion(state: dict[str, Tensor], path: Path) -> Diffusion | None:
    """The process of the file's own betas; None: it has none. CheckpointError for unsound ones."""
    if "betas" not in state:
        return None
    try:
        return Diffusion.from_betas(state["betas"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
