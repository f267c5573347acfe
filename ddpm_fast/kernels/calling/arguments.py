"""What an argument may be, whatever the op: a tensor, a flag, a number, a word, a device."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

# What a number may be as a compiler sees it, too.
_INTEGERS = (int, torch.SymInt)
_REALS = (float, int, torch.SymFloat, torch.SymInt, numbers.Real)


def given(name: str, value: object) -> str:
    """How a message begins: with a scalar itself, of anything longer with its type."""
    if value is None or isinstance(value, str | numbers.Number | torch.dtype):
        return f"{name}={value!r}"
    return f"{name} is a {type(value).__name__},"


def check_tensor(name: str, value: object, rule: str) -> None:
    """rule: what tensor it must be, such as "int64 (N,)"."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{given(name, value)} must be a tensor: {rule}")


def check_flag(name: str, value: object) -> None:
    if value is not True and value is not False:
        raise ValueError(f"{given(name, value)} must be True or False")


def check_number(name: str, value: object, rule: str) -> None:
    """A real number, but not a bool, a tensor or NaN; `rule` ends the message."""
    if not isinstance(value, _REALS) or isinstance(value, bool) or value != value:
        raise ValueError(f"{given(name, value)} must be {rule}")


def is_integer(value: object) -> bool:
    """A Python int (no bool), or a compiler's symbol for one."""
    return isinstance(value, _INTEGERS) and not isinstance(value, bool)


def as_python(value: object) -> object:
    """NumPy's integers as Python's; anything else as it is."""
    if type(value) in (int, bool) or not isinstance(value, numbers.Integral):
        return value
    return int(value)


def check_integer(name: str, value: object) -> None:
    if not is_integer(value):
        raise ValueError(f"{given(name, value)} must be an int")


def check_word(name: str, word: str, allowed: Sequence[str]) -> None:
    if word not in allowed:
        raise ValueError(f"{name}={word!r} must be one of {', '.join(allowed)}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, must be on {device} as the images are")


def as_device(device: object) -> torch.device:
    if isinstance(device, torch.device):
        return device
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"{given('device', device)} must be a torch.device or a name such as 'cpu', 'cuda:0'"
        ) from None


def as_shape(shape: object) -> tuple[int, ...]:
    """(N, ...) as a tuple."""
    rule = "must be (N, ...) with sizes >= 0"
    if not isinstance(shape, tuple | list):
        raise ValueError(f"{given('shape', shape)} {rule}")
    for size in shape:
        integer = is_integer(size) or (
            isinstance(size, numbers.Integral) and not isinstance(size, bool)
        )
        if not integer or size < 0:
            raise ValueError(f"shape={tuple(shape)} {rule}")
    if len(shape) == 0:
        raise ValueError(f"shape={tuple(shape)} {rule}")
    return tuple(shape)


def bounds_of(values: Tensor) -> tuple[int, int]:
    """The least and the largest of the integers, on the host; at least one is there."""
    if values.numel() == 1:  # 0.3 us, not 4: a sampler's t
        value = values.item()
        return value, value
    least, most = values.aminmax()
    return least.item(), most.item()
