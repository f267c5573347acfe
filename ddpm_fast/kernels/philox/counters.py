"""What the counters and the key of Philox may hold: streams, ranges, host or device integers."""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from ddpm_fast.kernels.calling.arguments import given, is_integer
from ddpm_fast.kernels.calling.extension import address

MASK = 0xFFFFFFFF
SEED_RANGE = 2**63, "0 <= seed < 2**63"
STEP_RANGE = 2**32, "0 <= step < 2**32"

# A tensor: one int64 on the samples' device, which a kernel reads there when it runs, so that a
# CUDA graph can advance it.
Counter = int | Tensor

# What custom ops take: seed, seed_at, step, step_at, first_index, first_index_at; the tensor wins.
Split = tuple[int, Tensor | None, int, Tensor | None, int, Tensor | None]


class Stream(enum.IntEnum):
    """The counter's second word: what a random number is for."""

    USER = 0
    DATA_ORDER = 1
    T = 2
    NOISE = 3
    FLIP = 4
    SAMPLER_START = 5
    SAMPLER_NOISE = 6
    DROPOUT = 16  # + the layer's number


def check_counters(
    *,
    seed: int,
    stream: int,
    step: int,
    first_index: int,
    samples: int,
    elements: int,
    lanes: int = 4,
) -> None:
    """Raises ValueError if a counter field or the seed leaves its range.

    elements  of one sample; `lanes` of them share a counter
    """
    _check_range("seed", seed, *SEED_RANGE)
    check_stream(stream)
    _check_range("step", step, *STEP_RANGE)
    _check_first_index(first_index, samples)
    if elements > lanes * 2**32:
        raise ValueError(f"elements={elements} of a sample must be at most {lanes} * 2**32")


def check_stream(stream: int) -> None:
    _check_range("stream", stream, 2**32, "0 <= stream < 2**32")


def split_counters(
    seed: Counter,
    step: Counter,
    first_index: Counter,
    *,
    samples: int,
    elements: int,
    device: torch.device,
) -> Split:
    """Each counter as a host value and a tensor or None, of which the tensor wins.

    raises  ValueError  an int out of its range, or a tensor that is not one int64 on `device`
    """
    values, tensors = [], []
    for name, counter in (("seed", seed), ("step", step), ("first_index", first_index)):
        if isinstance(counter, Tensor):
            _check_tensor(name, counter, device)
            values.append(0)
            tensors.append(counter)
        else:
            values.append(counter)
            tensors.append(None)
    seed, step, first_index = values
    check_counters(
        seed=seed, stream=0, step=step, first_index=first_index, samples=samples, elements=elements
    )
    return seed, tensors[0], step, tensors[1], first_index, tensors[2]


def check_counter_values(split: Split, samples: int) -> None:
    """Raises ValueError if a counter in a tensor, which the host may read, is out of its range."""
    _, seed_at, _, step_at, _, first_index_at = split
    if seed_at is not None:
        _check_range("seed", seed_at.item(), *SEED_RANGE)
    if step_at is not None:
        _check_range("step", step_at.item(), *STEP_RANGE)
    if first_index_at is not None:
        _check_first_index(first_index_at.item(), samples)


def joined_counters(split: Split) -> dict[str, Counter]:
    """Inverse of :func:`split_counters`."""
    seed, seed_at, step, step_at, first_index, first_index_at = split
    return {
        "seed": seed if seed_at is None else seed_at,
        "step": step if step_at is None else step_at,
        "first_index": first_index if first_index_at is None else first_index_at,
    }


def counter_arguments(split: Split) -> dict[str, int]:
    """Values and addresses (0: none) by the names of the extension's arguments."""
    seed, seed_at, step, step_at, first_index, first_index_at = split
    return {
        "seed": seed,
        "seed_at": address(seed_at),
        "step": step,
        "step_at": address(step_at),
        "first_index": first_index,
        "first_index_at": address(first_index_at),
    }


def counter_tensor(counter: Counter, device: torch.device) -> Tensor:
    """() int64 on device."""
    if isinstance(counter, Tensor):
        return counter.reshape(())
    return torch.full((), counter, dtype=torch.int64, device=device)


def _check_range(name: str, value: int, end: int, rule: str) -> None:
    if not is_integer(value):
        raise ValueError(f"{given(name, value)} must be an int, {rule}")
    if not 0 <= value < end:
        raise ValueError(f"{name}={value} must satisfy {rule}")


def _check_first_index(first_index: int, samples: int) -> None:
    _check_range("first_index", first_index, 2**32, "0 <= first_index < 2**32")
    if first_index + samples > 2**32:
        raise ValueError(
            f"first_index={first_index} + {samples} samples must be at most 2**32: a sample's"
            " number is a uint32"
        )


def _check_tensor(name: str, counter: Tensor, device: torch.device) -> None:
    if counter.dtype != torch.int64 or counter.numel() != 1:
        raise ValueError(
            f"{name} is {counter.dtype} {tuple(counter.shape)}, must be an int or one int64"
        )
    if counter.device != device:
        raise ValueError(f"{name} is on {counter.device}, must be on {device} as the samples are")
