"""Philox4x32-10 (Salmon et al. 2011): random numbers as a function of counters, not of a state.

key     = (seed low 32, seed high 32)
counter = (element // 4, stream, sample, step), all uint32; element: index in C,H,W order
words w0..w3 of a counter belong to elements 4i..4i+3.

uniform = (w >> 8) * 2^-24                          [0, 1), 24 bits
normal  : Box-Muller on the pairs (a, b) = (w0, w1) -> (z0, z1) and (w2, w3) -> (z2, z3)
          u  = fl32(a + 1) / 2^32                   [2^-32, 1]; fl32: rounded once, to nearest even
          z0 = sqrt(-2 ln u) cos(2 pi b / 2^32)
          z1 = sqrt(-2 ln u) sin(2 pi b / 2^32)     |z| <= 6.67

The words agree bit for bit between this file's reference and csrc/philox.h, the normals within
2e-6: there they are fp32 polynomials, here fp64 functions rounded to fp32.
"""

import enum
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.kernels import extension
from ddpm_fast.kernels.spec import Case, Inputs, KernelSpec

MASK = 0xFFFFFFFF


class Stream(enum.IntEnum):
    """The counter's second word: what a random number is for."""

    USER = 0
    DATA_ORDER = 1
    T = 2
    NOISE = 3
    FLIP = 4
    SAMPLER_START = 5
    SAMPLER_NOISE = 6
    DROPOUT = 16  # + the layer's number


def check_counters(
    *,
    seed: int,
    stream: int,
    step: int,
    first_index: int,
    samples: int,
    elements: int,
    lanes: int = 4,
) -> None:
    """Raises ValueError if a counter field or the seed leaves its range.

    elements  of one sample; `lanes` of them share a counter
    """
    _check_range("seed", seed, 2**63, "0 <= seed < 2**63")
    _check_range("stream", stream, 2**32, "0 <= stream < 2**32")
    _check_range("step", step, 2**32, "0 <= step < 2**32")
    _check_range("first_index", first_index, 2**32, "0 <= first_index < 2**32")
    if first_index + samples > 2**32:
        raise ValueError(
            f"first_index={first_index} + {samples} samples must be at most 2**32: a sample's"
            " number is a uint32"
        )
    if elements > lanes * 2**32:
        raise ValueError(f"elements={elements} of a sample must be at most {lanes} * 2**32")


def _check_range(name: str, value: int, end: int, rule: str) -> None:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be an int, {rule}")
    if not 0 <= value < end:
        raise ValueError(f"{name}={value} must satisfy {rule}")


def _multiply_wide(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * factor, both below 2^32; no step leaves int64."""
    low_product = (a & 0xFFFF) * factor
    high_product = (a >> 16) * factor + (low_product >> 16)
    return high_product >> 16, ((high_product << 16) | (low_product & 0xFFFF)) & MASK


def reference_words(counter: Tensor, key: Tensor) -> Tensor:
    """counter (..., 4), key (..., 2) int64 holding uint32 -> words (..., 4), likewise."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        high0, low0 = _multiply_wide(c0, 0xD2511F53)
        high1, low1 = _multiply_wide(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + 0x9E3779B9) & MASK
        k1 = (k1 + 0xBB67AE85) & MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def reference_box_muller(words: Tensor) -> Tensor:
    """words (..., 2k) int64 holding uint32 -> normals (..., 2k) fp64."""
    a, b = words.unflatten(-1, (-1, 2)).unbind(-1)
    u = (a + 1).to(torch.float32).to(torch.float64) * 2.0**-32
    radius = (-2.0 * u.log()).sqrt()
    angle = b.to(torch.float64) * (2.0 * math.pi * 2.0**-32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(-2)


def reference_sample_words(
    samples: int, counters: int, seed: Tensor, step: Tensor, first_index: Tensor, stream: int
) -> Tensor:
    """seed, step, first_index: () int64 -> words (samples, counters, 4) of counters 0, 1, ..."""
    device = seed.device
    sample = (first_index + torch.arange(samples, device=device)) & MASK
    element = torch.arange(counters, device=device)
    size = (samples, counters)
    counter = torch.stack(
        [
            element.expand(size),
            torch.full(size, stream, dtype=torch.int64, device=device),
            sample[:, None].expand(size),
            (step & MASK).expand(size),
        ],
        dim=-1,
    )
    key = torch.stack([seed & MASK, (seed >> 32) & MASK])
    return reference_words(counter, key)


def reference_fill(
    shape: tuple[int, ...],
    normal: bool,
    *,
    seed: int,
    stream: int,
    step: int,
    first_index: int,
    device: torch.device,
) -> Tensor:
    """Normals or uniforms of samples first_index, first_index + 1, ...: `shape` fp32."""
    elements = math.prod(shape[1:])
    state = torch.tensor([seed, step, first_index], dtype=torch.int64, device=device)
    words = reference_sample_words(shape[0], -(-elements // 4), *state.unbind(), stream)
    values = reference_box_muller(words) if normal else (words >> 8) * 2.0**-24
    return values.to(torch.float32).flatten(1)[:, :elements].reshape(shape)


def launch_words(counter: Tensor, key: Tensor) -> Tensor:
    """reference_words by the extension; counter (n, 4), key (n, 2) contiguous, one device."""
    words = torch.empty_like(counter)
    pointers = counter.data_ptr(), key.data_ptr(), words.data_ptr()
    if counter.device.type == "cuda":
        with torch.cuda.device(counter.device):
            extension.module().cuda.philox_words(
                *pointers, len(counter), *extension.cuda_target(counter.device)
            )
    else:
        extension.module().cpu.philox_words(*pointers, len(counter), torch.get_num_threads())
    return words


def launch_fill(
    shape: tuple[int, ...],
    normal: bool,
    *,
    seed: int,
    stream: int,
    step: int,
    first_index: int,
    device: torch.device,
) -> Tensor:
    """reference_fill by the extension, in one pass over the output."""
    out = torch.empty(shape, dtype=torch.float32, device=device)
    elements = math.prod(shape[1:])
    counters = seed, stream, step, first_index
    plan = normal, out.data_ptr(), shape[0], elements, *counters
    if out.device.type == "cuda":
        with torch.cuda.device(out.device):
            extension.module().cuda.philox_fill(*plan, *extension.cuda_target(out.device))
    else:
        extension.module().cpu.philox_fill(*plan, torch.get_num_threads())
    return out


def _make_inputs(values: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Inputs:
    return {
        "shape": values["shape"], "normal": True, "seed": seed, "stream": Stream.NOISE, "step": 3,
        "first_index": 11, "device": torch.device(device),
    }  # fmt: skip


def _bytes_moved(values: Mapping[str, Any], dtype: torch.dtype, backward: bool) -> int:
    return 0 if backward else 4 * math.prod(values["shape"])


SPEC = KernelSpec(
    name="philox_normal",
    source="Salmon et al. 2011, Box and Muller 1958: counters to normals in one pass",
    reference=reference_fill,
    fused=launch_fill,
    make_inputs=_make_inputs,
    cases=(
        Case(name="256x3x32x32", values={"shape": (256, 3, 32, 32)}),
        Case(name="16384x3x32x32", values={"shape": (16384, 3, 32, 32)}),
        Case(name="16x3x32x32", values={"shape": (16, 3, 32, 32)}, small=True),
        Case(name="3x5x7", values={"shape": (3, 5, 7)}, small=True),
    ),
    bytes_moved=_bytes_moved,
    flops=lambda values, backward: 0,
    tolerance={torch.float32: 1e-6},
    launches=lambda arch: [],  # csrc/, not Triton
)
