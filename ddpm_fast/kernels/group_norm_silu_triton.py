"""Triton kernels of group_norm_silu: statistics, forward, backward. See group_norm_silu.py.

A program owns a block of whole groups (BLOCK_C >= channels of it, padded to a power of two), one
image and one of SPLITS ranges of positions. Tiles are (BLOCK_HW, BLOCK_C), held in registers when a
range is one tile, else read again through L2. With SPLITS > 1 (few images) a first kernel writes
each range's share of the sums and the second one adds them up. No atomics: same bits every run.

Imports triton and nothing of torch, so that it can be compiled where there is no torch.
"""

import triton
import triton.language as tl

from ddpm_fast.kernels.group_norm_silu_plan import make_plan
from ddpm_fast.kernels.group_norm_silu_tiles import (
    affine,
    keep_mask,
    load_input,
    offsets,
    range_stats,
    to_channels,
    to_groups,
)
from ddpm_fast.kernels.spec import Budget, Launch


@triton.jit
def stats_kernel(
    x_ptr, concat_ptr, residual_ptr, add_ptr, partial_ptr,
    C1: tl.constexpr, C2: tl.constexpr, HW: tl.constexpr, CPG: tl.constexpr,
    GROUPS: tl.constexpr, RANGE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, NHWC: tl.constexpr,
    HAS_CONCAT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_ADD: tl.constexpr,
):  # fmt: skip
    """partial (2, N, SPLITS, G): mean and sum of squared distances of each range."""
    n = tl.program_id(1)
    split = tl.program_id(2)
    C: tl.constexpr = C1 + C2
    G: tl.constexpr = C // CPG
    c_start = tl.program_id(0) * GROUPS * CPG
    lane_c = tl.arange(0, BLOCK_C)
    mask_c = (lane_c < GROUPS * CPG) & (c_start + lane_c < C)
    in_group = (lane_c // CPG)[:, None] == tl.arange(0, BLOCK_G)[None, :]
    bias_c = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_ADD:
        at_c = n.to(tl.int64) * C + c_start + lane_c
        bias_c = tl.load(add_ptr + at_c, mask=mask_c, other=0.0).to(tl.float32)
    _, mean, m2 = range_stats(
        x_ptr, concat_ptr, residual_ptr, bias_c, n, c_start, mask_c, in_group, split * RANGE,
        C1, C2, HW, CPG, RANGE, BLOCK_HW, BLOCK_C, NHWC, HAS_CONCAT, HAS_RESIDUAL,
    )  # fmt: skip
    offs_g = tl.arange(0, BLOCK_G)
    group = tl.program_id(0) * GROUPS + offs_g
    mask_g = (offs_g < GROUPS) & (group < G)
    at = (n * SPLITS + split) * G + group
    tl.store(partial_ptr + at, mean, mask=mask_g)
    tl.store(partial_ptr + tl.num_programs(1) * SPLITS * G + at, m2, mask=mask_g)


@triton.jit
def _joined_stats(
    partial_ptr, n, group, mask_g,
    HW: tl.constexpr, CPG: tl.constexpr, G: tl.constexpr, RANGE: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared distances of whole groups from stats_kernel's shares."""
    count = 0.0
    mean = tl.zeros(group.shape, tl.float32)
    m2 = tl.zeros(group.shape, tl.float32)
    half = tl.num_programs(1) * SPLITS * G
    for split in range(SPLITS):
        at = (n * SPLITS + split) * G + group
        mean_here = tl.load(partial_ptr + at, mask=mask_g, other=0.0)
        m2_here = tl.load(partial_ptr + half + at, mask=mask_g, other=0.0)
        here = (tl.minimum(HW, (split + 1) * RANGE) - split * RANGE) * CPG * 1.0
        delta = mean_here - mean
        total = count + here
        mean += delta * (here / total)
        m2 += m2_here + delta * delta * (count * here / total)
        count = total
    return mean, m2


@triton.jit
def _activate(
    value, mean_c, rstd_c, a, b, rng_ptr, stream, threshold, keep_scale, n, hw_start, c_start,
    C: tl.constexpr, C_STEP: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
    SILU: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    u = (value - mean_c[None, :]) * (rstd_c * a)[None, :] + b[None, :]
    y = u
    if SILU:
        y = u * tl.sigmoid(u)
    if DROPOUT:
        keep = keep_mask(
            rng_ptr, stream, n, hw_start, c_start, threshold, C, C_STEP, BLOCK_HW, BLOCK_C
        )
        y = tl.where(keep, y * keep_scale, 0.0)
    return y


@triton.jit(do_not_specialize=["threshold", "stream"])
def forward_kernel(
    x_ptr, concat_ptr, residual_ptr, add_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    rng_ptr, partial_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr, eps, keep_scale, threshold, stream,
    C1: tl.constexpr, C2: tl.constexpr, HW: tl.constexpr, CPG: tl.constexpr,
    GROUPS: tl.constexpr, RANGE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, NHWC: tl.constexpr,
    SILU: tl.constexpr, HAS_CONCAT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_ADD: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """y (and the stored sum), mean and rstd (N, G) of a block of groups, an image, a range."""
    n = tl.program_id(1)
    split = tl.program_id(2)
    C: tl.constexpr = C1 + C2
    G: tl.constexpr = C // CPG
    c_start = tl.program_id(0) * GROUPS * CPG
    lane_c = tl.arange(0, BLOCK_C)
    offs_c = c_start + lane_c
    mask_c = (lane_c < GROUPS * CPG) & (offs_c < C)
    in_group = (lane_c // CPG)[:, None] == tl.arange(0, BLOCK_G)[None, :]
    offs_g = tl.arange(0, BLOCK_G)
    group = tl.program_id(0) * GROUPS + offs_g
    mask_g = (offs_g < GROUPS) & (group < G)
    bias_c = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_ADD:
        at_c = n.to(tl.int64) * C + offs_c
        bias_c = tl.load(add_ptr + at_c, mask=mask_c, other=0.0).to(tl.float32)
    hw_begin = split * RANGE
    hw_end = tl.minimum(hw_begin + RANGE, HW)
    ONE_TILE: tl.constexpr = SPLITS == 1 and BLOCK_HW >= HW
    offs_hw = hw_begin + tl.arange(0, BLOCK_HW)
    mask = (offs_hw < hw_end)[:, None] & mask_c[None, :]
    if ONE_TILE:
        value, total_x = load_input(
            x_ptr, concat_ptr, residual_ptr, bias_c, n, offs_hw, offs_c, mask,
            C1, C2, HW, NHWC, HAS_CONCAT, HAS_RESIDUAL,
        )  # fmt: skip
        mean = to_groups(tl.sum(tl.where(mask, value, 0.0), axis=0), in_group) / (HW * CPG)
        centred = tl.where(mask, value - to_channels(mean, in_group)[None, :], 0.0)
        m2 = to_groups(tl.sum(centred * centred, axis=0), in_group)
    elif SPLITS == 1:
        _, mean, m2 = range_stats(
            x_ptr, concat_ptr, residual_ptr, bias_c, n, c_start, mask_c, in_group, 0,
            C1, C2, HW, CPG, RANGE, BLOCK_HW, BLOCK_C, NHWC, HAS_CONCAT, HAS_RESIDUAL,
        )  # fmt: skip
    else:
        mean, m2 = _joined_stats(partial_ptr, n, group, mask_g, HW, CPG, G, RANGE, SPLITS)
    rstd = 1.0 / tl.sqrt(m2 / (HW * CPG) + eps)
    if split == 0:
        tl.store(mean_ptr + n * G + group, mean, mask=mask_g)
        tl.store(rstd_ptr + n * G + group, rstd, mask=mask_g)
    mean_c = to_channels(mean, in_group)
    rstd_c = to_channels(rstd, in_group)
    a, b = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, offs_c, mask_c, C, HAS_SCALE, HAS_SHIFT
    )
    image = n.to(tl.int64) * HW
    for start in range(hw_begin, hw_end, BLOCK_HW):
        if not ONE_TILE:
            offs_hw = start + tl.arange(0, BLOCK_HW)
            mask = (offs_hw < hw_end)[:, None] & mask_c[None, :]
            value, total_x = load_input(
                x_ptr, concat_ptr, residual_ptr, bias_c, n, offs_hw, offs_c, mask,
                C1, C2, HW, NHWC, HAS_CONCAT, HAS_RESIDUAL,
            )  # fmt: skip
        y = _activate(
            value, mean_c, rstd_c, a, b, rng_ptr, stream, threshold, keep_scale, n, start, c_start,
            C, GROUPS * CPG, BLOCK_HW, BLOCK_C, SILU, DROPOUT,
        )  # fmt: skip
        at = image * C + offsets(offs_hw, offs_c, C, HW, NHWC)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
        if HAS_RESIDUAL:
            mask_x = mask & (offs_c < C1)[None, :]
            at_x = image * C1 + offsets(offs_hw, offs_c, C1, HW, NHWC)
            tl.store(sum_ptr + at_x, total_x, mask=mask_x)


@triton.jit
def _tile_grads(
    x_ptr, concat_ptr, bias_c, dy_ptr, mean_c, rstd_c, a, b,
    rng_ptr, stream, threshold, keep_scale, n, hw_start, c_start, offs_hw, offs_c, mask,
    C1: tl.constexpr, C2: tl.constexpr, HW: tl.constexpr, C_STEP: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, NHWC: tl.constexpr, SILU: tl.constexpr,
    HAS_CONCAT: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """x_hat and dL/du of a tile, both 0 outside the mask."""
    C: tl.constexpr = C1 + C2
    value, _ = load_input(
        x_ptr, concat_ptr, x_ptr, bias_c, n, offs_hw, offs_c, mask,
        C1, C2, HW, NHWC, HAS_CONCAT, False,
    )  # fmt: skip
    at = n.to(tl.int64) * HW * C + offsets(offs_hw, offs_c, C, HW, NHWC)
    du = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        keep = keep_mask(
            rng_ptr, stream, n, hw_start, c_start, threshold, C, C_STEP, BLOCK_HW, BLOCK_C
        )
        du = tl.where(keep, du * keep_scale, 0.0)
    x_hat = tl.where(mask, (value - mean_c[None, :]) * rstd_c[None, :], 0.0)
    if SILU:
        u = x_hat * a[None, :] + b[None, :]
        sigmoid = tl.sigmoid(u)
        du *= sigmoid * (1.0 + u * (1.0 - sigmoid))
    return x_hat, du


@triton.jit
def _range_sums(
    x_ptr, concat_ptr, bias_c, dy_ptr, mean_c, rstd_c, a, b,
    rng_ptr, stream, threshold, keep_scale, n, c_start, mask_c, hw_begin,
    C1: tl.constexpr, C2: tl.constexpr, HW: tl.constexpr, C_STEP: tl.constexpr,
    RANGE: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, NHWC: tl.constexpr,
    SILU: tl.constexpr, HAS_CONCAT: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Per channel over a range of positions: sums of du x_hat, du and x_hat."""
    offs_c = c_start + tl.arange(0, BLOCK_C)
    hw_end = tl.minimum(hw_begin + RANGE, HW)
    s_dx = tl.zeros((BLOCK_C,), tl.float32)
    s_d = tl.zeros((BLOCK_C,), tl.float32)
    s_x = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(hw_begin, hw_end, BLOCK_HW):
        offs_hw = start + tl.arange(0, BLOCK_HW)
        mask = (offs_hw < hw_end)[:, None] & mask_c[None, :]
        x_hat, du = _tile_grads(
            x_ptr, concat_ptr, bias_c, dy_ptr, mean_c, rstd_c, a, b,
            rng_ptr, stream, threshold, keep_scale, n, start, c_start, offs_hw, offs_c, mask,
            C1, C2, HW, C_STEP, BLOCK_HW, BLOCK_C, NHWC, SILU, HAS_CONCAT, DROPOUT,
        )  # fmt: skip
        s_dx += tl.sum(du * x_hat, axis=0)
        s_d += tl.sum(du, axis=0)
        s_x += tl.sum(x_hat, axis=0)
    return s_dx, s_d, s_x


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
def sums_kernel(
    x_ptr, concat_ptr, add_ptr, dy_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, scale_ptr,
    shift_ptr, rng_ptr, partial_ptr, keep_scale, threshold, stream,
    C1: tl.constexpr, C2: tl.constexpr, HW: tl.constexpr, CPG: tl.constexpr,
    GROUPS: tl.constexpr, RANGE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, NHWC: tl.constexpr,
    SILU: tl.constexpr, HAS_CONCAT: tl.constexpr, HAS_ADD: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """partial (3, N, SPLITS, C): each range's share of the sums of du x_hat, du and x_hat."""
    n = tl.program_id(1)
    split = tl.program_id(2)
    C: tl.constexpr = C1 + C2
    c_start = tl.program_id(0) * GROUPS * CPG
    lane_c = tl.arange(0, BLOCK_C)
    offs_c = c_start + lane_c
    mask_c = (lane_c < GROUPS * CPG) & (offs_c < C)
    bias_c, mean_c, rstd_c, a, b = _load_context(
        add_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c_start, mask_c,
        C, CPG, BLOCK_C, HAS_ADD, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    s_dx, s_d, s_x = _range_sums(
        x_ptr, concat_ptr, bias_c, dy_ptr, mean_c, rstd_c, a, b,
        rng_ptr, stream, threshold, keep_scale, n, c_start, mask_c, split * RANGE,
        C1, C2, HW, GROUPS * CPG, RANGE, BLOCK_HW, BLOCK_C, NHWC, SILU, HAS_CONCAT, DROPOUT,
    )  # fmt: skip
    at = (n * SPLITS + split) * C + offs_c
    third = tl.num_programs(1) * SPLITS * C
    tl.store(partial_ptr + at, s_dx, mask=mask_c)
    tl.store(partial_ptr + third + at, s_d, mask=mask_c)
    tl.store(partial_ptr + 2 * third + at, s_x, mask=mask_c)


@triton.jit
def _joined_sums(
    partial_ptr, n, offs_c, mask_c, C: tl.constexpr, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The three sums over all ranges."""
    s_dx = tl.zeros((BLOCK_C,), tl.float32)
    s_d = tl.zeros((BLOCK_C,), tl.float32)
    s_x = tl.zeros((BLOCK_C,), tl.float32)
    third = tl.num_programs(1) * SPLITS * C
    for split in range(SPLITS):
        at = partial_ptr + (n * SPLITS + split) * C + offs_c
        s_dx += tl.load(at, mask=mask_c, other=0.0)
        s_d += tl.load(at + third, mask=mask_c, other=0.0)
        s_x += tl.load(at + 2 * third, mask=mask_c, other=0.0)
    return s_dx, s_d, s_x


@triton.jit(do_not_specialize=["threshold", "stream"])
def backward_kernel(
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
    n = tl.program_id(1)
    split = tl.program_id(2)
    C: tl.constexpr = C1 + C2
    c_start = tl.program_id(0) * GROUPS * CPG
    lane_c = tl.arange(0, BLOCK_C)
    offs_c = c_start + lane_c
    mask_c = (lane_c < GROUPS * CPG) & (offs_c < C)
    in_group = (lane_c // CPG)[:, None] == tl.arange(0, BLOCK_G)[None, :]
    bias_c, mean_c, rstd_c, a, b = _load_context(
        add_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c_start, mask_c,
        C, CPG, BLOCK_C, HAS_ADD, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    hw_begin = split * RANGE
    hw_end = tl.minimum(hw_begin + RANGE, HW)
    ONE_TILE: tl.constexpr = SPLITS == 1 and BLOCK_HW >= HW
    offs_hw = hw_begin + tl.arange(0, BLOCK_HW)
    mask = (offs_hw < hw_end)[:, None] & mask_c[None, :]
    if ONE_TILE:
        x_hat, du = _tile_grads(
            x_ptr, concat_ptr, bias_c, dy_ptr, mean_c, rstd_c, a, b,
            rng_ptr, stream, threshold, keep_scale, n, 0, c_start, offs_hw, offs_c, mask,
            C1, C2, HW, GROUPS * CPG, BLOCK_HW, BLOCK_C, NHWC, SILU, HAS_CONCAT, DROPOUT,
        )  # fmt: skip
        s_dx = tl.sum(du * x_hat, axis=0)
        s_d = tl.sum(du, axis=0)
        s_x = tl.sum(x_hat, axis=0)
    elif SPLITS == 1:
        s_dx, s_d, s_x = _range_sums(
            x_ptr, concat_ptr, bias_c, dy_ptr, mean_c, rstd_c, a, b,
            rng_ptr, stream, threshold, keep_scale, n, c_start, mask_c, 0,
            C1, C2, HW, GROUPS * CPG, RANGE, BLOCK_HW, BLOCK_C, NHWC, SILU, HAS_CONCAT, DROPOUT,
        )  # fmt: skip
    else:
        s_dx, s_d, s_x = _joined_sums(partial_ptr, n, offs_c, mask_c, C, SPLITS, BLOCK_C)
    mean_d = to_channels(to_groups(a * s_d, in_group), in_group) / (HW * CPG)
    mean_dx = to_channels(to_groups(a * s_dx, in_group), in_group) / (HW * CPG)
    if split == 0:
        at_c = n * C + offs_c
        tl.store(sums_ptr + at_c, s_dx, mask=mask_c)
        tl.store(sums_ptr + tl.num_programs(1) * C + at_c, s_d, mask=mask_c)
        if HAS_ADD:
            dadd = rstd_c * (a * s_d - HW * mean_d - mean_dx * s_x)
            tl.store(dadd_ptr + at_c, dadd, mask=mask_c)
    image = n.to(tl.int64) * HW
    for start in range(hw_begin, hw_end, BLOCK_HW):
        if not ONE_TILE:
            offs_hw = start + tl.arange(0, BLOCK_HW)
            mask = (offs_hw < hw_end)[:, None] & mask_c[None, :]
            x_hat, du = _tile_grads(
                x_ptr, concat_ptr, bias_c, dy_ptr, mean_c, rstd_c, a, b,
                rng_ptr, stream, threshold, keep_scale, n, start, c_start, offs_hw, offs_c, mask,
                C1, C2, HW, GROUPS * CPG, BLOCK_HW, BLOCK_C, NHWC, SILU, HAS_CONCAT, DROPOUT,
            )  # fmt: skip
        dx = rstd_c[None, :] * (a[None, :] * du - mean_d[None, :] - x_hat * mean_dx[None, :])
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


# What the CIFAR-10 presets launch in training, bf16 NHWC: C1, C2 (concat), HW, add, silu, dropout.
PRESET_SHAPES = (
    (128, 0, 1024, False, True, False),
    (128, 0, 1024, True, True, True),
    (128, 128, 1024, False, True, False),
    (256, 128, 1024, False, True, False),
    (128, 0, 256, False, True, False),
    (256, 0, 256, True, True, True),
    (256, 0, 256, False, False, False),
    (256, 128, 256, False, True, False),
    (256, 256, 256, False, True, False),
    (256, 256, 64, False, True, False),
    (256, 0, 64, True, True, True),
    (256, 256, 16, False, True, False),
    (256, 0, 16, True, True, True),
)


def launches(arch: int) -> list[Launch]:
    """The presets' launches at batch 256, and the split ones of batch 1."""
    rows = [
        _launch(direction, 256, shape, arch)
        for shape in PRESET_SHAPES
        for direction in ("forward", "backward")
    ]
    one_image = [PRESET_SHAPES[1], PRESET_SHAPES[3]]
    return rows + [
        _launch(direction, 1, shape, arch)
        for shape in one_image
        for direction in ("stats", "forward", "sums", "backward")
    ]


def _launch(name: str, n: int, shape: tuple, arch: int) -> Launch:
    c1, c2, hw, add, silu, drop = shape
    kernel = {"stats": stats_kernel, "forward": forward_kernel, "sums": sums_kernel}.get(
        name, backward_kernel
    )
    direction = "forward" if name in ("stats", "forward") else "backward"
    plan = make_plan(direction, n, c1 + c2, hw, 32, itemsize=2, arch=arch)
    flags = {
        **plan.constexprs(), "BLOCK_G": plan.BLOCK_G, "C1": c1, "C2": c2, "HW": hw, "NHWC": True,
        "SILU": silu, "HAS_CONCAT": c2 > 0, "HAS_RESIDUAL": False, "HAS_DSUM": False,
        "HAS_ADD": add, "HAS_SCALE": False, "HAS_SHIFT": False, "DROPOUT": drop,
    }  # fmt: skip
    names = kernel.arg_names
    flavour = (f"+{c2}" if c2 else "") + " add" * add + " dropout" * drop + " linear" * (not silu)
    return Launch(
        name=f"group_norm_silu {name} {n}x{c1}{flavour} hw{hw}",
        kernel=kernel,
        types={name: _TYPES.get(name, "*bf16") for name in names if name not in flags},
        constexprs={name: value for name, value in flags.items() if name in names},
        num_warps=plan.num_warps,
        elements=plan.BLOCK_HW * plan.BLOCK_C,
        budget=Budget(),
    )


_TYPES = {
    "weight_ptr": "*fp32", "bias_ptr": "*fp32", "mean_ptr": "*fp32", "rstd_ptr": "*fp32",
    "partial_ptr": "*fp32", "sums_ptr": "*fp32", "dadd_ptr": "*fp32", "rng_ptr": "*i64",
    "eps": "fp32", "keep_scale": "fp32", "threshold": "i32", "stream": "i32",
}  # fmt: skip
