"""The compiled extension ddpm_fast._C: loaded once, and why not where it cannot be.

It is built from csrc/ by setup.py and knows nothing about torch: its functions take addresses,
sizes, DTYPE_CODES and a stream handle. Its absence is no error until a fused op is asked for.
"""

import functools
from types import ModuleType

import torch

BUILD_COMMAND = "pip install -e ."
CUDA_BUILD_COMMAND = "DDPM_FAST_CUDA=1 pip install -e ."

# csrc/kernels.h, enum class Dtype
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

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
