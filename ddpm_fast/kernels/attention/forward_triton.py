"""Triton kernels of attention: forward, backward in one program, backward split. See op.py.

A program owns one head of one image, and BLOCK_M of its queries (or BLOCK_N of its keys). q, k, v
and their gradients are channel slices of packed (N, T, 3C) memory, found by strides: nothing is
transposed or copied. Products are tl.dot with fp32 sums. No atomics: same bits every run.

Imports triton and nothing of torch, so that it can be compiled where there is no torch.
"""

import triton
import triton.language as tl

from ddpm_fast.kernels.calling.impl import interpreting
from ddpm_fast.kernels.spec import Budget, Launch
from ddpm_fast.kernels.tuning.lookup import lookup

INTERPRETING = tl.constexpr(interpreting())


@triton.jit
def _dot(a, b, acc):
    """a @ b + acc in fp32. The interpreter multiplies bf16's raw bits, so there they go up."""
    if INTERPRETING:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _cast(x, dtype: tl.constexpr):
    """fp32 -> dtype, to nearest even. The interpreter cuts bf16 off, so there we round first."""
    if INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _tile(ptr, stride_t, start, TOKENS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """Pointers to tokens start .. start + BLOCK of a head (BLOCK, DIM), and which are there."""
    offs_t = start + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, DIM)
    pointers = ptr + offs_t.to(tl.int64)[:, None] * stride_t + offs_d[None, :]
    return pointers, (offs_t < TOKENS)[:, None]


@triton.jit
def _load(ptr, stride_t, start, TOKENS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """Rows of a head (BLOCK, DIM); 0 behind the last token."""
    pointers, mask = _tile(ptr, stride_t, start, TOKENS, BLOCK, DIM)
    if TOKENS % BLOCK == 0:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store(ptr, stride_t, start, x, TOKENS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """x (BLOCK, DIM) fp32 to rows of a head, in the pointer's dtype."""
    pointers, mask = _tile(ptr, stride_t, start, TOKENS, BLOCK, DIM)
    tl.store(pointers, _cast(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_row(ptr, start, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK numbers of fp32, one a token; 0 behind the last."""
    offs_t = start + tl.arange(0, BLOCK)
    return tl.load(ptr + offs_t, mask=offs_t < TOKENS, other=0.0)


@triton.jit
def _hide_absent(s, offs_key, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Scores of keys behind the last token become -inf; offs_key broadcasts to s."""
    if TOKENS % BLOCK == 0:
        return s
    else:
        return tl.where(offs_key < TOKENS, s, float("-inf"))


@triton.jit
def attention_forward_kernel(
    qkv_ptr, o_ptr, lse_ptr,
    stride_qkv_n, stride_qkv_t, stride_o_n, stride_o_t, num_heads, scale_log2,
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """o and lse = log2 of the row sum of 2^s, s = scale log2(e) q k^T, by online softmax."""
    BLOCKS: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    pid_head = tl.program_id(0) // BLOCKS  # of all images
    start_m = tl.program_id(0) % BLOCKS * BLOCK_M
    n = (pid_head // num_heads).to(tl.int64)
    offs_head = pid_head % num_heads * HEAD_DIM
    channels = num_heads * HEAD_DIM
    q_ptr = qkv_ptr + n * stride_qkv_n + offs_head
    k_ptr = q_ptr + channels
    v_ptr = k_ptr + channels
    q = _load(q_ptr, stride_qkv_t, start_m, TOKENS, BLOCK_M, HEAD_DIM)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for start_n in range(0, TOKENS, BLOCK_N):
        k = _load(k_ptr, stride_qkv_t, start_n, TOKENS, BLOCK_N, HEAD_DIM)
        s = _dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale_log2
        s = _hide_absent(s, (start_n + tl.arange(0, BLOCK_N))[None, :], TOKENS, BLOCK_N)
        new_max = tl.maximum(row_max, tl.max(s, axis=1))  # finite: every block has a token
        rescale = tl.exp2(row_max - new_max)
        p = tl.exp2(s - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(p, axis=1)
        v = _load(v_ptr, stride_qkv_t, start_n, TOKENS, BLOCK_N, HEAD_DIM)
        acc = _dot(_cast(p, v.dtype), v, acc * rescale[:, None])
        row_max = new_max
    o_ptr += n * stride_o_n + offs_head
    _store(o_ptr, stride_o_t, start_m, acc / row_sum[:, None], TOKENS, BLOCK_M, HEAD_DIM)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    lse = row_max + tl.log2(row_sum)
    tl.store(lse_ptr + pid_head.to(tl.int64) * TOKENS + offs_m, lse, mask=offs_m < TOKENS)


@triton.jit
def attention_backward_kernel(
    do_ptr, qkv_ptr, lse_ptr, dqkv_ptr,
    stride_do_n, stride_do_t, stride_qkv_n, stride_qkv_t, stride_dqkv_n, stride_dqkv_t,
    num_heads, scale, scale_log2,
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv of a head whose tokens fit in one block; delta needs no o here."""
    pid_head = tl.program_id(0)
    n = (pid_head // num_heads).to(tl.int64)
    offs_head = pid_head % num_heads * HEAD_DIM
    channels = num_heads * HEAD_DIM
    q_ptr = qkv_ptr + n * stride_qkv_n + offs_head
    dq_ptr = dqkv_ptr + n * stride_dqkv_n + offs_head
    do_ptr += n * stride_do_n + offs_head
    zeros = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    q = _load(q_ptr, stride_qkv_t, 0, TOKENS, BLOCK_M, HEAD_DIM)
    k = _load(q_ptr + channels, stride_qkv_t, 0, TOKENS, BLOCK_M, HEAD_DIM)
    lse = _load_row(lse_ptr + pid_head.to(tl.int64) * TOKENS, 0, TOKENS, BLOCK_M)
    s = _dot(q, tl.trans(k), zeros) * scale_log2
    s = _hide_absent(s, tl.arange(0, BLOCK_M)[None, :], TOKENS, BLOCK_M)
    p = tl.exp2(s - lse[:, None])
    do = _load(do_ptr, stride_do_t, 0, TOKENS, BLOCK_M, HEAD_DIM)
    zeros_d = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    dv = _dot(tl.trans(_cast(p, do.dtype)), do, zeros_d)
    _store(dq_ptr + 2 * channels, stride_dqkv_t, 0, dv, TOKENS, BLOCK_M, HEAD_DIM)
    v = _load(q_ptr + 2 * channels, stride_qkv_t, 0, TOKENS, BLOCK_M, HEAD_DIM)
    dp = _dot(do, tl.trans(v), zeros)
    delta = tl.sum(p * dp, axis=1)
    ds = _cast(p * (dp - delta[:, None]), q.dtype)
    dq = _dot(ds, k, zeros_d) * scale
    _store(dq_ptr, stride_dqkv_t, 0, dq, TOKENS, BLOCK_M, HEAD_DIM)
    dk = _dot(tl.trans(ds), q, zeros_d) * scale
    _store(dq_ptr + channels, stride_dqkv_t, 0, dk, TOKENS, BLOCK_M, HEAD_DIM)


@triton.jit
def attention_backward_q_kernel(
    do_ptr, qkv_ptr, o_ptr, lse_ptr, delta_ptr, dqkv_ptr,
    stride_do_n, stride_do_t, stride_qkv_n, stride_qkv_t, stride_o_n, stride_o_t,
    stride_dqkv_n, stride_dqkv_t, num_heads, scale, scale_log2,
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries, and their delta = rowsum(o do) for attention_backward_kv_kernel."""
    BLOCKS: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    pid_head = tl.program_id(0) // BLOCKS
    start_m = tl.program_id(0) % BLOCKS * BLOCK_M
    n = (pid_head // num_heads).to(tl.int64)
    offs_head = pid_head % num_heads * HEAD_DIM
    channels = num_heads * HEAD_DIM
    q_ptr = qkv_ptr + n * stride_qkv_n + offs_head
    row = pid_head.to(tl.int64) * TOKENS
    do_ptr += n * stride_do_n + offs_head
    o_ptr += n * stride_o_n + offs_head
    do = _load(do_ptr, stride_do_t, start_m, TOKENS, BLOCK_M, HEAD_DIM)
    o = _load(o_ptr, stride_o_t, start_m, TOKENS, BLOCK_M, HEAD_DIM)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    tl.store(delta_ptr + row + offs_m, delta, mask=offs_m < TOKENS)
    q = _load(q_ptr, stride_qkv_t, start_m, TOKENS, BLOCK_M, HEAD_DIM)
    lse = _load_row(lse_ptr + row, start_m, TOKENS, BLOCK_M)
    dq = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_n in range(0, TOKENS, BLOCK_N):
        k = _load(q_ptr + channels, stride_qkv_t, start_n, TOKENS, BLOCK_N, HEAD_DIM)
        v = _load(q_ptr + 2 * channels, stride_qkv_t, start_n, TOKENS, BLOCK_N, HEAD_DIM)
        s = _dot(q, tl.trans(k), zeros) * scale_log2
        s = _hide_absent(s, (start_n + tl.arange(0, BLOCK_N))[None, :], TOKENS, BLOCK_N)
        p = tl.exp2(s - lse[:, None])
        dp = _dot(do, tl.trans(v), zeros)
        ds = _cast(p * (dp - delta[:, None]), k.dtype)
        dq = _dot(ds, k, dq)
    dq_ptr = dqkv_ptr + n * stride_dqkv_n + offs_head
    _store(dq_ptr, stride_dqkv_t, start_m, dq * scale, TOKENS, BLOCK_M, HEAD_DIM)


@triton.jit
def attention_backward_kv_kernel(
    do_ptr, qkv_ptr, lse_ptr, delta_ptr, dqkv_ptr,
    stride_do_n, stride_do_t, stride_qkv_n, stride_qkv_t, stride_dqkv_n, stride_dqkv_t,
    num_heads, scale, scale_log2,
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys, over all queries; scores are transposed: (keys, queries)."""
    BLOCKS: tl.constexpr = (TOKENS + BLOCK_N - 1) // BLOCK_N
    pid_head = tl.program_id(0) // BLOCKS
    start_n = tl.program_id(0) % BLOCKS * BLOCK_N
    n = (pid_head // num_heads).to(tl.int64)
    offs_head = pid_head % num_heads * HEAD_DIM
    channels = num_heads * HEAD_DIM
    q_ptr = qkv_ptr + n * stride_qkv_n + offs_head
    row = pid_head.to(tl.int64) * TOKENS
    do_ptr += n * stride_do_n + offs_head
    k = _load(q_ptr + channels, stride_qkv_t, start_n, TOKENS, BLOCK_N, HEAD_DIM)
    v = _load(q_ptr + 2 * channels, stride_qkv_t, start_n, TOKENS, BLOCK_N, HEAD_DIM)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    dk = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
    dv = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
    zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start_m in range(0, TOKENS, BLOCK_M):
        q = _load(q_ptr, stride_qkv_t, start_m, TOKENS, BLOCK_M, HEAD_DIM)
        do = _load(do_ptr, stride_do_t, start_m, TOKENS, BLOCK_M, HEAD_DIM)
        lse = _load_row(lse_ptr + row, start_m, TOKENS, BLOCK_M)
        delta = _load_row(delta_ptr + row, start_m, TOKENS, BLOCK_M)
        s = _dot(k, tl.trans(q), zeros) * scale_log2
        s = _hide_absent(s, offs_n[:, None], TOKENS, BLOCK_N)
        p = tl.exp2(s - lse[None, :])  # 1 for absent queries: their do and delta are 0
        dv = _dot(_cast(p, do.dtype), do, dv)
        dp = _dot(v, tl.trans(do), zeros)
        ds = _cast(p * (dp - delta[None, :]), q.dtype)
        dk = _dot(ds, q, dk)
    dk_ptr = dqkv_ptr + n * stride_dqkv_n + offs_head + channels
    _store(dk_ptr, stride_dqkv_t, start_n, dk * scale, TOKENS, BLOCK_N, HEAD_DIM)
    _store(dk_ptr + channels, stride_dqkv_t, start_n, dv, TOKENS, BLOCK_N, HEAD_DIM)


SHORT = 64  # tokens that one program takes whole, at 2 bytes a number

# Longer rows, 2 bytes a number: head size -> BLOCK_M, BLOCK_N, num_warps, num_stages. Chosen to
# compile without spills for sm_80, 90 and 100 by Triton 3.6 and 3.9; speed: not yet measured.
# 64x64 with 4 warps spilled: forward at head size 32 (3.9, sm_100), kv.backward at 32 (3.6, sm_80)
# and at 128 (3.9, sm_90); at 256 every tile tried spills, so op.py allows no launch there.
TILES = {
    "forward": {32: (64, 32, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
    "q.backward": {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 8, 2)},
    "kv.backward": {32: (32, 64, 4, 2), 64: (32, 64, 4, 2), 128: (32, 64, 8, 2)},
}  # fmt: skip


def tile(
    kernel: str, tokens: int, head_dim: int, itemsize: int, arch: int, device_name: str = ""
) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps, num_stages; of launch_table.json if it has a row.

    kernel             a key of TILES, or "backward" for the one-program kernel
    itemsize           bytes of a number: 4 multiplies without tensor cores, so the smallest tiles
    arch, device_name  such as 90, "NVIDIA H200"
    """
    if itemsize == 4:
        return _named(16, 16, 4 if head_dim <= 64 else 8, 1)
    row = lookup(f"attention.{kernel}", f"t{tokens} d{head_dim}", arch, device_name)
    if row is not None:
        return row
    if tokens > SHORT:
        return _named(*TILES[kernel][head_dim])
    block = max(16, 1 << (tokens - 1).bit_length())
    least = 4 if block == 64 else 1  # a wgmma takes 64 rows and 4 warps
    return _named(block, block, min(8, max(least, block * head_dim // 1024)), 1)


def constexprs(kernel, tokens: int, head_dim: int, numbers: dict[str, int]) -> dict[str, int]:
    """Those of the arguments of `kernel`, a @triton.jit function, that are constants."""
    known = {**numbers, "TOKENS": tokens, "HEAD_DIM": head_dim}
    return {name: known[name] for name in kernel.arg_names if name in known}


def _named(block_m: int, block_n: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages)


KERNELS = {
    "forward": attention_forward_kernel,
    "backward": attention_backward_kernel,
    "q.backward": attention_backward_q_kernel,
    "kv.backward": attention_backward_kv_kernel,
}

# Registers a thread: the most of sm_80, 90 and 100 with Triton 3.6, and a tenth.
REGISTERS = {
    ("forward", 16, 64): 72, ("forward", 16, 256): 72, ("forward", 64, 64): 128,
    ("forward", 64, 256): 168, ("forward", 256, 64): 176, ("forward", 256, 128): 192,
    ("forward", 256, 256): 192,
    ("backward", 16, 64): 96, ("backward", 16, 256): 104, ("backward", 64, 64): 168,
    ("backward", 64, 128): 128, ("backward", 64, 256): 200,
    ("q.backward", 256, 64): 200, ("q.backward", 256, 128): 184,
    ("kv.backward", 256, 64): 200, ("kv.backward", 256, 128): 184,
}  # fmt: skip


def launches(arch: int) -> list[Launch]:
    """What the presets launch, heads of 64 and 128, and rows that do not fill their blocks."""
    short = [(16, 64), (16, 256), (64, 64), (64, 128), (64, 256), (49, 256)]
    rows = [(kernel, *size) for size in short for kernel in ("forward", "backward")]
    for size in [(256, 32), (256, 64), (256, 128), (100, 128)]:
        rows += [(kernel, *size) for kernel in ("forward", "q.backward", "kv.backward")]
    rows += [("forward", 256, 256), ("forward", 100, 256)]
    return [_launch(*row, arch) for row in rows]


def sweep_candidates(values: dict, arch: int) -> list[tuple[str, str, dict[str, int]]]:
    """Other tiles to time for a case: (kernel, shape class, numbers)."""
    tokens, head_dim = values["h"] * values["w"], values["c"] // values["heads"]
    shape_class = f"t{tokens} d{head_dim}"
    if tokens <= SHORT:
        block = tile("forward", tokens, head_dim, 2, arch)["BLOCK_M"]
        return [
            (f"attention.{kernel}", shape_class, _named(block, block, num_warps, 1))
            for kernel in ("forward", "backward")
            for num_warps in ((4, 8) if block == 64 else (1, 2, 4, 8))
        ]
    return [
        (f"attention.{kernel}", shape_class, _named(block_m, block_n, num_warps, num_stages))
        for kernel, of_head_dim in TILES.items()
        if head_dim in of_head_dim
        for num_stages in (2, 3, 1)
        for block_m, block_n in ((64, 64), (128, 64), (64, 32), (32, 64))
        for num_warps in (4, 8)
    ]


def sweep_launch(kernel: str, values: dict, arch: int) -> Launch:
    """The launch of a case's values, bf16, under the current launch table."""
    tokens, head_dim = values["h"] * values["w"], values["c"] // values["heads"]
    return _launch(kernel.partition(".")[2], tokens, head_dim, arch)


def _launch(kernel: str, tokens: int, head_dim: int, arch: int) -> Launch:
    function, numbers = KERNELS[kernel], tile(kernel, tokens, head_dim, 2, arch)
    constants = constexprs(function, tokens, head_dim, numbers)
    if head_dim == 256:
        constants["num_heads"] = 1  # a 1 is compiled in, as Triton does at run time
    names = [name for name in function.arg_names if name not in constants]
    return Launch(
        name=f"{kernel} t{tokens} d{head_dim}",
        kernel=function,
        types={name: _TYPES.get(name, "i32:16") for name in names},  # else a stride
        constexprs=constants,
        num_warps=numbers["num_warps"],
        num_stages=numbers["num_stages"],
        budget=Budget(
            registers=REGISTERS.get((kernel, tokens, head_dim)),
            mma=max(numbers["BLOCK_M"], numbers["BLOCK_N"]) >= 64,  # fewer rows: HMMA everywhere
        ),
    )


_TYPES = {
    "qkv_ptr": "*bf16", "o_ptr": "*bf16", "do_ptr": "*bf16", "dqkv_ptr": "*bf16",
    "lse_ptr": "*fp32", "delta_ptr": "*fp32", "num_heads": "i32", "scale": "fp32",
    "scale_log2": "fp32",
}  # fmt: skip
