"""The compiled extension ddpm_fast._C: loaded once, and why not where it cannot be.

It is built from csrc/ by setup.py and knows nothing about torch: its functions take addresses,
sizes, DTYPE_CODES and a stream handle. Its absence is no error until a fused op is asked for.
"""

import functools
import os
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.kernels.calling.impl import chosen_impl, refuse_fused

BUILD_COMMAND = "pip install -e ."
CUDA_BUILD_COMMAND = "DDPM_FAST_CUDA=1 pip install -e ."

# csrc/kernels.h, enum class Dtype
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
SOURCE_DTYPE_CODES = DTYPE_CODES | {torch.uint8: 4}

# Subclasses (fake tensors, DTensor) have no address: the dispatcher knows what to do with them.
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

try:
    from ddpm_fast import _C
except ImportError as error:
    _C = None
    _WHY_MISSING = (
        f"the compiled extension ddpm_fast._C is not there ({error});"
        f" from the source checkout: {BUILD_COMMAND}"
    )
    _WITH_CUDA = False
else:
    _WHY_MISSING = None
    _WITH_CUDA = _C.build_info()["cuda"]


def module() -> ModuleType:
    """The loaded extension.

    returns ddpm_fast._C
    raises  RuntimeError  it is not built or does not load; the message holds the mending command
    """
    if _C is None:
        raise RuntimeError(_WHY_MISSING)
    return _C


def why_missing(device_type: str = "cpu") -> str | None:
    """Why the extension's kernels cannot run on such a device, or None if they can.

    device_type  "cpu", "cuda" or any other torch device type
    """
    if _WHY_MISSING is not None or device_type == "cpu":
        return _WHY_MISSING
    if device_type != "cuda":
        return f"ddpm_fast._C has kernels for cpu and cuda, not for {device_type}"
    if not _WITH_CUDA:
        return f"ddpm_fast._C was built without CUDA; with nvcc installed: {CUDA_BUILD_COMMAND}"
    # A compiled graph cannot be traced through the probe; there the launch itself would raise.
    return None if torch.compiler.is_compiling() else _why_cuda_unusable()


def use_extension(impl: str, device: torch.device) -> bool:
    """Whether `impl` means the extension on this device; FusedError for a "fused" it lacks."""
    chosen = chosen_impl(impl)
    if chosen == "reference":
        return False
    why = why_missing(device.type)
    if why is None:
        return True
    if chosen == "fused":
        refuse_fused(impl, why)
    # Of a meta tensor nobody expects values; dynamo cannot trace a warning
    if device.type != "meta" and not torch.compiler.is_compiling():
        message = f"ddpm_fast runs its plain-torch reference: {why}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return False


@functools.cache
def _why_cuda_unusable() -> str | None:
    error = _C.cuda.why_unusable()
    if not error:
        return None
    version = _C.build_info()["cuda_version"]
    return f"ddpm_fast._C (CUDA {version}) finds no usable device: {error}; update the driver"


def cuda_target(device: torch.device) -> tuple[int, int]:
    """The device's index and its current stream's handle; launch under a guard of that device."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


def has_memory(*tensors: Tensor | None) -> bool:
    """Whether these tensors, and new ones, are real: they have values and an address.

    Not while compiling, of a subclass, or under a dispatch mode: that of fake tensors makes every
    tensor fake, and others, such as a profiler's, are to see the op.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    for tensor in tensors:  # noqa: SIM110  a generator takes 0.5 us more
        if tensor is not None and type(tensor) not in PLAIN_TENSORS:
            return False
    return True


def may_read(first: Tensor, *others: Tensor | None) -> bool:
    """Whether a check may read the values of these tensors of one device on the host.

    On CPU yes. On CUDA the host would wait: only with DDPM_FAST_CHECK=1, and not while a graph is
    captured. Never where they may have none: see :func:`has_memory`.
    """
    if not has_memory(first, *others):
        return False
    device_type = first.device.type
    if device_type == "cpu":
        return True
    if device_type != "cuda" or os.environ.get("DDPM_FAST_CHECK") != "1":
        return False
    return not torch.cuda.is_current_stream_capturing()


def may_launch(*tensors: Tensor | None) -> bool:
    """Whether an op of these tensors needs no dispatcher: they have memory, and no gradient."""
    if not has_memory(*tensors):
        return False
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return False
    return True


def runs_fused(impl: str, device: torch.device, what: str, *dtypes: torch.dtype) -> bool:
    """use_extension, for ops without fp64.

    what  names whose the dtypes are
    """
    fused = use_extension(impl, device)
    if torch.float64 not in dtypes:
        return fused
    if chosen_impl(impl) == "fused":
        allowed = "torch.float32, torch.float16, torch.bfloat16"
        refuse_fused(impl, f"{what} is float64, must be {allowed}")
    return False


def address(tensor: Tensor | None) -> int:
    """What the extension takes for a tensor; 0 for none. It does not keep the tensor alive."""
    return 0 if tensor is None else tensor.data_ptr()


def call(name: str, device: torch.device, arguments: dict[str, Any]) -> None:
    """A function of the extension with named arguments, on the device's current stream."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            index, stream = cuda_target(device)
            getattr(module().cuda, name)(**arguments, device=index, stream=stream)
    else:
        getattr(module().cpu, name)(**arguments, threads=torch.get_num_threads())
