"""Kernels whose compiled form is known, for test_offline.py: python offline_kernels.py OUT.

A process of its own, because TRITON_INTERPRET=1 in the test's environment replaces the compiler.
"""

import sys
from pathlib import Path

import triton
import triton.language as tl

from ddpm_fast.kernels.spec import Budget, Launch
from ddpm_fast.kernels.tuning import offline


@triton.jit
def silu_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, x * tl.sigmoid(x), mask=mask)


@triton.jit
def looped_kernel(x_ptr, y_ptr, size, tiles, BLOCK: tl.constexpr):
    """silu_kernel on one range of tiles after the other."""
    start = tl.program_id(0) * tiles * BLOCK
    for tile in range(tiles):
        offs = start + tile * BLOCK + tl.arange(0, BLOCK)
        mask = offs < size
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + offs, x * tl.sigmoid(x), mask=mask)


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    at = lane[:, None] * BLOCK + lane[None, :]
    a = tl.load(a_ptr + at)
    b = tl.load(b_ptr + at)
    tl.store(c_ptr + at, tl.dot(a, b))


def silu(name: str, block: int, num_warps: int, *, size: str = "i32:16", **budget) -> Launch:
    return Launch(
        name=name,
        kernel=silu_kernel,
        types={"x_ptr": "*bf16", "y_ptr": "*bf16", "size": size},
        constexprs={"BLOCK": block},
        num_warps=num_warps,
        num_stages=1,
        elements=block,
        budget=Budget(**budget),
    )


def looped(name: str, tiles: int, trips: tuple[int, ...]) -> Launch:
    return Launch(
        name=name,
        kernel=looped_kernel,
        types={"x_ptr": "*bf16", "y_ptr": "*bf16", "size": "i32:16", "tiles": "i32"},
        constexprs={"BLOCK": 4096},
        num_warps=8,
        num_stages=1,
        elements=4096 * tiles,
        trips=trips,
        budget=Budget(instructions=31),
    )


def matmul(name: str, block: int, num_warps: int) -> Launch:
    return Launch(
        name=name,
        kernel=matmul_kernel,
        types={"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32"},
        constexprs={"BLOCK": block},
        num_warps=num_warps,
        num_stages=1,
        budget=Budget(mma=True),
    )


LAUNCHES = {
    "well": silu("well", 4096, 8, registers=64, instructions=31),
    "tight": silu("tight", 4096, 8, registers=8, instructions=1),
    "narrow": silu("narrow", 4096, 8, size="i32"),
    "looped": looped("looped", 8, (8,)),
    "loop forgotten": looped("loop forgotten", 8, ()),
    "matmul": matmul("matmul", 64, 4),
    # 512 fp32 sums a thread, of 255 registers; two operands of 128 KiB
    "spilling": matmul("spilling", 256, 4),
    # one of wgmma's instructions takes more registers than 1,024 threads can have
    "impossible": matmul("impossible", 512, 32),
}


def rows() -> list[offline.Row]:
    return [
        offline.compile_and_check("test", launch, arch, with_budget=name != "narrow")
        for arch in offline.CHIPS
        for name, launch in LAUNCHES.items()
        if arch == 90 or name not in ("spilling", "impossible")  # slow to compile
    ]


if __name__ == "__main__":
    offline.write(Path(sys.argv[1]), rows())
