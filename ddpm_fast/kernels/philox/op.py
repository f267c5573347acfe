"""Philox4x32-10 (Salmon et al. 2011): random numbers as a function of counters, not of a state.

key     = (seed low 32, seed high 32)
counter = (element // 4, stream, sample, step), all uint32; element: index in C,H,W order
words w0..w3 of a counter belong to elements 4i..4i+3.

uniform = (w >> 8) * 2^-24                          [0, 1), 24 bits
normal  : Box-Muller on the pairs (a, b) = (w0, w1) -> (z0, z1) and (w2, w3) -> (z2, z3)
          u  = fl32(a + 1) / 2^32                   [2^-32, 1]; fl32: rounded once, to nearest even
          z0 = sqrt(-2 ln u) cos(2 pi b / 2^32)
          z1 = sqrt(-2 ln u) sin(2 pi b / 2^32)     |z| <= 6.67

The words agree bit for bit between this file's reference, csrc/philox.h and the Triton kernels,
which draw words only (dropout's). The normals of the first two agree within 2e-6: there they are
fp32 polynomials, here fp64 functions rounded to fp32.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.kernels.calling import extension
from ddpm_fast.kernels.calling.arguments import (
    as_device,
    as_python,
    as_shape,
    bounds_of,
    check_tensor,
    given,
)
from ddpm_fast.kernels.philox.counters import (
    MASK,
    Counter,
    Stream,
    check_counters,
    counter_tensor,
)
from ddpm_fast.kernels.spec import Case, Inputs, KernelSpec


def philox_words(counter: Tensor, key: Tensor, *, impl: str = "auto") -> Tensor:
    """Philox4x32-10 of given counters: four uint32 words each.

    counter (..., 4)  int64 holding uint32, words c0..c3
    key     (..., 2)  int64 holding uint32, words k0, k1; broadcast against counter
    returns (..., 4)  int64 holding uint32
    raises  ValueError    shape, dtype, device or a value outside 0..2**32 - 1 (on CUDA only
                          with DDPM_FAST_CHECK=1)
            RuntimeError  impl="fused" without the extension
    source  Salmon et al. 2011; the test vectors of Random123
    """
    for name, tensor, width in (("counter", counter, 4), ("key", key, 2)):
        check_tensor(name, tensor, f"int64 (..., {width})")
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} has dtype {tensor.dtype}, must be torch.int64 holding uint32")
        if tensor.dim() == 0 or tensor.shape[-1] != width:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be (..., {width})")
    if counter.device != key.device:
        raise ValueError(f"counter is on {counter.device}, key on {key.device}: must be one device")
    shape = _broadcast_shape(counter, key)
    counter, key = counter.expand(*shape, 4), key.expand(*shape, 2)
    if extension.use_extension(impl, counter.device):
        words = torch.ops.ddpm_fast.philox_words(counter.reshape(-1, 4), key.reshape(-1, 2))
        return words.view(*shape, 4)
    _check_words(counter, key)
    return reference_words(counter, key)


def _broadcast_shape(counter: Tensor, key: Tensor) -> torch.Size:
    sizes = counter.shape[:-1], key.shape[:-1]
    for a, b in zip(reversed(sizes[0]), reversed(sizes[1]), strict=False):
        if a != b and a != 1 and b != 1:
            raise ValueError(
                f"key has shape {tuple(key.shape)}, must be (..., 2) and broadcast against"
                f" counter's {tuple(counter.shape)}"
            )
    return torch.broadcast_shapes(*sizes)


def _check_words(counter: Tensor, key: Tensor) -> None:
    """ValueError for values that are no uint32, where they may be read."""
    for name, words in (("counter", counter), ("key", key)):
        if words.numel() and extension.may_read(words):
            low, high = bounds_of(words)
            if low < 0 or high >= 2**32:
                wrong = low if low < 0 else high
                raise ValueError(f"{name} holds {wrong}, values must be in 0..2**32 - 1")


def philox_normal(
    shape: Sequence[int],
    *,
    seed: int,
    stream: int = 0,
    step: int = 0,
    first_index: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    impl: str = "auto",
) -> Tensor:
    """Standard normals that are a function of (seed, stream, step, sample, element) alone.

    shape        (N, ...)   N samples; the element is the index in the rest, in row-major order
    seed         0 <= seed < 2**63
    stream       0 <= stream < 2**32, what the numbers are for; kernels.philox.Stream names ours
    step         0 <= step < 2**32
    first_index  the first sample's number; first_index + N <= 2**32
    dtype        floating; the fp32 value, converted
    returns      shape, dtype, on device; any split into calls gives the same bits
    raises       ValueError    a value outside its range
                 RuntimeError  impl="fused" without the extension
    source       this file's first lines: Philox4x32-10 and Box-Muller; |z| <= 6.67
    """
    counters = {"seed": seed, "stream": stream, "step": step, "first_index": first_index}
    return _philox_fill(shape, True, counters, dtype, device, impl)


def philox_uniform(
    shape: Sequence[int],
    *,
    seed: int,
    stream: int = 0,
    step: int = 0,
    first_index: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    impl: str = "auto",
) -> Tensor:
    """Uniforms in [0, 1): multiples of 2**-24, so exact in fp32; fp16 and bf16 may round up to 1.

    Arguments, result and errors as philox_normal.
    """
    counters = {"seed": seed, "stream": stream, "step": step, "first_index": first_index}
    return _philox_fill(shape, False, counters, dtype, device, impl)


def _philox_fill(
    shape: Sequence[int],
    normal: bool,
    counters: dict[str, int],
    dtype: torch.dtype,
    device: torch.device | str,
    impl: str,
) -> Tensor:
    shape = as_shape(shape)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{given('dtype', dtype)} must be floating")
    elements = 1
    for size in shape[1:]:
        elements *= size
    counters = {name: as_python(value) for name, value in counters.items()}
    check_counters(**counters, samples=shape[0], elements=elements)
    device = as_device(device)
    if not extension.use_extension(impl, device):
        values = reference_fill(shape, normal, **counters, device=device)
    elif extension.may_launch():
        values = launch_fill(shape, normal, **counters, device=device)
    else:
        values = torch.ops.ddpm_fast.philox_fill(shape, normal, **counters, device=device)
    return values.to(dtype)


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
    seed: Counter,
    stream: int,
    step: Counter,
    first_index: Counter,
    device: torch.device,
) -> Tensor:
    """Normals or uniforms of samples first_index, first_index + 1, ...: `shape` fp32."""
    elements = math.prod(shape[1:])
    state = [counter_tensor(counter, device) for counter in (seed, step, first_index)]
    words = reference_sample_words(shape[0], -(-elements // 4), *state, stream)
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


_library = torch.library.Library("ddpm_fast", "FRAGMENT")
_library.define(
    "philox_words(Tensor counter, Tensor key) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.define(
    "philox_fill(SymInt[] shape, bool normal, *, SymInt seed, SymInt stream, SymInt step,"
    " SymInt first_index, Device device) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _words_op(counter: Tensor, key: Tensor) -> Tensor:
    _check_words(counter, key)
    return launch_words(counter.contiguous(), key.contiguous())


for _key in ("CPU", "CUDA"):
    _library.impl("philox_words", _words_op, _key)
# No tensor among its arguments, so no device to dispatch on.
_library.impl("philox_fill", launch_fill, "CompositeExplicitAutograd")


@torch.library.register_fake("ddpm_fast::philox_words")
def _words_fake(counter: Tensor, key: Tensor) -> Tensor:
    return torch.empty_like(counter, memory_format=torch.contiguous_format)


@torch.library.register_fake("ddpm_fast::philox_fill")
def _fill_fake(shape, normal, *, seed, stream, step, first_index, device) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


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
