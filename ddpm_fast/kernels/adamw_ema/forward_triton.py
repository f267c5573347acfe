"""Triton kernels of adamw_ema: norm, outcome, update. See op.py.

Tensors are found through a table of rows of int64, one a tensor: addresses, sizes, and the group's
numbers as the bits of fp64. A chunk (tensor, first element) is a program's share; chunks (B, 2).
norm_kernel leaves a sum of squares per chunk; outcome_kernel, one program, adds them up, decides
and turns the numbers into fp32 coefficients per tensor; update_kernel does the rest. No atomics.

Imports triton and nothing of torch, so that it can be compiled where there is no torch.
"""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from ddpm_fast.kernels.spec import Budget, Launch
from ddpm_fast.kernels.tuning.lookup import lookup

# Columns of a row: addresses, then numel, whether all addresses are multiples of 16, numbers,
# and from EMA on an address for each average.
WEIGHT = tl.constexpr(0)
GRAD = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
STEP = tl.constexpr(4)
LR = tl.constexpr(5)
NUMEL = tl.constexpr(6)
ALIGNED = tl.constexpr(7)
BETA1 = tl.constexpr(8)
BETA2 = tl.constexpr(9)
LOG2_BETA1 = tl.constexpr(10)
LOG2_BETA2 = tl.constexpr(11)
EPS = tl.constexpr(12)
WEIGHT_DECAY = tl.constexpr(13)
EMA = tl.constexpr(14)

# Columns of the coefficients, and what outcome (4,) holds.
COEFFICIENTS = tl.constexpr(8)
NORM = tl.constexpr(0)
FINITE = tl.constexpr(1)
CLIP = tl.constexpr(2)
APPLIED = tl.constexpr(3)

OUTCOME_BLOCK, OUTCOME_WARPS = 512, 4  # of one program
NUM_STAGES = 1  # loops without products: nothing to prefetch by


@triton.jit
def _pointer(rows_ptr, row, COLUMN: tl.constexpr, WIDE: tl.constexpr):
    """A tensor's address; WIDE promises that 16-byte accesses may start there."""
    pointer = tl.load(rows_ptr + row + COLUMN).to(tl.pointer_type(tl.float32))
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _squares(
    rows_ptr, row, first, end, CHUNK: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    grad_ptr = _pointer(rows_ptr, row, GRAD, WIDE)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        offs = first + start + tl.arange(0, BLOCK)
        if WIDE:
            grad = tl.load(grad_ptr + offs)
        else:
            grad = tl.load(grad_ptr + offs, mask=offs < end, other=0.0)
        total += grad * grad
    return tl.sum(total)


@triton.jit
def norm_kernel(
    chunks_ptr, rows_ptr, partials_ptr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials (B,): sum of the squared gradients of each chunk."""
    chunk = tl.program_id(0)
    row = tl.load(chunks_ptr + 2 * chunk) * COLUMNS
    first = tl.multiple_of(tl.load(chunks_ptr + 2 * chunk + 1), BLOCK)
    end = tl.minimum(tl.load(rows_ptr + row + NUMEL), first + CHUNK)
    if (tl.load(rows_ptr + row + ALIGNED) != 0) & (end - first == CHUNK):
        total = _squares(rows_ptr, row, first, end, CHUNK, BLOCK, WIDE=True)
    else:
        total = _squares(rows_ptr, row, first, end, CHUNK, BLOCK, WIDE=False)
    tl.store(partials_ptr + chunk, total)


@triton.jit
def _number(rows_ptr, at, mask, COLUMN: tl.constexpr):
    return tl.load(rows_ptr + at + COLUMN, mask=mask, other=0).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["num_chunks", "num_tensors", "max_norm"])
def outcome_kernel(
    rows_ptr, partials_ptr, refused_ptr, coefficients_ptr, outcome_ptr, num_chunks, num_tensors,
    max_norm, COLUMNS: tl.constexpr, SKIP_NONFINITE: tl.constexpr, HAS_REFUSED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """outcome (4,); where the update applies, steps += 1; coefficients (P, 8) of every tensor."""
    offs = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, num_chunks, BLOCK):
        mask = start + offs < num_chunks
        squares += tl.load(partials_ptr + start + offs, mask=mask, other=0.0).to(tl.float64)
    norm = tl.sqrt(tl.sum(squares)).to(tl.float32)
    finite = norm < float("inf")  # false for NaN too
    clip = max_norm / (norm + 1e-6)
    clip = tl.where(clip > 1.0, 1.0, clip)  # a NaN stays
    applies = finite | (not SKIP_NONFINITE)
    if HAS_REFUSED:
        applies = applies & (tl.load(refused_ptr) == 0.0)
    tl.store(outcome_ptr + NORM, norm)
    tl.store(outcome_ptr + FINITE, finite.to(tl.float32))
    tl.store(outcome_ptr + CLIP, clip)
    tl.store(outcome_ptr + APPLIED, applies.to(tl.float32))
    for start in range(0, num_tensors, BLOCK):
        tensor = start + offs
        mask = tensor < num_tensors
        at = tensor.to(tl.int64) * COLUMNS
        step_ptr = tl.load(rows_ptr + at + STEP, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        step = tl.load(step_ptr, mask=mask, other=0.0) + applies.to(tl.float32)
        tl.store(step_ptr, step, mask=mask)
        lr_ptr = tl.load(rows_ptr + at + LR, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        lr = tl.load(lr_ptr, mask=mask, other=0.0).to(tl.float64)
        beta1 = _number(rows_ptr, at, mask, BETA1)
        beta2 = _number(rows_ptr, at, mask, BETA2)
        steps = tl.maximum(step, 1.0).to(tl.float64)  # 0 if the first one does not apply
        power1 = tl.exp2(steps * _number(rows_ptr, at, mask, LOG2_BETA1))
        power2 = tl.exp2(steps * _number(rows_ptr, at, mask, LOG2_BETA2))
        correction1 = tl.where(mask, 1.0 - power1, 1.0)
        correction2 = tl.where(mask, 1.0 - power2, 1.0)
        keep = 1.0 - lr * _number(rows_ptr, at, mask, WEIGHT_DECAY)
        to = coefficients_ptr + tensor * COEFFICIENTS
        tl.store(to + 0, keep.to(tl.float32), mask=mask)
        tl.store(to + 1, (lr / correction1).to(tl.float32), mask=mask)
        tl.store(to + 2, (1.0 / tl.sqrt(correction2)).to(tl.float32), mask=mask)
        tl.store(to + 3, _number(rows_ptr, at, mask, EPS).to(tl.float32), mask=mask)
        tl.store(to + 4, (1.0 - beta1).to(tl.float32), mask=mask)
        tl.store(to + 5, beta2.to(tl.float32), mask=mask)
        tl.store(to + 6, (1.0 - beta2).to(tl.float32), mask=mask)


@triton.jit
def _update(
    rows_ptr, row, coefficients_ptr, outcome_ptr, ema_weights_ptr, tensor, first, end,
    NUM_EMAS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    weight_ptr = _pointer(rows_ptr, row, WEIGHT, WIDE)
    grad_ptr = _pointer(rows_ptr, row, GRAD, WIDE)
    exp_avg_ptr = _pointer(rows_ptr, row, EXP_AVG, WIDE)
    exp_avg_sq_ptr = _pointer(rows_ptr, row, EXP_AVG_SQ, WIDE)
    clip = tl.load(outcome_ptr + CLIP)
    of = coefficients_ptr + tensor * COEFFICIENTS
    keep = tl.load(of + 0)
    step_size = tl.load(of + 1)
    inverse_root = tl.load(of + 2)
    eps = tl.load(of + 3)
    one_minus_beta1 = tl.load(of + 4)
    beta2 = tl.load(of + 5)
    one_minus_beta2 = tl.load(of + 6)
    for start in range(0, CHUNK, BLOCK):
        offs = first + start + tl.arange(0, BLOCK)
        mask = None if WIDE else offs < end
        other = None if WIDE else 0.0
        weight = tl.load(weight_ptr + offs, mask=mask, other=other)
        grad = clip * tl.load(grad_ptr + offs, mask=mask, other=other)
        exp_avg = tl.load(exp_avg_ptr + offs, mask=mask, other=other)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=other)
        exp_avg += one_minus_beta1 * (grad - exp_avg)
        exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
        weight = keep * weight - step_size * exp_avg / (tl.sqrt(exp_avg_sq) * inverse_root + eps)
        # before the other stores: no load moves up past a store that might write there
        for k in tl.static_range(NUM_EMAS):
            ema_weight = tl.load(ema_weights_ptr + k)
            due = tl.full((BLOCK,), ema_weight, tl.float32) != 0.0
            due_here = due if WIDE else due & mask
            ema_ptr = _pointer(rows_ptr, row, EMA + k, WIDE) + offs
            ema = tl.load(ema_ptr, mask=due_here, other=0.0)
            tl.store(ema_ptr, ema + ema_weight * (weight - ema), mask=due_here)
        tl.store(weight_ptr + offs, weight, mask=mask)
        tl.store(exp_avg_ptr + offs, exp_avg, mask=mask)
        tl.store(exp_avg_sq_ptr + offs, exp_avg_sq, mask=mask)


@triton.jit
def update_kernel(
    chunks_ptr, rows_ptr, coefficients_ptr, outcome_ptr, ema_weights_ptr,
    COLUMNS: tl.constexpr, NUM_EMAS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights, moments and the averages that are due, in place; nothing where it is not applied."""
    chunk = tl.program_id(0)
    tensor = tl.load(chunks_ptr + 2 * chunk)
    row = tensor * COLUMNS
    first = tl.multiple_of(tl.load(chunks_ptr + 2 * chunk + 1), BLOCK)
    end = tl.minimum(tl.load(rows_ptr + row + NUMEL), first + CHUNK)
    if tl.load(outcome_ptr + APPLIED) != 0.0:
        if (tl.load(rows_ptr + row + ALIGNED) != 0) & (end - first == CHUNK):
            _update(
                rows_ptr, row, coefficients_ptr, outcome_ptr, ema_weights_ptr, tensor, first, end,
                NUM_EMAS, CHUNK, BLOCK, WIDE=True,
            )  # fmt: skip
        else:
            _update(
                rows_ptr, row, coefficients_ptr, outcome_ptr, ema_weights_ptr, tensor, first, end,
                NUM_EMAS, CHUNK, BLOCK, WIDE=False,
            )  # fmt: skip


def numbers(arch: int, device_name: str = "") -> dict[str, int]:
    """CHUNK, BLOCK, num_warps and num_stages of the norm and the update."""
    default = {"CHUNK": 8192, "BLOCK": 1024, "num_warps": 4}  # not yet measured
    row = lookup("adamw_ema.forward", "any", arch, device_name) or default
    return {**row, "num_stages": NUM_STAGES}


def launches(arch: int) -> list[Launch]:
    """The kernels of a step, with no, one and two averages."""
    rows = [_launch("norm", norm_kernel, 1, arch), _launch("outcome", outcome_kernel, 1, arch)]
    return rows + [_launch(f"update {k} averages", update_kernel, k, arch) for k in (0, 1, 2)]


# Registers of a thread, SASS instructions executed for an element of a whole, aligned chunk, with
# Triton 3.6. The other way's loop stands last in the code; norm's own is unrolled.
_BUDGETS = {
    "norm": Budget(registers=32, instructions=3),
    "outcome": Budget(registers=96, wide=False),
    "update 0 averages": Budget(registers=72, instructions=26),
    "update 1 averages": Budget(registers=128, instructions=29),
    "update 2 averages": Budget(registers=168, instructions=33),
}


def _launch(name: str, kernel: Any, num_emas: int, arch: int) -> Launch:
    found = numbers(arch)
    is_outcome = kernel is outcome_kernel
    flags = {
        "COLUMNS": EMA.value + num_emas, "NUM_EMAS": num_emas, "CHUNK": found["CHUNK"],
        "BLOCK": OUTCOME_BLOCK if is_outcome else found["BLOCK"], "SKIP_NONFINITE": True,
        "HAS_REFUSED": True,
    }  # fmt: skip
    return Launch(
        name=f"adamw_ema {name}",
        kernel=kernel,
        types={arg: _TYPES.get(arg, "*fp32") for arg in kernel.arg_names if arg not in flags},
        constexprs={arg: value for arg, value in flags.items() if arg in kernel.arg_names},
        num_warps=OUTCOME_WARPS if is_outcome else found["num_warps"],
        num_stages=NUM_STAGES,
        elements=0 if is_outcome else flags["CHUNK"],
        trips={norm_kernel: (0,), update_kernel: (flags["CHUNK"] // flags["BLOCK"], 0)}.get(
            kernel, ()
        ),
        budget=_BUDGETS[name],
    )


_TYPES = {
    "chunks_ptr": "*i64", "rows_ptr": "*i64", "num_chunks": "i32", "num_tensors": "i32",
    "max_norm": "fp32",
}  # fmt: skip


def sweep_launch(kernel: str, values: Mapping[str, Any], arch: int) -> Launch:
    """The update of a case's averages under the current launch table."""
    return _launch(f"update {values['num_emas']} averages", update_kernel, values["num_emas"], arch)


def sweep_candidates(values: Mapping[str, Any], arch: int) -> list[tuple[str, str, dict]]:
    """Launch numbers worth timing, fewest doublings from the default first."""
    found = [
        {"CHUNK": chunk, "BLOCK": block, "num_warps": warps}
        for chunk in (2048, 4096, 8192, 16_384, 32_768)
        for warps in (4, 8)
        for block in (128 * warps, 256 * warps, 512 * warps)  # 4, 8, 16 elements a thread
        if block <= chunk
    ]
    default = numbers(arch)

    def doublings(each: Mapping[str, int]) -> int:
        return sum(abs(each[name].bit_length() - default[name].bit_length()) for name in each)

    found.sort(key=doublings)
    return [("adamw_ema.forward", "any", each) for each in found]
