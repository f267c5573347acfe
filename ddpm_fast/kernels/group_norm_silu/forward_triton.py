"""Triton kernels of group_norm_silu: statistics, forward, backward. See op.py.

A program owns a block of whole groups (BLOCK_C >= channels of it, padded to a power of two), one
image and one of SPLITS ranges of positions. Tiles are (BLOCK_HW, BLOCK_C), held in registers when a
range is one tile, else read again through L2. With SPLITS > 1 (few images) a first kernel writes
each range's share of the sums and the second one adds them up. No atomics: same bits every run.

Imports triton and nothing of torch, so that it can be compiled where there is no torch.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ddpm_fast.kernels.group_norm_silu.backward_triton import (
    group_norm_silu_backward_kernel,
    group_norm_silu_sums_kernel,
)
from ddpm_fast.kernels.group_norm_silu.plan import (
    MOST_PER_THREAD,
    NUM_STAGES,
    SECTOR_BYTES,
    make_plan,
    power_of_two,
    shape_class,
)
from ddpm_fast.kernels.group_norm_silu.tiles import (
    affine,
    channels_mask,
    images,
    keep_mask,
    load_input,
    offsets,
    program,
    range_stats,
    sigmoid,
    tile_mask,
    tile_to_groups,
    to_channels,
)
from ddpm_fast.kernels.spec import Budget, Launch


@triton.jit
def group_norm_silu_stats_kernel(
    x_ptr, concat_ptr, residual_ptr, add_ptr, partial_ptr,
    C1: tl.constexpr, C2: tl.constexpr, HW: tl.constexpr, CPG: tl.constexpr,
    GROUPS: tl.constexpr, RANGE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, NHWC: tl.constexpr,
    HAS_CONCAT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_ADD: tl.constexpr,
):  # fmt: skip
    """partial (2, N, SPLITS, G): mean and sum of squared distances of each range."""
    C: tl.constexpr = C1 + C2
    G: tl.constexpr = C // CPG
    block, n, split = program(G, GROUPS)
    c_start = block * GROUPS * CPG
    lane_c = tl.arange(0, BLOCK_C)
    mask_c = channels_mask(block, G, GROUPS, CPG, BLOCK_C)
    bias_c = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_ADD:
        at_c = n.to(tl.int64) * C + c_start + lane_c
        bias_c = tl.load(add_ptr + at_c, mask=mask_c, other=0.0).to(tl.float32)
    _, mean, m2 = range_stats(
        x_ptr, concat_ptr, residual_ptr, bias_c, n, c_start, mask_c, split * RANGE, C1, C2,
        HW, CPG, RANGE, BLOCK_HW, BLOCK_C, BLOCK_G, NHWC, HAS_CONCAT, HAS_RESIDUAL, HAS_ADD,
    )  # fmt: skip
    offs_g = tl.arange(0, BLOCK_G)
    group = block * GROUPS + offs_g
    mask_g = (offs_g < GROUPS) & (group < G)
    at = (n * SPLITS + split) * G + group
    tl.store(partial_ptr + at, mean, mask=mask_g)
    tl.store(partial_ptr + images(G, GROUPS) * SPLITS * G + at, m2, mask=mask_g)


@triton.jit
def _joined_stats(
    partial_ptr, n, group, mask_g,
    HW: tl.constexpr, CPG: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr,
    RANGE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared distances of whole groups from the stats kernel's shares."""
    count = 0.0
    mean = tl.zeros(group.shape, tl.float32)
    m2 = tl.zeros(group.shape, tl.float32)
    half = images(G, GROUPS) * SPLITS * G
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
    centred, factor, b, rng_ptr, stream, threshold, keep_scale, n, hw_start, c_start,
    C: tl.constexpr, C_STEP: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
    SILU: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    u = centred * factor[None, :] + b[None, :]
    y = u
    if SILU:
        y = u * sigmoid(u)
    if DROPOUT:
        keep = keep_mask(
            rng_ptr, stream, n, hw_start, c_start, threshold, C, C_STEP, BLOCK_HW, BLOCK_C
        )
        y = tl.where(keep, y * keep_scale, 0.0)
    return y


@triton.jit(do_not_specialize=["threshold", "stream"])
def group_norm_silu_forward_kernel(
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
    C: tl.constexpr = C1 + C2
    G: tl.constexpr = C // CPG
    block, n, split = program(G, GROUPS)
    c_start = block * GROUPS * CPG
    lane_c = tl.arange(0, BLOCK_C)
    offs_c = c_start + lane_c
    mask_c = channels_mask(block, G, GROUPS, CPG, BLOCK_C)
    offs_g = tl.arange(0, BLOCK_G)
    group = block * GROUPS + offs_g
    mask_g = (offs_g < GROUPS) & (group < G)
    bias_c = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_ADD:
        at_c = n.to(tl.int64) * C + offs_c
        bias_c = tl.load(add_ptr + at_c, mask=mask_c, other=0.0).to(tl.float32)
    hw_begin = split * RANGE
    hw_end = tl.minimum(hw_begin + RANGE, HW)
    ONE_TILE: tl.constexpr = SPLITS == 1 and BLOCK_HW >= HW
    offs_hw = hw_begin + tl.arange(0, BLOCK_HW)
    mask = tile_mask(offs_hw, hw_end, mask_c, HW, RANGE, BLOCK_HW)
    if ONE_TILE:
        value, total_x = load_input(
            x_ptr, concat_ptr, residual_ptr, bias_c, n, offs_hw, offs_c, mask,
            C1, C2, HW, NHWC, HAS_CONCAT, HAS_RESIDUAL, HAS_ADD,
        )  # fmt: skip
        sums = tile_to_groups(tl.where(mask, value, 0.0), CPG, BLOCK_HW, BLOCK_C, BLOCK_G)
        mean = sums / (HW * CPG)
        mean_c = to_channels(mean, CPG, BLOCK_C, BLOCK_G)
        centred = tl.where(mask, value - mean_c[None, :], 0.0)
        m2 = tile_to_groups(centred * centred, CPG, BLOCK_HW, BLOCK_C, BLOCK_G)
    elif SPLITS == 1:
        _, mean, m2 = range_stats(
            x_ptr, concat_ptr, residual_ptr, bias_c, n, c_start, mask_c, 0, C1, C2,
            HW, CPG, RANGE, BLOCK_HW, BLOCK_C, BLOCK_G, NHWC, HAS_CONCAT, HAS_RESIDUAL, HAS_ADD,
        )  # fmt: skip
    else:
        mean, m2 = _joined_stats(partial_ptr, n, group, mask_g, HW, CPG, G, GROUPS, RANGE, SPLITS)
    rstd = 1.0 / tl.sqrt(m2 / (HW * CPG) + eps)
    if split == 0:
        tl.store(mean_ptr + n * G + group, mean, mask=mask_g)
        tl.store(rstd_ptr + n * G + group, rstd, mask=mask_g)
    rstd_c = to_channels(rstd, CPG, BLOCK_C, BLOCK_G)
    a, b = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, offs_c, mask_c, C, HAS_SCALE, HAS_SHIFT
    )
    image = n.to(tl.int64) * HW
    for start in range(hw_begin, hw_end, BLOCK_HW):
        if not ONE_TILE:
            offs_hw = start + tl.arange(0, BLOCK_HW)
            mask = tile_mask(offs_hw, hw_end, mask_c, HW, RANGE, BLOCK_HW)
            value, total_x = load_input(
                x_ptr, concat_ptr, residual_ptr, bias_c, n, offs_hw, offs_c, mask,
                C1, C2, HW, NHWC, HAS_CONCAT, HAS_RESIDUAL, HAS_ADD,
            )  # fmt: skip
            centred = value - to_channels(mean, CPG, BLOCK_C, BLOCK_G)[None, :]
        y = _activate(
            centred, rstd_c * a, b, rng_ptr, stream, threshold, keep_scale, n, start, c_start,
            C, GROUPS * CPG, BLOCK_HW, BLOCK_C, SILU, DROPOUT,
        )  # fmt: skip
        at = image * C + offsets(offs_hw, offs_c, C, HW, NHWC)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
        if HAS_RESIDUAL:
            mask_x = mask & (offs_c < C1)[None, :]
            at_x = image * C1 + offsets(offs_hw, offs_c, C1, HW, NHWC)
            tl.store(sum_ptr + at_x, total_x, mask=mask_x)


class Shape(NamedTuple):
    """A launch of the CIFAR-10 presets in training, and what it may use, with Triton 3.6.

    forward, backward  registers a thread, SASS instructions executed for an element. At the speed
                       of its memory an H200 has time for about 29 forward and 44 backward, if it
                       issues one in every slot (est.)
    """

    c1: int
    c2: int  # concat
    hw: int
    add: bool
    silu: bool
    dropout: bool
    forward: tuple[int | None, int | None]
    backward: tuple[int | None, int | None]


SHAPES = (
    Shape(128, 0, 1024, False, True, False, (105, 16), (126, 39)),
    Shape(128, 0, 1024, True, True, True, (128, 33), (128, 69)),
    Shape(128, 128, 1024, False, True, False, (115, 19), (127, 45)),
    Shape(256, 128, 1024, False, True, False, (128, 37), (127, 61)),
    Shape(128, 0, 256, False, True, False, (107, 15), (127, 29)),
    Shape(256, 0, 256, True, True, True, (128, 32), (128, 49)),
    Shape(256, 0, 256, False, False, False, (127, 9), (121, 19)),
    Shape(256, 128, 256, False, True, False, (113, 31), (127, 70)),
    Shape(256, 256, 256, False, True, False, (118, 19), (128, 35)),
    Shape(256, 256, 64, False, True, False, (108, 20), (128, 34)),
    Shape(256, 0, 64, True, True, True, (128, 33), (128, 47)),
    Shape(256, 256, 16, False, True, False, (74, 22), (172, 36)),
    Shape(256, 0, 16, True, True, True, (52, 39), (172, 50)),
)


def launches(arch: int) -> list[Launch]:
    """The presets' launches at batch 256, and the split ones of batch 1."""
    rows = [
        _launch(direction, 256, shape, arch)
        for shape in SHAPES
        for direction in ("forward", "backward")
    ]
    one_image = [SHAPES[1], SHAPES[3]]
    return rows + [
        _launch(name, 1, shape, arch)
        for shape in one_image
        for name in ("stats", "forward", "sums", "backward")
    ]


def _launch(name: str, n: int, shape: Shape, arch: int) -> Launch:
    kernel = _KERNELS[name]
    direction = "forward" if name in ("stats", "forward") else "backward"
    channels = shape.c1 + shape.c2
    plan = make_plan(
        direction, n, channels, shape.hw, 32, itemsize=2, arch=arch, dropout=shape.dropout
    )
    flags = {
        **plan.constexprs(), "BLOCK_G": plan.BLOCK_G, "C1": shape.c1, "C2": shape.c2,
        "HW": shape.hw, "NHWC": True, "SILU": shape.silu, "HAS_CONCAT": shape.c2 > 0,
        "HAS_RESIDUAL": False, "HAS_DSUM": False, "HAS_ADD": shape.add, "HAS_SCALE": False,
        "HAS_SHIFT": False, "DROPOUT": shape.dropout,
    }  # fmt: skip
    flavour = f"+{shape.c2}" if shape.c2 else ""
    flavour += " add" * shape.add + " dropout" * shape.dropout + " linear" * (not shape.silu)
    counted = plan.SPLITS == 1
    registers, instructions = getattr(shape, direction) if counted else (None, None)
    reads = -(-plan.RANGE // plan.BLOCK_HW)  # tiles of a program: one loop for sums, one for y
    inputs = {"add_ptr": shape.add, "rng_ptr": shape.dropout, "partial_ptr": plan.SPLITS > 1}
    types = {**_TYPES, **{arg: _GIVEN[arg] for arg, given in inputs.items() if given}}
    return Launch(
        name=f"group_norm_silu {name} {n}x{shape.c1}{flavour} hw{shape.hw}",
        kernel=kernel,
        types={arg: types.get(arg, "*bf16") for arg in kernel.arg_names if arg not in flags},
        constexprs={arg: value for arg, value in flags.items() if arg in kernel.arg_names},
        num_warps=plan.num_warps,
        num_stages=NUM_STAGES,
        max_registers=plan.max_registers,
        elements=channels * shape.hw // plan.channel_blocks if counted else 0,
        trips=(reads, reads) if counted and reads > 1 else (),
        budget=Budget(registers=registers, instructions=instructions),
    )


def sweep_candidates(values: Mapping[str, Any], arch: int) -> list[tuple[str, str, dict]]:
    """Launch numbers worth timing for a Case's values, 16-bit: (kernel, shape class, numbers)."""
    channels, hw = values["c1"] + values.get("c2", 0), values["hw"]
    groups = values.get("groups", 32)
    if make_plan("forward", values["n"], channels, hw, groups, itemsize=2, arch=arch).SPLITS > 1:
        return []  # few images: bound by launches, not by tiles
    per_group = channels // groups
    found = []
    for count in (1, 2, 4, 8, 16, 32):
        width = count * per_group
        if count > groups or width > 512 or width * 2 < SECTOR_BYTES:
            continue
        for tile in (2048, 4096, 8192, 16_384, 32_768):
            block_hw = min(power_of_two(hw), tile // power_of_two(width))
            for warps in (4, 8, 16):
                numbers = {"GROUPS": count, "BLOCK_HW": block_hw, "num_warps": warps}
                per_thread = block_hw * power_of_two(width) // (32 * warps)
                within = block_hw >= 8 and 8 <= per_thread <= MOST_PER_THREAD
                if within and numbers not in found:
                    found.append(numbers)

    def unlikely(numbers: Mapping[str, int]) -> tuple:
        """Sort key: tiles read once first, then near 32 elements a thread and 64-byte rows."""
        width = numbers["GROUPS"] * per_group
        per_thread = numbers["BLOCK_HW"] * power_of_two(width) / (32 * numbers["num_warps"])
        row, share = 2 * width / 64, per_thread / 32
        return (numbers["BLOCK_HW"] < hw, max(share, 1 / share), max(row, 1 / row))

    found.sort(key=unlikely)
    dropout = bool(values.get("dropout"))
    shape = shape_class(channels, hw, groups, itemsize=2, dropout=dropout)
    return [
        (f"group_norm_silu.{direction}", shape, numbers)
        for direction in ("forward", "backward")
        for numbers in found
    ]


def sweep_launch(kernel: str, values: Mapping[str, Any], arch: int) -> Launch:
    """The launch of a Case's values, 16-bit, under the current launch table."""
    shape = Shape(
        values["c1"],
        values.get("c2", 0),
        values["hw"],
        bool(values.get("add")),
        values.get("activation", "silu") is not None,
        bool(values.get("dropout")),
        forward=(None, None),
        backward=(None, None),
    )
    return _launch(kernel.rpartition(".")[2], values["n"], shape, arch)


_KERNELS = {
    "stats": group_norm_silu_stats_kernel,
    "forward": group_norm_silu_forward_kernel,
    "sums": group_norm_silu_sums_kernel,
    "backward": group_norm_silu_backward_kernel,
}
_GIVEN = {"add_ptr": "*fp32", "rng_ptr": "*i64", "partial_ptr": "*fp32"}
_TYPES = {  # "*bf16" for the others: images, and what stands in where there is no such input
    "weight_ptr": "*fp32", "bias_ptr": "*fp32", "mean_ptr": "*fp32", "rstd_ptr": "*fp32",
    "sums_ptr": "*fp32", "dadd_ptr": "*fp32", "eps": "fp32", "keep_scale": "fp32",
    "threshold": "i32", "stream": "i32",
}  # fmt: skip
