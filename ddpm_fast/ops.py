"""The functions people call: each checks its arguments, picks the fused kernel or the plain-torch
reference, and is a custom op under torch.compile.

impl  "auto"       our kernel: Triton's on CUDA, the compiled extension's everywhere; the reference
                   where there is none, with a warning if it should be there; attention by a table
      "fused"      our kernel, or a RuntimeError with the command that mends it
      "reference"  plain torch
The environment variable DDPM_FAST_IMPL replaces "auto".
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_fast.kernels import dropout as dropout_kernel
from ddpm_fast.kernels import extension
from ddpm_fast.kernels import philox as philox_kernel
from ddpm_fast.kernels.attention import attention
from ddpm_fast.kernels.group_norm_silu import group_norm_silu
from ddpm_fast.kernels.impl import chosen_impl

__all__ = [
    "attention",
    "dropout",
    "group_norm_silu",
    "philox_normal",
    "philox_uniform",
    "philox_words",
]

_library = torch.library.Library("ddpm_fast", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)


def philox_words(counter: Tensor, key: Tensor, *, impl: str = "auto") -> Tensor:
    """Philox4x32-10 of given counters: four uint32 words each.

    counter (..., 4)  int64 holding uint32, words c0..c3
    key     (..., 2)  int64 holding uint32, words k0, k1; broadcast against counter
    returns (..., 4)  int64 holding uint32
    raises  ValueError    shape, dtype or device; on CPU also a value outside 0..2**32 - 1
            RuntimeError  impl="fused" without the extension
    source  Salmon et al. 2011; the test vectors of Random123
    """
    for name, tensor, width in (("counter", counter, 4), ("key", key, 2)):
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} has dtype {tensor.dtype}, must be torch.int64 holding uint32")
        if tensor.dim() == 0 or tensor.shape[-1] != width:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be (..., {width})")
        if not torch.compiler.is_compiling() and tensor.device.type == "cpu" and tensor.numel():
            low, high = (int(bound) for bound in tensor.aminmax())
            if low < 0 or high >= 2**32:
                wrong = low if low < 0 else high
                raise ValueError(f"{name} holds {wrong}, values must be in 0..2**32 - 1")
    if counter.device != key.device:
        raise ValueError(f"counter is on {counter.device}, key on {key.device}: must be one device")
    shape = torch.broadcast_shapes(counter.shape[:-1], key.shape[:-1])
    counter, key = counter.expand(*shape, 4), key.expand(*shape, 2)
    if use_extension(impl, counter.device):
        words = torch.ops.ddpm_fast.philox_words(counter.reshape(-1, 4), key.reshape(-1, 2))
        return words.view(*shape, 4)
    return philox_kernel.reference_words(counter, key)


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
    source       kernels/philox.py: Philox4x32-10 and Box-Muller; |z| <= 6.67
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
                       philox_normal (checked on CPU; a CUDA kernel reads them on the device)
    stream   0 <= stream < 2**32; Stream.DROPOUT + the layer's number
    training False: returns x
    returns  like x: kept elements times 1 / (1 - p), channels-last if x is; p == 0: x itself
    raises   ValueError    shape, dtype, device or a value outside its range
             RuntimeError  impl="fused" without the extension
    source   kernels/dropout.py; Srivastava et al. 2014
    """
    _check_dropout(x, p, rng, stream)
    fused = use_extension(impl, x.device)
    if not training or p == 0:
        return x
    threshold = dropout_kernel.threshold_of(p)
    compiling = torch.compiler.is_compiling()
    if not fused:
        if not compiling and rng.device.type == "cpu":
            dropout_kernel.check_rng(x, tuple(rng.tolist()), stream)
        return dropout_kernel.reference(x, rng, threshold, stream)
    if compiling:
        return torch.ops.ddpm_fast.dropout(x, rng, threshold, stream)
    return _dropout_eager(x, rng, threshold, stream)


def use_extension(impl: str, device: torch.device) -> bool:
    """Whether `impl` means the extension on this device; RuntimeError for a "fused" it lacks."""
    impl = chosen_impl(impl)
    if impl == "reference":
        return False
    why = extension.why_missing(device.type)
    if why is None:
        return True
    if impl == "fused":
        raise RuntimeError(f'impl="fused": {why}')
    if not torch.compiler.is_compiling():  # dynamo cannot trace a warning
        message = f"ddpm_fast runs its plain-torch reference: {why}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return False


def _philox_fill(
    shape: Sequence[int],
    normal: bool,
    counters: dict[str, int],
    dtype: torch.dtype,
    device: torch.device | str,
    impl: str,
) -> Tensor:
    shape = tuple(shape)
    if len(shape) == 0 or any(size < 0 for size in shape):
        raise ValueError(f"shape={shape} must be (N, ...) with sizes >= 0")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} must be floating")
    elements = 1
    for size in shape[1:]:
        elements *= size
    philox_kernel.check_counters(**counters, samples=shape[0], elements=elements)
    device = torch.device(device)
    if not use_extension(impl, device):
        values = philox_kernel.reference_fill(shape, normal, **counters, device=device)
    elif torch.compiler.is_compiling():
        values = torch.ops.ddpm_fast.philox_fill(shape, normal, **counters, device=device)
    else:
        values = philox_kernel.launch_fill(shape, normal, **counters, device=device)
    return values.to(dtype)


def _check_dropout(x: Tensor, p: float, rng: Tensor, stream: int) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p={p} must be in [0, 1]")
    if x.dim() == 0:
        raise ValueError("x has no dimension, must be (N, ...)")
    if x.dtype not in extension.DTYPE_CODES:
        allowed = ", ".join(str(dtype) for dtype in extension.DTYPE_CODES)
        raise ValueError(f"x has dtype {x.dtype}, must be one of {allowed}")
    if rng.dtype != torch.int64 or rng.shape != (3,) or not rng.is_contiguous():
        raise ValueError(
            f"rng is {rng.dtype} {tuple(rng.shape)}, must be a contiguous int64 tensor"
            " [seed, step, first_index]"
        )
    if rng.device != x.device:
        raise ValueError(f"rng is on {rng.device}, must be on x's device {x.device}")
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream={stream} must satisfy 0 <= stream < 2**32")


_library.define("philox_words(Tensor counter, Tensor key) -> Tensor", tags=_tags)
_library.define(
    "philox_fill(SymInt[] shape, bool normal, *, SymInt seed, SymInt stream, SymInt step,"
    " SymInt first_index, Device device) -> Tensor",
    tags=_tags,
)
_library.define(
    "dropout(Tensor x, Tensor rng, SymInt threshold, SymInt stream) -> Tensor", tags=_tags
)


def _words_impl(counter: Tensor, key: Tensor) -> Tensor:
    return philox_kernel.launch_words(counter.contiguous(), key.contiguous())


for _key in ("CPU", "CUDA"):
    _library.impl("philox_words", _words_impl, _key)
    _library.impl("dropout", dropout_kernel.launch, _key)
# No tensor among its arguments, so no device to dispatch on.
_library.impl("philox_fill", philox_kernel.launch_fill, "CompositeExplicitAutograd")


@torch.library.register_fake("ddpm_fast::philox_words")
def _words_fake(counter: Tensor, key: Tensor) -> Tensor:
    return torch.empty_like(counter, memory_format=torch.contiguous_format)


@torch.library.register_fake("ddpm_fast::philox_fill")
def _fill_fake(shape, normal, *, seed, stream, step, first_index, device) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


@torch.library.register_fake("ddpm_fast::dropout")
def _dropout_fake(x: Tensor, rng: Tensor, threshold: int, stream: int) -> Tensor:
    return dropout_kernel.empty_output(x)


def _dropout_save(ctx, inputs: tuple, output: Tensor) -> None:
    _, rng, ctx.threshold, ctx.stream = inputs
    ctx.save_for_backward(rng)


def _dropout_backward(ctx, dy: Tensor) -> tuple:
    (rng,) = ctx.saved_tensors
    return torch.ops.ddpm_fast.dropout(dy, rng, ctx.threshold, ctx.stream), None, None, None


torch.library.register_autograd(
    "ddpm_fast::dropout", _dropout_backward, setup_context=_dropout_save
)


class _Dropout(torch.autograd.Function):
    """The op without the dispatcher: 20 us a small call with gradient, not 31 (2-core Xeon)."""

    @staticmethod
    def forward(ctx, x: Tensor, rng: Tensor, threshold: int, stream: int) -> Tensor:
        _dropout_save(ctx, (x, rng, threshold, stream), x)
        return dropout_kernel.launch(x, rng, threshold, stream)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        (rng,) = ctx.saved_tensors
        return _dropout_eager(dy, rng, ctx.threshold, ctx.stream), None, None, None


def _dropout_eager(x: Tensor, rng: Tensor, threshold: int, stream: int) -> Tensor:
    # Subclasses (fake tensors, DTensor) have no address: the dispatcher knows what to do with them.
    if type(x) not in _PLAIN_TENSORS:
        return torch.ops.ddpm_fast.dropout(x, rng, threshold, stream)
    if x.requires_grad and torch.is_grad_enabled():
        return _Dropout.apply(x, rng, threshold, stream)
    return dropout_kernel.launch(x, rng, threshold, stream)


_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
