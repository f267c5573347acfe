"""Floating-point operations and least bytes of the ops that torch.profiler saw, from their shapes.

A product counts 2 a multiply-add. Bytes are those of an op that reads each input and writes each
output once: what a cache keeps is not known here. Our own ops are counted by their KernelSpec.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ddpm_fast.kernels import SPECS

_ITEMSIZE = {
    "float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long": 8, "long int": 8, "int": 4,
    "bool": 1, "unsigned char": 1, "signed char": 1,
}  # fmt: skip
_DTYPE = {"float": torch.float32, "c10::BFloat16": torch.bfloat16, "c10::Half": torch.float16}
_POINTWISE = re.compile(
    r"aten::(add|sub|mul|div|lerp|silu|silu_backward|sigmoid|relu|mish|neg|sqrt|where"
    r"|native_group_norm|native_group_norm_backward)_?$"
)


class Work(NamedTuple):
    """An op's FLOPs, of products only (0 without any), and bytes; None: not known."""

    flops: float | None
    bytes: float | None


def work_of(event: Any) -> Work | None:
    """The work of a torch.profiler FunctionEvent with shapes; None for an unknown op."""
    name, shapes = event.name, event.input_shapes
    dtypes = getattr(event, "input_dtypes", None) or [""] * len(shapes)  # torch 2.13 has them
    if not shapes:
        return None
    if name in _OURS:
        return _of_ours(*_OURS[name], shapes, dtypes)
    if name == "aten::convolution":
        return _of_convolution(shapes, dtypes, event.concrete_inputs)
    if name == "aten::convolution_backward":
        return _of_convolution_backward(shapes, dtypes, event.concrete_inputs)
    if name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"):
        a, b = [s for s in shapes if s][-2:]
        out = [*a[:-1], b[-1]]
        return Work(2 * math.prod(a) * b[-1], _bytes(shapes, dtypes, out))
    if name.startswith("aten::_scaled_dot_product_"):
        return _of_attention(name.endswith("_backward"), shapes, dtypes)
    if name == "aten::copy_" or name.startswith("triton_"):  # all that is written is among these
        return Work(0, _bytes(shapes, dtypes))
    if _POINTWISE.match(name):
        return Work(0, _bytes(shapes, dtypes, max(shapes, key=_numel)))
    return None


def _numel(shape: Sequence[int]) -> int:
    return math.prod(shape) if shape else 0


def _bytes(
    shapes: Sequence[list[int]], dtypes: Sequence[str], *outputs: Sequence[int]
) -> int | None:
    """Bytes read and written; outputs count in the first input's dtype. None without dtypes."""
    if dtypes[0] not in _ITEMSIZE:
        return None
    read = sum(
        _numel(shape) * _ITEMSIZE.get(dtype, 0) for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return read + sum(map(_numel, outputs)) * _ITEMSIZE[dtypes[0]]


def _of_convolution(shapes, dtypes, given) -> Work:
    (n, _, *size), weight = shapes[0], shapes[1]
    stride, padding, dilation, transposed, output_padding, groups = given[3:9]
    kernel = weight[2:]
    each = lambda numbers: list(numbers) * (len(size) // len(numbers))  # noqa: E731
    stride, padding, dilation = each(stride), each(padding), each(dilation)
    if transposed:
        sides = zip(size, stride, padding, dilation, kernel, each(output_padding), strict=True)
        out = [(i - 1) * s - 2 * p + d * (k - 1) + o + 1 for i, s, p, d, k, o in sides]
        channels = weight[1] * groups
    else:
        sides = zip(size, stride, padding, dilation, kernel, strict=True)
        out = [(i + 2 * p - d * (k - 1) - 1) // s + 1 for i, s, p, d, k in sides]
        channels = weight[0]
    pixels = n * math.prod(size if transposed else out)
    return Work(2 * pixels * math.prod(weight), _bytes(shapes, dtypes, [n, channels, *out]))


def _of_convolution_backward(shapes, dtypes, given) -> Work:
    dy, x, weight = shapes[:3]
    transposed, (wants_dx, wants_dweight, *_) = given[7], given[10]
    pixels = math.prod([x[0], *(x if transposed else dy)[2:]])
    written = [x] * wants_dx + [weight] * wants_dweight
    flops = 2 * pixels * math.prod(weight) * (wants_dx + wants_dweight)
    return Work(flops, _bytes(shapes, dtypes, *written))


def _of_attention(backward: bool, shapes, dtypes) -> Work:
    """Two products forward; backward five: the scores again, dP, dV, dQ, dK."""
    q, k, v = shapes[1:4] if backward else shapes[:3]
    flops = 2 * math.prod(q[:-1]) * k[-2] * q[-1] * (5 if backward else 2)
    return Work(flops, _bytes(shapes, dtypes, *([q, k, v] if backward else [q])))


# An op's input shapes, in the order of its arguments -> the values of its KernelSpec
Values = Callable[[Sequence[list[int]]], Mapping[str, Any]]


def _norm(shapes) -> dict[str, Any]:
    x, residual, concat = shapes[0], shapes[6], shapes[7]
    c2 = concat[1] if concat else 0
    return dict(n=x[0], c1=x[1], c2=c2, hw=math.prod(x[2:]), residual=bool(residual))


def _norm_backward(shapes) -> dict[str, Any]:
    x, concat, dtotal = shapes[0], shapes[6], shapes[11]
    c2 = concat[1] if concat else 0
    return dict(n=x[0], c1=x[1], c2=c2, hw=math.prod(x[2:]), residual=bool(dtotal))


def _norm_autograd(shapes) -> dict[str, Any]:
    dy, dtotal = shapes[:2]
    return dict(n=dy[0], c1=dy[1], hw=math.prod(dy[2:]), residual=bool(dtotal))


def _tokens(qkv_at: int, parts: int) -> Values:
    def values(shapes) -> dict[str, Any]:
        n, channels, h, w = shapes[qkv_at]
        return dict(n=n, c=channels // parts, h=h, w=w, heads=1)  # more: 4 bytes a token each

    return values


# name -> (KernelSpec's name, backward, values). An op, or the autograd function that eager takes
_OURS: dict[str, tuple[str, bool, Values]] = {
    "ddpm_fast::group_norm_silu": ("group_norm_silu", False, _norm),
    "ddpm_fast::group_norm_silu_backward": ("group_norm_silu", True, _norm_backward),
    "_GroupNormSilu": ("group_norm_silu", False, _norm),
    "_GroupNormSiluBackward": ("group_norm_silu", True, _norm_autograd),
    "ddpm_fast::attention_forward": ("attention", False, _tokens(0, 3)),
    "ddpm_fast::attention_backward": ("attention", True, _tokens(1, 3)),
    "_Attention": ("attention", False, _tokens(0, 3)),
    "_AttentionBackward": ("attention", True, _tokens(0, 1)),
    "ddpm_fast::dropout": ("dropout", False, lambda shapes: dict(shape=shapes[0])),
    "_Dropout": ("dropout", False, lambda shapes: dict(shape=shapes[0])),
    "_DropoutBackward": ("dropout", True, lambda shapes: dict(shape=shapes[0])),
}


def _of_ours(name: str, backward: bool, values: Values, shapes, dtypes) -> Work:
    (spec,) = (spec for spec in SPECS if spec.name == name)
    found, dtype = values(shapes), _DTYPE.get(dtypes[0])
    moved = None if dtype is None else spec.bytes_moved(found, dtype, backward)
    return Work(spec.flops(found, backward), moved)
