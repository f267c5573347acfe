"""Triton kernels of group_norm_silu's backward pass; torch-free, as forward_triton.py."""

import triton
import triton.language as tl

from ddpm_fast.kernels.group_norm_silu.tiles import (
    affine,
    channels_mask,
    images,
    keep_mask,
    load_input,
    offsets,
    program,
    sigmoid,
    tile_mask,
    to_channels,
    to_groups,
)


@triton.jit
def _tile_grads(
    x_ptr, concat_ptr, bias_c, dy_ptr, mean_c, rstd_c, a, b,
    rng_ptr, stream, threshold, keep_scale, n, hw_start, c_start, offs_hw, offs_c, mask,
    C1: tl.constexpr, C2: tl.constexpr, HW: tl.constexpr, C_STEP: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, NHWC: tl.constexpr, SILU: tl.constexpr,
    HAS_CONCAT: tl.constexpr, HAS_ADD: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """z - mean and dL/du of a tile; outside the mask dL/du is 0 and the other is not."""
    C: tl.constexpr = C1 + C2
    value, _ = load_input(
        x_ptr, concat_ptr, x_ptr, bias_c, n, offs_hw, offs_c, mask,
        C1, C2, HW, NHWC, HAS_CONCAT, False, HAS_ADD,
    )  # fmt: skip
    at = n.to(tl.int64) * HW * C + offsets(offs_hw, offs_c, C, HW, NHWC)
    du = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        keep = keep_mask(
            rng_ptr, stream, n, hw_start, c_start, threshold, C, C_STEP, BLOCK_HW, BLOCK_C
        )
        du = tl.where(keep, du * keep_scale, 0.0)
    centred = value - mean_c[None, :]
    if SILU:
        u = centred * (rstd_c * a)[None, :] + b[None, :]
        s = sigmoid(u)
        du *= s * (1.0 + u * (1.0 - s))
    return centred, du


@triton.jit
def _range_sums(
    x_ptr, concat_ptr, bias_c, dy_ptr, mean_c, rstd_c, a, b,
    rng_ptr, stream, threshold, keep_scale, n, c_start, mask_c, hw_begin,
    C1: tl.constexpr, C2: tl.constexpr, HW: tl.constexpr, C_STEP: tl.constexpr,
    RANGE: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, NHWC: tl.constexpr,
    SILU: tl.constexpr, HAS_CONCAT: tl.constexpr, HAS_ADD: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Per channel over a range of positions: sums of du x_hat, du and, with HAS_ADD, x_hat.

    Threads add up what is theirs and meet once, at the end.
    """
    offs_c = c_start + tl.arange(0, BLOCK_C)
    hw_end = tl.minimum(hw_begin + RANGE, HW)
    s_dx = tl.zeros((BLOCK_HW, BLOCK_C), tl.float32)
    s_d = tl.zeros((BLOCK_HW, BLOCK_C), tl.float32)
    s_x = tl.zeros((BLOCK_HW, BLOCK_C), tl.float32)
    for start in range(hw_begin, hw_end, BLOCK_HW):
        offs_hw = start + tl.arange(0, BLOCK_HW)
        mask = tile_mask(offs_hw, hw_end, mask_c, HW, RANGE, BLOCK_HW)
        centred, du = _tile_grads(
            x_ptr, concat_ptr, bias_c, dy_ptr, mean_c, rstd_c, a, b,
            rng_ptr, stream, threshold, keep_scale, n, start, c_start, offs_hw, offs_c, mask,
            C1, C2, HW, C_STEP, BLOCK_HW, BLOCK_C, NHWC, SILU, HAS_CONCAT, HAS_ADD, DROPOUT,
        )  # fmt: skip
        s_dx += du * centred
        s_d += du
        if HAS_ADD:
            s_x += tl.where(mask, centred, 0.0)
    return tl.sum(s_dx, axis=0) * rstd_c, tl.sum(s_d, axis=0), tl.sum(s_x, axis=0) * rstd_c


@triton.jit
def _load_context(
    add_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c_start, mask_c,
    C: tl.constexpr, CPG: tl.constexpr, BLOCK_C: tl.constexpr, HAS_ADD: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """Each channel's added bias, mean, rstd, a and b."""
    offs_c = c_start + tl.arange(0, BLOCK_C)
    bias_c = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_ADD:
        at_c = n.to(tl.int64) * C + offs_c
        bias_c = tl.load(add_ptr + at_c, mask=mask_c, other=0.0).to(tl.float32)
    at_g = n * (C // CPG) + offs_c // CPG
    mean_c = tl.load(mean_ptr + at_g, mask=mask_c, other=0.0)
    rstd_c = tl.load(rstd_ptr + at_g, mask=mask_c, other=0.0)
    a, b = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, offs_c, mask_c, C, HAS_SCALE, HAS_SHIFT
    )
    return bias_c, mean_c, rstd_c, a, b


@triton.jit(do_not_specialize=["threshold", "stream"])
def group_norm_silu_sums_kernel(
    x_ptr, concat_ptr, add_ptr, dy_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, scale_ptr,
    shift_ptr, rng_ptr, partial_ptr, keep_scale, threshold, stream,
    C1: tl.constexpr, C2: tl.constexpr, HW: tl.constexpr, CPG: tl.constexpr,
    GROUPS: tl.constexpr, RANGE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, NHWC: tl.constexpr,
    SILU: tl.constexpr, HAS_CONCAT: tl.constexpr, HAS_ADD: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """partial (3, N, SPLITS, C): each range's share of the sums of du x_hat, du and x_hat."""
    C: tl.constexpr = C1 + C2
    block, n, split = program(C // CPG, GROUPS)
    c_start = block * GROUPS * CPG
    lane_c = tl.arange(0, BLOCK_C)
    offs_c = c_start + lane_c
    mask_c = channels_mask(block, C // CPG, GROUPS, CPG, BLOCK_C)
    bias_c, mean_c, rstd_c, a, b = _load_context(
        add_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c_start, mask_c,
        C, CPG, BLOCK_C, HAS_ADD, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    s_dx, s_d, s_x = _range_sums(
        x_ptr, concat_ptr, bias_c, dy_ptr, mean_c, rstd_c, a, b,
        rng_ptr, stream, threshold, keep_scale, n, c_start, mask_c, split * RANGE,
        C1, C2, HW, GROUPS * CPG, RANGE, BLOCK_HW, BLOCK_C, NHWC, SILU, HAS_CONCAT, HAS_ADD,
        DROPOUT,
    )  # fmt: skip
    at = (n * SPLITS + split) * C + offs_c
    third = images(C // CPG, GROUPS) * SPLITS * C
    tl.store(partial_ptr + at, s_dx, mask=mask_c)
    tl.store(partial_ptr + third + at, s_d, mask=mask_c)
    tl.store(partial_ptr + 2 * third + at, s_x, mask=mask_c)


@triton.jit
def _joined_sums(
    partial_ptr, n, offs_c, mask_c,
    C: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The three sums over all ranges."""
    s_dx = tl.zeros((BLOCK_C,), tl.float32)
    s_d = tl.zeros((BLOCK_C,), tl.float32)
    s_x = tl.zeros((BLOCK_C,), tl.float32)
    third = images(C // CPG, GROUPS) * SPLITS * C
    for split in range(SPLITS):
        at = partial_ptr + (n * SPLITS + split) * C + offs_c
        s_dx += tl.load(at, mask=mask_c, other=0.0)
        s_d += tl.load(at + third, mask=mask_c, other=0.0)
        s_x += tl.load(at + 2 * third, mask=mask_c, other=0.0)
    return s_dx, s_d, s_x


@triton.jit(do_not_specialize=["threshold", "stream"])
def group_norm_silu_backward_kernel(
    x_ptr, concat_ptr, add_ptr, dy_ptr, dsum_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    scale_ptr, shift_ptr, rng_ptr, partial_ptr, dx_ptr, dconcat_ptr, dadd_ptr, sums_ptr,
    keep_scale, threshold, stream,
    C1: tl.constexpr, C2: tl.constexpr, HW: tl.constexpr, CPG: tl.constexpr,
    GROUPS: tl.constexpr, RANGE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, NHWC: tl.constexpr,
    SILU: tl.constexpr, HAS_CONCAT: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_ADD: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dx, dconcat, dadd (N, C) and sums (2, N, C) of du x_hat and du, from which the rest follows.

    dx = rstd (a du - mean(a du) - x_hat mean(a du x_hat)) + dsum, means over the group.
    """
    C: tl.constexpr = C1 + C2
    block, n, split = program(C // CPG, GROUPS)
    c_start = block * GROUPS * CPG
    lane_c = tl.arange(0, BLOCK_C)
    offs_c = c_start + lane_c
    mask_c = channels_mask(block, C // CPG, GROUPS, CPG, BLOCK_C)
    bias_c, mean_c, rstd_c, a, b = _load_context(
        add_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c_start, mask_c,
        C, CPG, BLOCK_C, HAS_ADD, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    hw_begin = split * RANGE
    hw_end = tl.minimum(hw_begin + RANGE, HW)
    ONE_TILE: tl.constexpr = SPLITS == 1 and BLOCK_HW >= HW
    offs_hw = hw_begin + tl.arange(0, BLOCK_HW)
    mask = tile_mask(offs_hw, hw_end, mask_c, HW, RANGE, BLOCK_HW)
    if ONE_TILE:
        centred, du = _tile_grads(
            x_ptr, concat_ptr, bias_c, dy_ptr, mean_c, rstd_c, a, b,
            rng_ptr, stream, threshold, keep_scale, n, 0, c_start, offs_hw, offs_c, mask,
            C1, C2, HW, GROUPS * CPG, BLOCK_HW, BLOCK_C, NHWC, SILU, HAS_CONCAT, HAS_ADD, DROPOUT,
        )  # fmt: skip
        s_dx = tl.sum(du * centred, axis=0) * rstd_c
        s_d = tl.sum(du, axis=0)
        s_x = s_d
        if HAS_ADD:
            s_x = tl.sum(tl.where(mask, centred, 0.0), axis=0) * rstd_c
    elif SPLITS == 1:
        s_dx, s_d, s_x = _range_sums(
            x_ptr, concat_ptr, bias_c, dy_ptr, mean_c, rstd_c, a, b,
            rng_ptr, stream, threshold, keep_scale, n, c_start, mask_c, 0,
            C1, C2, HW, GROUPS * CPG, RANGE, BLOCK_HW, BLOCK_C, NHWC, SILU, HAS_CONCAT, HAS_ADD,
            DROPOUT,
        )  # fmt: skip
    else:
        s_dx, s_d, s_x = _joined_sums(
            partial_ptr, n, offs_c, mask_c, C, CPG, GROUPS, SPLITS, BLOCK_C
        )
    group_d = to_groups(a * s_d, CPG, BLOCK_C, BLOCK_G) / (HW * CPG)
    group_dx = to_groups(a * s_dx, CPG, BLOCK_C, BLOCK_G) / (HW * CPG)
    mean_d = to_channels(group_d, CPG, BLOCK_C, BLOCK_G)
    mean_dx = to_channels(group_dx, CPG, BLOCK_C, BLOCK_G)
    if split == 0:
        at_c = n * C + offs_c
        tl.store(sums_ptr + at_c, s_dx, mask=mask_c)
        tl.store(sums_ptr + images(C // CPG, GROUPS) * C + at_c, s_d, mask=mask_c)
        if HAS_ADD:
            dadd = rstd_c * (a * s_d - HW * mean_d - mean_dx * s_x)
            tl.store(dadd_ptr + at_c, dadd, mask=mask_c)
    by_du, by_centred, constant = rstd_c * a, -rstd_c * rstd_c * mean_dx, -rstd_c * mean_d
    image = n.to(tl.int64) * HW
    for start in range(hw_begin, hw_end, BLOCK_HW):
        if not ONE_TILE:
            offs_hw = start + tl.arange(0, BLOCK_HW)
            mask = tile_mask(offs_hw, hw_end, mask_c, HW, RANGE, BLOCK_HW)
            centred, du = _tile_grads(
                x_ptr, concat_ptr, bias_c, dy_ptr, mean_c, rstd_c, a, b,
                rng_ptr, stream, threshold, keep_scale, n, start, c_start, offs_hw, offs_c, mask,
                C1, C2, HW, GROUPS * CPG, BLOCK_HW, BLOCK_C, NHWC, SILU, HAS_CONCAT, HAS_ADD,
                DROPOUT,
            )  # fmt: skip
        dx = by_du[None, :] * du + (by_centred[None, :] * centred + constant[None, :])
        mask_x = mask
        if HAS_CONCAT:
            mask_x = mask & (offs_c < C1)[None, :]
            mask_2 = mask & (offs_c >= C1)[None, :]
            at_2 = image * C2 + offsets(offs_hw, offs_c - C1, C2, HW, NHWC)
            tl.store(dconcat_ptr + at_2, dx.to(dconcat_ptr.dtype.element_ty), mask=mask_2)
        at_x = image * C1 + offsets(offs_hw, offs_c, C1, HW, NHWC)
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + at_x, mask=mask_x, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at_x, dx.to(dx_ptr.dtype.element_ty), mask=mask_x)
