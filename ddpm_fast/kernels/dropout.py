"""y = x * keep * 65536 / (65536 - threshold), keep = lane >= threshold; threshold = round(65536 p).

The lane of logical element e (C,H,W order, whatever the memory layout) of sample n is 16 bits of
Philox: counter (e // 8, stream, first_index + n, step), word (e % 8) // 2, low half first. The rate
is a multiple of 2^-16 and the scale is that rate's, so the mean is exact. A dropped element is 0,
also where x is not finite. y is linear in x: the backward pass is the same op, with the same
counters, on the gradient, and no mask is stored.
"""

import math

import torch
from torch import Tensor

from ddpm_fast.kernels import extension, philox

LANE_VALUES = 65536
COMPUTE_DTYPE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


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


def reference(x: Tensor, rng: Tensor, threshold: int, stream: int) -> Tensor:
    """x (N, ...) floating, rng (3,) int64 [seed, step, first_index] on x's device -> y like x."""
    elements = math.prod(x.shape[1:])
    seed, step, first_index = rng.unbind()
    words = philox.reference_sample_words(
        x.shape[0], -(-elements // 8), seed, step, first_index, stream
    )
    lanes = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)[:, :elements]
    keep = lanes.reshape(x.shape) >= threshold
    scaled = x.to(COMPUTE_DTYPE.get(x.dtype, x.dtype)) * scale_of(threshold)
    y = torch.where(keep, scaled, torch.zeros((), dtype=scaled.dtype, device=x.device))
    return y.to(x.dtype).contiguous(memory_format=memory_format_of(x))


def check_rng(x: Tensor, values: tuple[int, int, int], stream: int) -> None:
    """Raises ValueError if rng's values, as read on the host, leave the counters' ranges."""
    seed, step, first_index = values
    philox.check_counters(
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
    layout = memory_format_of(x)
    channels_last = layout != torch.contiguous_format
    positions = math.prod(x.shape[2:]) if channels_last else 1
    elements = math.prod(x.shape[1:])
    plan = (
        *(x.shape[0], elements // max(positions, 1), positions, channels_last),
        *(stream, threshold, scale_of(threshold)),
    )
    if x.device.type == "cuda":
        return _launch_cuda(x.contiguous(memory_format=layout), rng, plan)
    seed, step, first_index = rng.tolist()
    check_rng(x, (seed, step, first_index), stream)
    compute = x.to(COMPUTE_DTYPE.get(x.dtype, x.dtype)).contiguous(memory_format=layout)
    y = empty_output(compute)
    extension.module().cpu.dropout(
        compute.data_ptr(),
        y.data_ptr(),
        extension.DTYPE_CODES[compute.dtype],
        *plan,
        *(seed, step, first_index, torch.get_num_threads()),
    )
    return y.to(x.dtype)


def _launch_cuda(x: Tensor, rng: Tensor, plan: tuple) -> Tensor:
    y = empty_output(x)
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
