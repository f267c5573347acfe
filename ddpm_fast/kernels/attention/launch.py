"""From tensors to attention's Triton kernels: strides, outputs, grids. See op.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_fast.kernels.calling.target import arch_of, device_name_of, on_device_of

LOG2_E = math.log2(math.e)


def launch_forward(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """o and the rows' logsumexp in base 2; qkv (N, 3C, H, W), head size and dtype supported."""
    o, lse = forward_outputs(qkv, num_heads)
    if qkv.numel() == 0:
        return o, lse
    qkv = _by_token(qkv)
    strides = (*_strides(qkv), *_strides(o))
    with on_device_of(qkv):
        _run("forward", qkv, num_heads, qkv, o, lse, *strides, num_heads, scale * LOG2_E)
    return o, lse


def forward_outputs(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """What launch_forward fills: o (N, C, H, W) channels_last, logsumexp (N, heads, T) fp32."""
    n, packed, h, w = qkv.shape
    o = _empty_image(qkv, (n, packed // 3, h, w))
    return o, _empty_rows(qkv, (n, num_heads, h * w))


def launch_backward(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, num_heads: int, scale: float
) -> Tensor:
    """dqkv; do like o in any layout, the others as launch_forward took and gave them."""
    from ddpm_fast.kernels.attention.forward_triton import SHORT

    dqkv = backward_output(qkv)
    if qkv.numel() == 0:
        return dqkv
    qkv, do, o = _by_token(qkv), _by_token(do), _by_token(o)
    strides_do, strides_qkv, strides_dqkv = _strides(do), _strides(qkv), _strides(dqkv)
    numbers = (num_heads, scale, scale * LOG2_E)
    with on_device_of(qkv):
        if qkv.shape[2] * qkv.shape[3] <= SHORT and qkv.dtype.itemsize == 2:
            strides = (*strides_do, *strides_qkv, *strides_dqkv)
            _run("backward", qkv, num_heads, do, qkv, lse, dqkv, *strides, *numbers)
            return dqkv
        delta = _empty_rows(qkv, lse.shape)
        strides = (*strides_do, *strides_qkv, *_strides(o), *strides_dqkv)
        _run("q.backward", qkv, num_heads, do, qkv, o, lse, delta, dqkv, *strides, *numbers)
        strides = (*strides_do, *strides_qkv, *strides_dqkv)
        _run("kv.backward", qkv, num_heads, do, qkv, lse, delta, dqkv, *strides, *numbers)
    return dqkv


def backward_output(qkv: Tensor) -> Tensor:
    """What launch_backward fills: like qkv, channels_last."""
    return _empty_image(qkv, qkv.shape)


def _empty_image(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _empty_rows(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _run(name: str, qkv: Tensor, num_heads: int, *arguments: Tensor | int | float) -> None:
    from ddpm_fast.kernels.attention import forward_triton as kernels

    n, packed, h, w = qkv.shape
    kernel, tokens, head_dim = kernels.KERNELS[name], h * w, packed // 3 // num_heads
    target = (arch_of(qkv.device), device_name_of(qkv.device))
    numbers = kernels.tile(name, tokens, head_dim, qkv.dtype.itemsize, *target)
    # A program: BLOCK_N keys in kv.backward, else BLOCK_M queries.
    rows = numbers["BLOCK_N" if name == "kv.backward" else "BLOCK_M"]
    kernel[(n * num_heads * -(-tokens // rows),)](
        *arguments,
        **kernels.constexprs(kernel, tokens, head_dim, numbers),
        num_warps=numbers["num_warps"],
        num_stages=numbers["num_stages"],
    )


def _by_token(x: Tensor) -> Tensor:
    """x (N, C, H, W) if its tokens are rows of adjacent channels at one distance, else a copy."""
    _, channels, h, w = x.shape
    _, stride_c, stride_h, stride_w = x.stride()
    if (stride_c == 1 or channels == 1) and (h == 1 or w == 1 or stride_h == w * stride_w):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _strides(x: Tensor) -> tuple[int, int]:
    """Elements from image to image, from token to token; x as _by_token gives it."""
    return x.stride(0), x.stride(3) if x.shape[3] > 1 else x.stride(2)
