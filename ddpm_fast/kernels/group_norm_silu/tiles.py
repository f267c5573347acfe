"""Tiles of group_norm_silu's Triton kernels: loads, dropout's decisions, sums over groups.

A tile is (BLOCK_HW, BLOCK_C): positions by channels of whole groups. Imports triton and no torch.
"""

import triton
import triton.language as tl

from ddpm_fast.kernels.calling.impl import interpreting

INTERPRETING = tl.constexpr(interpreting())


@triton.jit
def sigmoid(x):
    """1 / (1 + 2^(-x log2 e)) in four instructions; a caller's result is not to be named sigmoid.

    By the PTX ISA ex2.approx.ftz is within about 2^-22 of its value, relatively, rcp.approx.ftz
    within 1 ulp; with the roundings of product and sum the result is within (4 + |x|) 2^-23.
    Both flush what is under 2^-126 to 0: below x = -87.3 the result is 0, beyond 17 it is 1 in
    fp32 anyway. +inf gives 1, -inf gives 0, NaN stays NaN. tl.sigmoid divides, by 8 more.
    """
    if INTERPRETING:
        return tl.sigmoid(x)
    else:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def program(G: tl.constexpr, GROUPS: tl.constexpr):
    """Block of channels, image and range of a program; images on the grid's only long axis."""
    BLOCKS: tl.constexpr = (G + GROUPS - 1) // GROUPS
    pid = tl.program_id(0)
    return pid % BLOCKS, pid // BLOCKS, tl.program_id(1)


@triton.jit
def images(G: tl.constexpr, GROUPS: tl.constexpr):
    return tl.num_programs(0) // ((G + GROUPS - 1) // GROUPS)


@triton.jit
def channels_mask(
    block, G: tl.constexpr, GROUPS: tl.constexpr, CPG: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Lanes that are channels of the program's groups; a constant, which vanishes, if all are."""
    if BLOCK_C == GROUPS * CPG and G % GROUPS == 0:
        return tl.full((BLOCK_C,), True, tl.int1)
    else:
        lane_c = tl.arange(0, BLOCK_C)
        return (lane_c < GROUPS * CPG) & (block * GROUPS * CPG + lane_c < G * CPG)


@triton.jit
def tile_mask(
    offs_hw, hw_end, mask_c, HW: tl.constexpr, RANGE: tl.constexpr, BLOCK_HW: tl.constexpr
):
    """(BLOCK_HW, BLOCK_C): positions before the range's end, channels of the program."""
    if HW % RANGE == 0 and RANGE % BLOCK_HW == 0:
        mask_hw = tl.full((BLOCK_HW,), True, tl.int1)
    else:
        mask_hw = offs_hw < hw_end
    return mask_hw[:, None] & mask_c[None, :]


@triton.jit
def to_groups(per_channel, CPG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """(BLOCK_C,) -> sums over each group's channels (BLOCK_G,)."""
    if BLOCK_C == BLOCK_G * CPG:
        return tl.sum(tl.reshape(per_channel, (BLOCK_G, CPG)), axis=1)
    else:
        chosen = tl.where(_in_group(CPG, BLOCK_C, BLOCK_G), per_channel[:, None], 0.0)
        return tl.sum(chosen, axis=0)


@triton.jit
def to_channels(per_group, CPG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """(BLOCK_G,) -> each channel's own group's value (BLOCK_C,)."""
    if BLOCK_C == BLOCK_G * CPG:
        return tl.reshape(tl.broadcast_to(per_group[:, None], (BLOCK_G, CPG)), (BLOCK_C,))
    else:
        chosen = tl.where(_in_group(CPG, BLOCK_C, BLOCK_G), per_group[None, :], 0.0)
        return tl.sum(chosen, axis=1)


@triton.jit
def tile_to_groups(
    tile, CPG: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr
):
    """(BLOCK_HW, BLOCK_C) -> sums over positions and each group's channels (BLOCK_G,)."""
    if BLOCK_C == BLOCK_G * CPG:  # channels first: a thread holds eight neighbours
        rows = tl.sum(tl.reshape(tile, (BLOCK_HW, BLOCK_G, CPG)), axis=2)
        return tl.sum(rows, axis=0)
    else:
        return to_groups(tl.sum(tile, axis=0), CPG, BLOCK_C, BLOCK_G)


@triton.jit
def _in_group(CPG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """(BLOCK_C, BLOCK_G): for groups that are no power of two, which a reshape cannot cut."""
    return (tl.arange(0, BLOCK_C) // CPG)[:, None] == tl.arange(0, BLOCK_G)[None, :]


@triton.jit
def offsets(offs_hw, offs_c, C: tl.constexpr, HW: tl.constexpr, NHWC: tl.constexpr):
    """Index of (position, channel) inside one image of C channels: (BLOCK_HW, BLOCK_C)."""
    if NHWC:
        return offs_hw[:, None] * C + offs_c[None, :]
    else:
        return offs_c[None, :] * HW + offs_hw[:, None]


@triton.jit
def load_input(
    x_ptr, concat_ptr, residual_ptr, bias_c, n, offs_hw, offs_c, mask,
    C1: tl.constexpr, C2: tl.constexpr, HW: tl.constexpr, NHWC: tl.constexpr,
    HAS_CONCAT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_ADD: tl.constexpr,
):  # fmt: skip
    """cat([x + residual, concat]) + add, fp32; and x + residual as it is stored (dtype of x)."""
    start = n.to(tl.int64) * HW
    at = start * C1 + offsets(offs_hw, offs_c, C1, HW, NHWC)
    mask_x = mask
    if HAS_CONCAT:
        mask_x = mask & (offs_c < C1)[None, :]
    x = tl.load(x_ptr + at, mask=mask_x, other=0.0)
    if HAS_RESIDUAL:
        added = tl.load(residual_ptr + at, mask=mask_x, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
    value = x.to(tl.float32)
    if HAS_CONCAT:
        at_2 = start * C2 + offsets(offs_hw, offs_c - C1, C2, HW, NHWC)
        mask_2 = mask & (offs_c >= C1)[None, :]
        value += tl.load(concat_ptr + at_2, mask=mask_2, other=0.0).to(tl.float32)
    if HAS_ADD:
        value += bias_c[None, :]
    return value, x


@triton.jit
def keep_mask(
    rng_ptr, stream, n, hw_start, c_start, threshold,
    C: tl.constexpr, C_STEP: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Dropout's decisions: lane e % 8 of Philox counter (e // 8, stream, sample, step).

    e = hw * C + c; C_STEP: channels from one program's first to the next one's.
    """
    seed = tl.load(rng_ptr)
    step = tl.load(rng_ptr + 1).to(tl.uint32)
    sample = (tl.load(rng_ptr + 2) + n).to(tl.uint32)
    offs_hw = hw_start + tl.arange(0, BLOCK_HW)
    offs_c = c_start + tl.arange(0, BLOCK_C)
    if C % 8 == 0 and BLOCK_C % 8 == 0 and C_STEP % 8 == 0:
        # eight neighbouring channels share a counter: draw once, lay the lanes side by side
        octets = c_start // 8 + tl.arange(0, BLOCK_C // 8)
        counter = (offs_hw[:, None] * (C // 8) + octets[None, :]).to(tl.uint32)
        w0, w1, w2, w3 = philox_words(seed, counter, stream, sample, step)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [.., i, j]: word 2 i + j
        lanes = tl.join(words & 0xFFFF, words >> 16)  # [.., i, j, k]: lane 4 i + 2 j + k
        return tl.reshape(lanes, (BLOCK_HW, BLOCK_C)).to(tl.int32) >= threshold
    else:
        element = offs_hw[:, None] * C + offs_c[None, :]
        w0, w1, w2, w3 = philox_words(seed, (element // 8).to(tl.uint32), stream, sample, step)
        lane = element % 8
        word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
        half = tl.where(lane % 2 == 0, word & 0xFFFF, word >> 16)
        return half.to(tl.int32) >= threshold


@triton.jit
def philox_words(seed, counter, stream, sample, step):
    zero = counter * 0
    return tl.philox(seed, counter, zero + stream, zero + sample, zero + step)


@triton.jit
def range_stats(
    x_ptr, concat_ptr, residual_ptr, bias_c, n, c_start, mask_c, hw_begin,
    C1: tl.constexpr, C2: tl.constexpr, HW: tl.constexpr, CPG: tl.constexpr,
    RANGE: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
    NHWC: tl.constexpr, HAS_CONCAT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_ADD: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared distances of each group over a range of positions.

    Tiles are joined by Chan et al. 1979, so the variance is centred and never cancels.
    """
    offs_c = c_start + tl.arange(0, BLOCK_C)
    hw_end = tl.minimum(hw_begin + RANGE, HW)
    count = 0.0
    mean = tl.zeros((BLOCK_G,), tl.float32)
    m2 = tl.zeros((BLOCK_G,), tl.float32)
    for start in range(hw_begin, hw_end, BLOCK_HW):
        offs_hw = start + tl.arange(0, BLOCK_HW)
        mask = tile_mask(offs_hw, hw_end, mask_c, HW, RANGE, BLOCK_HW)
        value, _ = load_input(
            x_ptr, concat_ptr, residual_ptr, bias_c, n, offs_hw, offs_c, mask,
            C1, C2, HW, NHWC, HAS_CONCAT, HAS_RESIDUAL, HAS_ADD,
        )  # fmt: skip
        here = (tl.minimum(hw_end, start + BLOCK_HW) - start) * CPG * 1.0
        sums = tile_to_groups(tl.where(mask, value, 0.0), CPG, BLOCK_HW, BLOCK_C, BLOCK_G)
        mean_here = sums / here
        mean_c = to_channels(mean_here, CPG, BLOCK_C, BLOCK_G)
        centred = tl.where(mask, value - mean_c[None, :], 0.0)
        m2_here = tile_to_groups(centred * centred, CPG, BLOCK_HW, BLOCK_C, BLOCK_G)
        delta = mean_here - mean
        total = count + here
        mean += delta * (here / total)
        m2 += m2_here + delta * delta * (count * here / total)
        count = total
    return count, mean, m2


@triton.jit
def affine(
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, offs_c, mask_c,
    C: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """a, b of u = a x_hat + b: weight (1 + scale), bias (1 + scale) + shift."""
    a = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    at_c = n.to(tl.int64) * C + offs_c
    if HAS_SCALE:
        factor = 1.0 + tl.load(scale_ptr + at_c, mask=mask_c, other=0.0).to(tl.float32)
        a *= factor
        b *= factor
    if HAS_SHIFT:
        b += tl.load(shift_ptr + at_c, mask=mask_c, other=0.0).to(tl.float32)
    return a, b
