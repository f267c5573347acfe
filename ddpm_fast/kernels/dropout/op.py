"""y = x * keep * 65536 / (65536 - threshold), keep = lane >= threshold; threshold = round(65536 p).

The lane of element e of sample n is 16 bits of Philox: counter (e // 8, stream, first_index + n,
step), word (e % 8) // 2, low half first. e counts in H,W,C order whatever the memory layout: the
eight channels that a thread of an NHWC kernel holds share a counter (in C,H,W order, as noise has
it, the compiler drew all eight lanes for each: 117 instructions an element more). The rate is a
multiple of 2^-16 and the scale is that rate's, so the mean is exact. A dropped element is 0,
also where x is not finite. y is linear in x: the backward pass is the same op, with the same
counters, on the gradient, and no mask is stored.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.kernels.calling import extension
from ddpm_fast.kernels.calling.arguments import check_number, check_tensor
from ddpm_fast.kernels.calling.gradients import refuse_forward_tangents
from ddpm_fast.kernels.philox import op as philox
from ddpm_fast.kernels.philox.counters import check_counters, check_stream
from ddpm_fast.kernels.spec import Case, Inputs, KernelSpec

LANE_VALUES = 65536
COMPUTE_DTYPE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def dropout(
    x: Tensor,
    p: float,
    rng: Tensor,
    stream: int,
    *,
    training: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Dropout whose mask is a function of counters: never stored, the same for any batch split.

    x        (N, ...)  floating; any memory layout, the mask depends on the logical index only
    p        probability of a zero, 0 <= p <= 1, rounded to a multiple of 2**-16
    rng      (3,)      int64 [seed, step, first_index] on x's device, in the ranges of
                       philox_normal (checked on CPU, on CUDA with DDPM_FAST_CHECK=1)
    stream   0 <= stream < 2**32; Stream.DROPOUT + the layer's number
    training False: returns x
    returns  like x: kept elements times 1 / (1 - p), channels-last if x is; p == 0: x itself
    raises   ValueError    shape, dtype, device or a value outside its range
             RuntimeError  impl="fused" without the extension; differentiating the kernel in
                           forward mode
    source   this file's first lines; Srivastava et al. 2014
    """
    _check(x, p, rng, stream)
    fused = extension.use_extension(impl, x.device)
    if not training or p == 0:
        return x
    threshold = threshold_of(p)
    if not fused:
        if extension.may_read(rng):
            check_rng(x, rng.tolist(), stream)
        return reference(x, rng, threshold, stream)
    refuse_forward_tangents(x)
    return _run(x, rng, threshold, stream)


def _check(x: Tensor, p: float, rng: Tensor, stream: int) -> None:
    check_number("p", p, "in [0, 1]")
    if not 0 <= p <= 1:
        raise ValueError(f"p={p} must be in [0, 1]")
    check_tensor("x", x, "floating (N, ...)")
    if x.dim() == 0:
        raise ValueError("x has no dimension, must be (N, ...)")
    if x.dtype not in extension.DTYPE_CODES:
        allowed = ", ".join(str(dtype) for dtype in extension.DTYPE_CODES)
        raise ValueError(f"x has dtype {x.dtype}, must be one of {allowed}")
    check_tensor("rng", rng, "int64 (3,), [seed, step, first_index]")
    if rng.dtype != torch.int64 or rng.shape != (3,) or not rng.is_contiguous():
        raise ValueError(
            f"rng is {rng.dtype} {tuple(rng.shape)}, must be a contiguous int64 tensor"
            " [seed, step, first_index]"
        )
    if rng.device != x.device:
        raise ValueError(f"rng is on {rng.device}, must be on x's device {x.device}")
    check_stream(stream)


def threshold_of(p: float) -> int:
    """The lane value from which an element is kept; p in [0, 1]."""
    return round(p * LANE_VALUES)


def scale_of(threshold: int) -> float:
    """The kept elements' factor; 0 where nothing is kept."""
    return LANE_VALUES / (LANE_VALUES - threshold) if threshold < LANE_VALUES else 0.0


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The layout the output gets: x's own if it is dense, NCHW or channels last, else NCHW."""
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def in_counting_order(x: Tensor) -> Tensor:
    """(N, C, *positions) -> (N, *positions, C), dense; a view of a channels-last x."""
    return (x.movedim(1, -1) if x.dim() > 2 else x).contiguous()


def from_counting_order(y: Tensor, like: Tensor) -> Tensor:
    """Inverse of :func:`in_counting_order`, in the layout of `like`."""
    y = y.movedim(-1, 1) if y.dim() > 2 else y
    return y.contiguous(memory_format=memory_format_of(like))


def reference(x: Tensor, rng: Tensor, threshold: int, stream: int) -> Tensor:
    """x (N, ...) floating, rng (3,) int64 [seed, step, first_index] on x's device -> y like x."""
    elements = math.prod(x.shape[1:])
    seed, step, first_index = rng.unbind()
    words = philox.reference_sample_words(
        x.shape[0], -(-elements // 8), seed, step, first_index, stream
    )
    lanes = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)[:, :elements]
    values = in_counting_order(x)
    keep = lanes.reshape(values.shape) >= threshold
    scaled = values.to(COMPUTE_DTYPE.get(x.dtype, x.dtype)) * scale_of(threshold)
    y = torch.where(keep, scaled, torch.zeros((), dtype=scaled.dtype, device=x.device))
    return from_counting_order(y.to(x.dtype), x)


def check_rng(x: Tensor, values: Sequence[int], stream: int) -> None:
    """Raises ValueError if rng's values, as read on the host, leave the counters' ranges."""
    seed, step, first_index = values
    check_counters(
        seed=seed,
        stream=stream,
        step=step,
        first_index=first_index,
        samples=x.shape[0],
        elements=math.prod(x.shape[1:]),
        lanes=8,
    )


def empty_output(x: Tensor) -> Tensor:
    """What `launch` returns for x, uninitialised."""
    return torch.empty_like(x, memory_format=memory_format_of(x))


def launch(x: Tensor, rng: Tensor, threshold: int, stream: int) -> Tensor:
    """`reference` by the extension, in one pass over x."""
    plan = (x.shape[0], math.prod(x.shape[1:]), stream, threshold, scale_of(threshold))
    values = in_counting_order(x)
    if x.device.type == "cuda":
        if extension.may_read(rng):
            check_rng(x, rng.tolist(), stream)
        return from_counting_order(_launch_cuda(values, rng, plan), x)
    seed, step, first_index = rng.tolist()
    check_rng(x, (seed, step, first_index), stream)
    compute = values.to(COMPUTE_DTYPE.get(x.dtype, x.dtype))
    y = torch.empty_like(compute)
    extension.module().cpu.dropout(
        compute.data_ptr(),
        y.data_ptr(),
        extension.DTYPE_CODES[compute.dtype],
        *plan,
        *(seed, step, first_index, torch.get_num_threads()),
    )
    return from_counting_order(y.to(x.dtype), x)


def _launch_cuda(x: Tensor, rng: Tensor, plan: tuple) -> Tensor:
    y = torch.empty_like(x)
    with torch.cuda.device(x.device):
        extension.module().cuda.dropout(
            x.data_ptr(),
            y.data_ptr(),
            extension.DTYPE_CODES[x.dtype],
            *plan,
            rng.data_ptr(),
            *extension.cuda_target(x.device),
        )
    return y


_library = torch.library.Library("ddpm_fast", "FRAGMENT")
_library.define(
    "dropout(Tensor x, Tensor rng, SymInt threshold, SymInt stream) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ("CPU", "CUDA"):
    _library.impl("dropout", launch, _key)


@torch.library.register_fake("ddpm_fast::dropout")
def _fake(x: Tensor, rng: Tensor, threshold: int, stream: int) -> Tensor:
    return empty_output(x)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    _, rng, ctx.threshold, ctx.stream = inputs
    ctx.save_for_backward(rng)


def _backward(ctx, dy: Tensor) -> tuple:
    (rng,) = ctx.saved_tensors
    return torch.ops.ddpm_fast.dropout(dy, rng, ctx.threshold, ctx.stream), None, None, None


torch.library.register_autograd("ddpm_fast::dropout", _backward, setup_context=_save)


class _Dropout(torch.autograd.Function):
    """The op without the dispatcher: 20 us a small call with gradient, not 31 (2-core Xeon)."""

    @staticmethod
    def forward(ctx, x: Tensor, rng: Tensor, threshold: int, stream: int) -> Tensor:
        _save(ctx, (x, rng, threshold, stream), x)
        return launch(x, rng, threshold, stream)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        (rng,) = ctx.saved_tensors
        return _run(dy, rng, ctx.threshold, ctx.stream), None, None, None


def _run(x: Tensor, rng: Tensor, threshold: int, stream: int) -> Tensor:
    if not extension.has_memory(x, rng):
        return torch.ops.ddpm_fast.dropout(x, rng, threshold, stream)
    if x.requires_grad and torch.is_grad_enabled():
        return _Dropout.apply(x, rng, threshold, stream)
    return launch(x, rng, threshold, stream)


def _make_inputs(values: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """values: shape (N, ...), p; a map is channels last."""
    shape = values["shape"]
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=device).to(dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return {
        "x": x.requires_grad_(),
        "rng": torch.tensor([seed, 3, 11], device=device),
        "threshold": threshold_of(values["p"]),
        "stream": philox.Stream.DROPOUT + 5,
    }


def _fused(x: Tensor, rng: Tensor, threshold: int, stream: int) -> Tensor:
    return torch.ops.ddpm_fast.dropout(x, rng, threshold, stream)


def _bytes_moved(values: Mapping[str, Any], dtype: torch.dtype, backward: bool) -> int:
    return 2 * dtype.itemsize * math.prod(values["shape"])


SPEC = KernelSpec(
    name="dropout",
    source="Srivastava et al. 2014, its mask drawn by counter",
    reference=reference,
    fused=_fused,
    make_inputs=_make_inputs,
    cases=(
        Case(name="256x128x32x32", values={"shape": (256, 128, 32, 32), "p": 0.1}),
        Case(name="256x256x16x16", values={"shape": (256, 256, 16, 16), "p": 0.1}),
        Case(name="4x32x16x16", values={"shape": (4, 32, 16, 16), "p": 0.1}, small=True),
        Case(name="2x7x3x5 p0.5", values={"shape": (2, 7, 3, 5), "p": 0.5}, small=True),
    ),
    bytes_moved=_bytes_moved,
    flops=lambda values, backward: 0,
    # Scaled in fp32, rounded once: 1.7e-3 is bf16's floor, an eighth of it fp16's.
    tolerance={torch.float32: 1e-6, torch.float16: 4.2e-4, torch.bfloat16: 3.4e-3},
    launches=lambda arch: [],  # csrc/, not Triton
)
