"""o = softmax(scale q k^T) v per head, over the T = H W positions of a packed (N, 3C, H, W) qkv.

P  = softmax(S), S = scale q k^T;  o = P v
dv = P^T do;  dP = do v^T;  dS = P (dP - delta), delta = rowsum(P dP) = rowsum(o do)
dq = scale dS k;  dk = scale dS^T q

Saved for backward: qkv, o and the rows' logsumexp (base 2, fp32), from which P is computed again.
Sums and softmax are fp32; P and dS are rounded to the inputs' dtype for their products.
Tillet et al. 2019; Milakov, Gimelshein 2018; Dao 2023.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.kernels.attention.launch import (
    backward_output,
    forward_outputs,
    launch_backward,
    launch_forward,
)
from ddpm_fast.kernels.calling.arguments import (
    as_python,
    check_integer,
    check_number,
    check_tensor,
)
from ddpm_fast.kernels.calling.autocast import kept_in
from ddpm_fast.kernels.calling.impl import chosen_impl, refuse_fused
from ddpm_fast.kernels.calling.target import arch_of, why_no_triton, why_not_fused
from ddpm_fast.kernels.spec import Case, Inputs, KernelSpec, Launch

HEAD_DIMS = (32, 64, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ARCHS = (80, 90, 100)  # compiled and checked for these

# (head size, bytes of a number) -> most tokens whose backward pass does not spill; Triton 3.6,
# sm_90: 28 spills at best with 256 x 2 bytes in 256 tokens, 97 with 256 x 4 in 64.
LARGEST_BACKWARD = {(256, 2): 64, (256, 4): 16}


class Row(NamedTuple):
    """A row of DISPATCH: the first whose limits hold says which path "auto" takes on CUDA."""

    max_tokens: float
    head_dims: tuple[int, ...]
    directions: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    path: str  # "triton" | "sdpa"
    evidence: str


_BOTH, _HALF = ("forward", "backward"), (torch.float16, torch.bfloat16)
DISPATCH = (
    Row(64, HEAD_DIMS, _BOTH, _HALF, "triton", "one program a head; not yet measured"),
    Row(256, (32, 64, 128), _BOTH, _HALF, "triton", "online softmax; not yet measured"),
    Row(256, (256,), ("forward",), _HALF, "triton", "online softmax; not yet measured"),
    Row(math.inf, (256,), ("backward",), _HALF, "sdpa", "our backward would spill registers"),
    Row(math.inf, HEAD_DIMS, _BOTH, _HALF, "sdpa", "long rows are flash SDPA's; not yet measured"),
    Row(math.inf, HEAD_DIMS, _BOTH, (torch.float32,), "sdpa", "ours has no tensor cores for fp32"),
)


def attention(
    qkv: Tensor, num_heads: int, *, scale: float | None = None, impl: str = "auto"
) -> Tensor:
    """Self-attention of each image over its pixels, from one packed projection.

    qkv        (N, 3C, H, W)  fp32|bf16|fp16 (fp64 unless fused), q|k|v blocks of C channels, each
                              of num_heads heads in order; best in channels_last, of which no copy
                              is made; other layouts are made channels_last first
    num_heads  divides C
    scale      of q k^T; None: 1 / sqrt(C / num_heads)
    impl       "auto"       what DISPATCH says: our kernels or torch's SDPA; on CPU SDPA
               "fused"      our Triton kernels: CUDA, or CPU with TRITON_INTERPRET=1 (for tests)
               "reference"  softmax(q k^T) v as written
    returns    (N, C, H, W)   dtype of qkv, under autocast too; channels_last
    raises     ValueError     rank, dtype, channels, num_heads, scale; with impl="fused" also a head
                              size not in HEAD_DIMS or a backward pass that would spill
               RuntimeError   impl="fused" where it cannot run; differentiating it twice
    source     Vaswani et al. 2017, eq. 1
    """
    num_heads = as_python(num_heads)
    head_dim = _check(qkv, num_heads, scale)
    scale = head_dim**-0.5 if scale is None else float(scale)
    path = _path(impl, qkv, head_dim)
    if path == "sdpa":
        return sdpa(qkv, num_heads, scale)
    if path == "reference":
        return reference(qkv, num_heads, scale)
    # Subclasses (fake tensors, DTensor) have no address: the dispatcher knows what to do with them.
    if torch.compiler.is_compiling() or type(qkv) not in (Tensor, torch.nn.Parameter):
        return torch.ops.ddpm_fast.attention_forward(qkv, num_heads, scale)[0]
    if qkv.requires_grad and torch.is_grad_enabled():
        return _Attention.apply(qkv, num_heads, scale)
    return launch_forward(qkv, num_heads, scale)[0]


def choose(
    tokens: int,
    head_dim: int,
    backward: bool,
    device_type: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    arch: int = 90,
) -> tuple[str, str]:
    """What "auto" runs, and why: ("triton" | "sdpa", a reason).

    tokens    H * W
    backward  whether a gradient will be asked for; then both passes must be ours, or neither
    """
    if device_type != "cuda":
        return "sdpa", f"our kernels run on cuda, not on {device_type}"
    if why := why_no_triton():
        return "sdpa", why
    if arch not in ARCHS:
        return "sdpa", f"our kernels are compiled and checked for sm_{ARCHS}, not sm_{arch}"
    if head_dim not in HEAD_DIMS or dtype not in DTYPES:
        return "sdpa", f"no kernel of ours has head size {head_dim} and {dtype}"
    evidence = []
    for direction in _BOTH if backward else _BOTH[:1]:
        row = next(row for row in DISPATCH if _holds(row, tokens, head_dim, direction, dtype))
        if row.path == "sdpa":
            return "sdpa", row.evidence
        evidence.append(row.evidence)
    return "triton", evidence[-1]


def reference(qkv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Plain torch, in fp32 (fp64 for fp64 inputs); arguments as `attention`'s."""
    n, channels, h, w = qkv.shape
    compute = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    with kept_in(compute, qkv.device.type):
        q, k, v = _heads(qkv.to(compute), num_heads)  # (N, heads, T, D)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        o = torch.softmax(q @ k.transpose(2, 3) * scale, dim=-1) @ v
    return _image(o, h, w).to(qkv.dtype)


def sdpa(qkv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """torch's attention on views of qkv: no copy if it is channels_last. Arguments as above."""
    h, w = qkv.shape[2:]
    q, k, v = _heads(qkv, num_heads)
    with kept_in(qkv.dtype, qkv.device.type):
        return _image(F.scaled_dot_product_attention(q, k, v, scale=scale), h, w)


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """(N, 3C, H, W) -> q, k, v (N, heads, T, D); views if qkv is channels_last."""
    n, packed, h, w = qkv.shape
    pixels = qkv.permute(0, 2, 3, 1)  # (N, H, W, 3C)
    split = pixels.reshape(n, h * w, 3, num_heads, packed // 3 // num_heads)
    return split.transpose(1, 3).unbind(2)


def _image(o: Tensor, h: int, w: int) -> Tensor:
    """(N, heads, T, D) -> (N, C, H, W), channels_last."""
    n, heads, _, head_dim = o.shape
    return o.transpose(1, 2).reshape(n, h, w, heads * head_dim).permute(0, 3, 1, 2)


def _check(qkv: Tensor, num_heads: int, scale: float | None) -> int:
    """The head size."""
    check_tensor("qkv", qkv, "(N, 3C, H, W)")
    if qkv.dim() != 4:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}, must be (N, 3C, H, W)")
    if qkv.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"qkv has dtype {qkv.dtype}, must be float32, float16, bfloat16, float64")
    channels = qkv.shape[1] // 3
    if channels == 0 or qkv.shape[1] % 3:
        raise ValueError(f"qkv has {qkv.shape[1]} channels, must be 3C: blocks q, k, v of C >= 1")
    check_integer("num_heads", num_heads)
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide C={channels}, a third of qkv's")
    if scale is not None:
        check_number("scale", scale, "finite")
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale} must be finite")
    return channels // num_heads


def _path(impl: str, qkv: Tensor, head_dim: int) -> str:
    """ "triton", "sdpa" or "reference"; FusedError for a "fused" that cannot be."""
    tokens = qkv.shape[2] * qkv.shape[3]
    needs_grad = qkv.requires_grad and torch.is_grad_enabled()
    chosen = chosen_impl(impl)
    if chosen == "reference":
        return chosen
    if chosen == "auto":
        if qkv.device.type != "cuda":
            return "sdpa"
        kinds = {"dtype": qkv.dtype, "arch": arch_of(qkv.device)}
        return choose(tokens, head_dim, needs_grad, "cuda", **kinds)[0]
    if head_dim not in HEAD_DIMS:
        allowed = ", ".join(map(str, HEAD_DIMS))
        refuse_fused(impl, f"head size C / num_heads = {head_dim} must be one of {allowed}")
    if qkv.dtype not in DTYPES:
        refuse_fused(impl, f"qkv has dtype {qkv.dtype}, must be 32 or 16 bits")
    most = LARGEST_BACKWARD.get((head_dim, qkv.dtype.itemsize), math.inf)
    if needs_grad and tokens > most:
        refuse_fused(
            impl,
            f"the backward pass of {tokens} tokens at head size {head_dim} in {qkv.dtype} would"
            f" spill registers, at most {most} tokens; use more heads",
        )
    if why := why_not_fused(qkv.device.type):
        refuse_fused(impl, why)
    return "triton"


def _holds(row: Row, tokens: int, head_dim: int, direction: str, dtype: torch.dtype) -> bool:
    return (
        tokens <= row.max_tokens
        and head_dim in row.head_dims
        and direction in row.directions
        and dtype in row.dtypes
    )


_library = torch.library.Library("ddpm_fast", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "attention_forward(Tensor qkv, SymInt num_heads, float scale) -> (Tensor, Tensor)", tags=_tags
)
_library.define(
    "attention_backward(Tensor do, Tensor qkv, Tensor o, Tensor logsumexp, SymInt num_heads,"
    " float scale) -> Tensor",
    tags=_tags,
)
for _key in ("CPU", "CUDA"):
    _library.impl("attention_forward", launch_forward, _key)
    _library.impl("attention_backward", launch_backward, _key)


@torch.library.register_fake("ddpm_fast::attention_forward")
def _forward_fake(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    return forward_outputs(qkv, num_heads)


@torch.library.register_fake("ddpm_fast::attention_backward")
def _backward_fake(
    do: Tensor, qkv: Tensor, o: Tensor, logsumexp: Tensor, num_heads: int, scale: float
) -> Tensor:
    return backward_output(qkv)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.num_heads, ctx.scale = inputs
    o, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.save_for_backward(qkv, o, logsumexp)


def _backward(ctx, do: Tensor, _: Tensor | None) -> tuple:
    arguments = (do, *ctx.saved_tensors, ctx.num_heads, ctx.scale)
    return torch.ops.ddpm_fast.attention_backward(*arguments), None, None


def _refuse(ctx, *grads: Tensor) -> None:
    raise RuntimeError(
        "ddpm_fast.ops.attention's kernels cannot be differentiated twice;"
        ' use impl="reference" for a second derivative'
    )


torch.library.register_autograd("ddpm_fast::attention_forward", _backward, setup_context=_save)
torch.library.register_autograd("ddpm_fast::attention_backward", _refuse)


class _Attention(torch.autograd.Function):
    """The op without the dispatcher, which costs some 10 us a call."""

    @staticmethod
    def forward(ctx, qkv: Tensor, num_heads: int, scale: float) -> Tensor:
        o, logsumexp = launch_forward(qkv, num_heads, scale)
        ctx.num_heads, ctx.scale = num_heads, scale
        ctx.save_for_backward(qkv, o, logsumexp)
        return o

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple:
        if torch.is_grad_enabled():  # create_graph=True: through the op, which refuses a second one
            return _backward(ctx, do, None)
        dqkv = launch_backward(do, *ctx.saved_tensors, ctx.num_heads, ctx.scale)
        return dqkv, None, None


def _make_inputs(values: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """values: n, c, h, w, heads. Queries of deviation 2: rows from flat to peaked."""
    n, c, h, w = (values[name] for name in ("n", "c", "h", "w"))
    generator = torch.Generator(device).manual_seed(seed)
    qkv = torch.randn(n, 3 * c, h, w, generator=generator, device=device)
    qkv[:, :c] *= 2
    qkv = qkv.to(dtype).contiguous(memory_format=torch.channels_last)
    return {"qkv": qkv.requires_grad_(), "num_heads": values["heads"]}


def _bytes_moved(values: Mapping[str, Any], dtype: torch.dtype, backward: bool) -> int:
    """Forward: qkv read, o and logsumexp written. Backward: qkv, do, logsumexp read, dqkv written;
    o only where rows are too long to do without."""
    n, c, tokens = values["n"], values["c"], values["h"] * values["w"]
    parts = (7 if tokens <= 64 else 8) if backward else 4
    return n * tokens * (parts * c * dtype.itemsize + 4 * values["heads"])


def _flops(values: Mapping[str, Any], backward: bool) -> int:
    """Two products forward; backward five: S again, dP, dv, dq, dk."""
    products = 5 if backward else 2
    return 2 * products * values["n"] * values["c"] * (values["h"] * values["w"]) ** 2


def _case(n: int, c: int, side: int, heads: int, *, small: bool = False) -> Case:
    values = {"n": n, "c": c, "h": side, "w": side, "heads": heads}
    return Case(name=f"{n}x{side * side} tokens {heads}x{c // heads}", values=values, small=small)


def _launches(arch: int) -> list[Launch]:
    from ddpm_fast.kernels.attention.forward_triton import launches

    return launches(arch)


SPEC = KernelSpec(
    name="attention",
    source="Vaswani et al. 2017, eq. 1, on the packed projection's own layout",
    reference=reference,
    fused=functools.partial(attention, impl="fused"),
    make_inputs=_make_inputs,
    cases=(
        _case(256, 256, 4, 1),  # cifar10, the middle
        _case(256, 64, 4, 1),  # digits
        _case(256, 256, 8, 1),
        _case(256, 256, 8, 4),
        _case(256, 256, 16, 4),
        _case(256, 256, 16, 2),
        _case(2, 64, 4, 1, small=True),
        _case(1, 128, 7, 2, small=True),
        _case(1, 256, 4, 1, small=True),
        _case(1, 64, 10, 1, small=True),
    ),
    bytes_moved=_bytes_moved,
    flops=_flops,
    # fp32: sums of up to 256 products and of as many exponentials. 16 bits: twice the rounding of
    # the result, 1.7e-3 for bf16 and an eighth of it for fp16; P and dS are rounded as well, which
    # adds as much again in squares.
    tolerance={torch.float32: 1e-5, torch.float16: 4.2e-4, torch.bfloat16: 3.4e-3},
    launches=_launches,
)
