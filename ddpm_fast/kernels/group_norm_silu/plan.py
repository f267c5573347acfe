"""How group_norm_silu's kernels are cut into programs. Plain numbers: no torch, no Triton."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ddpm_fast.kernels.tuning.lookup import lookup

# Elements of a tile, and warps. Triton 3.6, sm_90: forward 64 elements a thread take at most 128
# registers; backward 32 a thread take 113 to 168 (16 a thread: 30 % more instructions an element)
# but spill in tiles that are read twice. Speed: not yet measured.
TILE = {"forward": 16_384, "backward": 4096}
WARPS = {"forward": 8, "backward": 4}
WARPS_READ_AGAIN = 8
# The widest a tile that is read twice may be, best first. What two programs on each of 132 SMs read
# again has to be in L2 (50 MB): backward, x and dy of 1024 bf16 positions are 35 MB by 32 channels,
# 69 MB by 64. Speed: not yet measured.
CHANNELS_READ_AGAIN = {"forward": (64,), "backward": (32, 64)}
# Two programs of 8 warps an SM. Triton 3.6 took up to 163 (backward with dropout), which leaves
# one, and spills nothing under this on sm_80 and 90 in 16 bits and channels_last; fp32 and NCHW
# would, and so does Triton 3.9 on sm_100. Speed: not yet measured.
REGISTERS_READ_AGAIN = 128
MOST_PER_THREAD = 64
NUM_STAGES = 1  # loops without products: nothing to prefetch by
SECTOR_BYTES = 32
# Few images: cut positions into ranges until there are two programs for each of 132 SMs.
PROGRAMS = 264
LEAST_RANGE = 64


@dataclass(frozen=True)
class Plan:
    """Constants of a launch; programs: (channel blocks of all N images, SPLITS)."""

    CPG: int  # channels a group
    GROUPS: int  # groups a program
    BLOCK_C: int  # >= GROUPS * CPG, a power of two
    BLOCK_G: int  # >= GROUPS, a power of two
    BLOCK_HW: int
    RANGE: int  # positions a program
    SPLITS: int
    num_warps: int
    channel_blocks: int
    max_registers: int | None  # a thread, if channels_last; None: the compiler's choice

    def constexprs(self) -> dict[str, int]:
        names = ("CPG", "GROUPS", "RANGE", "SPLITS", "BLOCK_HW", "BLOCK_C")
        return {name: getattr(self, name) for name in names}


def make_plan(
    direction: str, n: int, c: int, hw: int, num_groups: int, *, itemsize: int, arch: int,
    device_name: str = "", dropout: bool = False,
) -> Plan:  # fmt: skip
    """The launch of "forward" or "backward" for N images of C channels and HW positions.

    A row of launch_table.json (BLOCK_HW, GROUPS, num_warps) wins over the default where it fits.
    """
    cpg = c // num_groups
    shape = shape_class(c, hw, num_groups, itemsize=itemsize, dropout=dropout)
    row = lookup(f"group_norm_silu.{direction}", shape, arch, device_name)
    if row is not None and _fits(row, cpg, num_groups):
        groups, block_hw, warps = row["GROUPS"], row["BLOCK_HW"], row["num_warps"]
    else:
        groups, block_hw = _default_tile(direction, cpg, hw, num_groups, itemsize)
        warps = WARPS[direction] if block_hw >= hw else WARPS_READ_AGAIN
    blocks = -(-num_groups // groups)
    splits, span = _splits(n * blocks, hw, block_hw)
    block_hw = min(block_hw, power_of_two(span))
    tile = block_hw * power_of_two(groups * cpg)
    held = splits == 1 and block_hw < hw and itemsize == 2 and arch < 100
    return Plan(
        CPG=cpg,
        GROUPS=groups,
        BLOCK_C=power_of_two(groups * cpg),
        BLOCK_G=power_of_two(groups),
        BLOCK_HW=block_hw,
        RANGE=span,
        SPLITS=splits,
        num_warps=max(1, min(warps, tile // 512)),
        channel_blocks=blocks,
        max_registers=REGISTERS_READ_AGAIN if held else None,
    )


def shape_class(c: int, hw: int, num_groups: int, *, itemsize: int, dropout: bool) -> str:
    """Of a launch table's row: all that a tile's registers and sectors depend on."""
    return f"hw{hw} c{c} g{num_groups} {8 * itemsize}bit" + " dropout" * dropout


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _fits(row: Mapping[str, int], cpg: int, num_groups: int) -> bool:
    """Whether a row's tile is of these groups and can be held in registers; rows may be edited."""
    groups, block_hw, warps = row["GROUPS"], row["BLOCK_HW"], row["num_warps"]
    whole = all(size == power_of_two(size) for size in (block_hw, warps))
    tile = block_hw * power_of_two(groups * cpg)
    return whole and 1 <= groups <= num_groups and tile <= MOST_PER_THREAD * 32 * warps


def _default_tile(
    direction: str, cpg: int, hw: int, num_groups: int, itemsize: int
) -> tuple[int, int]:
    """Groups and positions of a tile: all positions if that leaves whole sectors a row."""
    tile, rows = TILE[direction], power_of_two(hw)
    groups = tile // rows // power_of_two(cpg)
    if groups and (groups * cpg * itemsize) % SECTOR_BYTES == 0 or groups >= num_groups:
        return min(groups, num_groups), rows
    # Too wide a group, or rows that share sectors: a narrower tile, read again from L2.
    for width in CHANNELS_READ_AGAIN[direction]:
        groups = max(1, min(num_groups, power_of_two(width // cpg + 1) // 2))
        if (groups * cpg * itemsize) % SECTOR_BYTES == 0:
            break
    return groups, max(1, min(rows, tile // power_of_two(groups * cpg)))


def _splits(programs: int, hw: int, block_hw: int) -> tuple[int, int]:
    """Number of ranges and positions a range."""
    wanted = min(-(-PROGRAMS // max(programs, 1)), hw // LEAST_RANGE)
    if programs >= PROGRAMS // 2 or wanted < 2:
        return 1, hw
    span = -(-hw // wanted)
    span = -(-span // 8) * 8  # an octet of positions shares a dropout counter
    return -(-hw // span), span
