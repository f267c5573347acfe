"""Questions to a net f(x, t, y): a module, a wrapped module or a function."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ddpm_fast.diffusion.arguments import as_classes, positive
from ddpm_fast.kernels.calling.autocast import autocast_dtype

_MISSING = object()


def attribute(net: Any, name: str, default: Any = None) -> Any:
    """net.name, also where the net is inside DDP's or torch.compile's wrapper."""
    while net is not None:
        value = getattr(net, name, _MISSING)
        if value is not _MISSING:
            return value
        net = _inside(net)
    return default


def unwrapped(net: Any) -> Any:
    """The net inside DDP's and torch.compile's wrappers; another one as it is."""
    while (inside := _inside(net)) is not None:
        net = inside
    return net


def _inside(net: Any) -> Any:
    inside = getattr(net, "_orig_mod", None)
    return getattr(net, "module", None) if inside is None else inside


def own_device(net: Any) -> torch.device | None:
    """The device of a module's parameters; None without parameters."""
    if isinstance(net, nn.Module):
        for parameter in net.parameters():
            return parameter.device
    return None


def own_dtype(net: Any) -> torch.dtype | None:
    """The dtype of a module's first floating parameter; None without one."""
    if isinstance(net, nn.Module):
        for parameter in net.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return None


def checked_classes(net: Any, y: Any, device: torch.device | None = None) -> Tensor | None:
    """y as (N,) int64, or None as it is.

    raises  ValueError  classes for a net that was built without, or y of another dtype or shape
    """
    if y is None:
        return None
    if attribute(net, "num_classes", _MISSING) is None:
        raise ValueError("y is given, but the net was built without num_classes: leave y out")
    return as_classes(y, device)


def prediction_of(output: Any) -> Tensor:
    """The tensor that a net returned, or the `sample` of what it returned, as diffusers' nets.

    raises  ValueError  there is none
    """
    if isinstance(output, Tensor):
        return output
    sample = output.get("sample") if isinstance(output, dict) else getattr(output, "sample", None)
    if isinstance(sample, Tensor):
        return sample
    keys = f" of {', '.join(map(str, output))}" if isinstance(output, dict) else ""
    raise ValueError(
        f"the net returned a {type(output).__name__}{keys}, must be a tensor (N, C, H, W), or an "
        "object or a dict that holds it as `sample`"
    )


def running_device(net: Any, x_T: Tensor | None, device: torch.device | str | None) -> torch.device:
    """The device given, else that of the net's parameters, else x_T's, else the CPU.

    raises  ValueError  the net is on another one than was given
    """
    own = own_device(net)
    if device is None:
        return own or (torch.device("cpu") if x_T is None else x_T.device)
    device = torch.device(device)
    if own is not None and (
        own.type != device.type or None not in (device.index, own.index) and own != device
    ):
        raise ValueError(f"device={str(device)!r}, but the net is on {own}: must be the same")
    return device


def image_shape(
    net: Any, x_T: Tensor | None, image_size: int | tuple[int, int] | None, channels: int | None
) -> tuple[int, int, int]:
    """(C, H, W) as given, else x_T's, else the net's own.

    raises  ValueError  unknown, not positive, or another than x_T's
    """
    own = (None, None) if x_T is None else (tuple(x_T.shape[2:]), x_T.shape[1])
    size, channels = (
        given if given is not None else known if known is not None else attribute(net, name)
        for given, known, name in (
            (image_size, own[0], "image_size"),
            (channels, own[1], "img_channels"),
        )
    )
    if size is None or channels is None:
        raise ValueError("image_size and channels are unknown: give both, or x_T (N, C, H, W)")
    sizes = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(sizes) != 2:
        raise ValueError(f"image_size={size} must be a number of pixels, or (H, W)")
    shape = (positive("channels", channels), *(positive("image_size", s) for s in sizes))
    if x_T is not None and shape != tuple(x_T.shape[1:]):
        raise ValueError(
            f"x_T has shape {tuple(x_T.shape)}, but image_size and channels say {shape}: leave "
            "them out"
        )
    return shape


def in_dtype(net: Any, dtype: torch.dtype | None) -> Any:
    """The net itself, or a copy of a module in another dtype than some of its parameters'.

    raises  ValueError  the dtype is not floating
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype} must be None or floating, such as torch.bfloat16")
    if dtype is None or not isinstance(net, nn.Module):
        return net
    found = {p.dtype for p in net.parameters() if p.is_floating_point()}
    return net if found <= {dtype} else copy.deepcopy(net).to(dtype)


@torch.no_grad()
def copy_weights(source: nn.Module, into: nn.Module) -> None:
    """Copy parameters and buffers into another net's tensors, in the dtypes of these."""
    pairs = zip(_tensors(source), _tensors(into), strict=True)
    for theirs, own in pairs:
        own.copy_(theirs)


def addresses(net: Any, held: Iterable[Tensor], device: torch.device) -> list[int]:
    """Of a module's weights, and of what it holds made of them, on CUDA, where a graph reads them:
    another list is another graph."""
    if device.type != "cuda" or not isinstance(net, nn.Module):
        return []
    return [
        id(tensor) if is_traceable_wrapper_subclass(tensor) else tensor.data_ptr()  # quantised
        for tensor in chain(_tensors(net), held)
    ]


def without_autocast_cache(device: torch.device) -> AbstractContextManager:
    """Autocast as it is, but for its cache of cast weights, which ends with the caller's context
    while a graph would go on reading it."""
    dtype = autocast_dtype(device.type)
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=False)


@contextmanager
def eval_mode(net: Any) -> Iterator[None]:
    """No dropout while sampling; each module's mode comes back afterwards."""
    modules = list(net.modules()) if isinstance(net, nn.Module) else []
    modes = [module.training for module in modules]
    if any(modes):
        net.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training


@contextmanager
def held_weights(net: Any) -> Iterator[list[Tensor]]:
    """What modules make of their weights is made once for all steps: those that offer it by a
    context `held_weights()`, which may give the tensor."""
    held = []
    with ExitStack() as stack:
        for module in net.modules() if isinstance(net, nn.Module) else ():
            if hasattr(module, "held_weights"):
                held.append(stack.enter_context(module.held_weights()))
        yield [each for each in held if each is not None]


def _tensors(net: nn.Module) -> Iterator[Tensor]:
    return chain(net.parameters(), net.buffers())
