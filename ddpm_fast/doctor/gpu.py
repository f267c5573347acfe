"""CUDA: runtime, driver, GPUs, Triton, and the extension's CUDA kernels run on the GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from ddpm_fast.doctor.rows import Finding, one_line

# The oldest driver branch for a CUDA major version: "CUDA Toolkit Release Notes", table 2
MIN_DRIVER = {11: 450, 12: 525, 13: 580}


def check_runtime() -> Finding:
    """The CUDA runtimes in this process: torch's, and the extension's static one."""
    import torch

    own = _extension_cuda()
    torchs = torch.version.cuda
    parts = [f"torch: {torchs or 'none'}", f"extension: {f'{own}, static' if own else 'none'}"]
    if torchs and torch.cuda.is_available() and not own:
        from ddpm_fast.kernels.calling.extension import CUDA_BUILD_COMMAND

        return Finding("; ".join(parts), "slower", CUDA_BUILD_COMMAND)
    return Finding("; ".join(parts), "ok" if torchs or own else "optional")


def check_driver() -> Finding:
    """Its version, and whether the CUDA runtimes accept it."""
    try:
        with _nvml() as nvml:
            version = nvml.nvmlSystemGetDriverVersion()
            cuda = nvml.nvmlSystemGetCudaDriverVersion()
    except ModuleNotFoundError:
        return Finding("not known: no nvidia-ml-py", "optional", "pip install nvidia-ml-py")
    except Exception as error:
        if type(error).__name__ in ("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded"):
            least = _least_driver() or MIN_DRIVER[max(MIN_DRIVER)]
            mend = f"if there is an NVIDIA GPU: install its driver, {least} or newer"
            return Finding("no NVIDIA driver: training runs on the CPU", "optional", mend)
        # After an update the loaded kernel module is still the old one.
        return Finding(one_line(error), "slower", "reboot, or reinstall the NVIDIA driver")
    found = f"{version}, up to CUDA {cuda // 1000}.{cuda % 1000 // 10}"
    least = _least_driver()
    if int(version.partition(".")[0]) < least:
        found += f"; the CUDA runtimes above need {least} or newer"
        return Finding(found, "slower", f"apt install nvidia-driver-{least}, then reboot")
    return Finding(found)


def check_gpus() -> Finding:
    """Name, memory and compute capability of each, and whether torch can use them."""
    import torch

    if torch.cuda.is_available():
        return Finding(_listed(_torch_gpus()))
    seen = nvml_gpus()
    if not seen:
        return Finding("none", "optional")
    try:
        torch.cuda.init()
        why = "torch.cuda.is_available() is False"
    except (RuntimeError, AssertionError) as error:
        why = one_line(error)
    hidden = torch.version.cuda and "CUDA_VISIBLE_DEVICES" in os.environ
    mend = "unset CUDA_VISIBLE_DEVICES" if hidden else ""  # else: see PyTorch and Driver
    return Finding(f"{_listed(seen)}; torch cannot use it: {why}", "slower", mend)


def check_triton() -> Finding:
    """What --compile needs on CUDA; with a GPU, a kernel is compiled and run."""
    import torch

    usable = torch.cuda.is_available()
    if importlib.util.find_spec("triton") is None:
        if sys.platform != "linux":
            found = f"not made for {sys.platform}; --compile on CUDA needs it"
            return Finding(found, "slower" if usable else "optional")
        if torch.version.cuda is None:
            return Finding("not installed; only CUDA uses it", "optional")
        status = "fails" if usable else "optional"
        return Finding("not installed; --compile on CUDA needs it", status, "pip install triton")
    import triton

    if not usable:
        return Finding(f"{triton.__version__}, not run: no GPU")
    from ddpm_fast.doctor.triton_kernel import add_one

    x = torch.arange(100, dtype=torch.float32, device="cuda")
    try:
        wrong = not torch.equal(add_one(x), x + 1)
    except Exception as error:
        mend = "apt install gcc python3-dev"  # it compiles its launcher when first used
        return Finding(f"{triton.__version__}: {one_line(error)}", "fails", mend)
    if wrong:
        return Finding(f"{triton.__version__}: a kernel gives wrong values", "fails",
                       "pip install --force-reinstall torch triton")  # fmt: skip
    return Finding(f"{triton.__version__}, kernel run")


def check_cuda_kernels() -> Finding:
    """The extension's kernels on the GPU against the same on the CPU."""
    import torch

    from ddpm_fast.kernels.calling import extension

    if not torch.cuda.is_available():
        return Finding("not run: no GPU that torch can use", "optional")
    if why := extension.why_missing("cuda"):
        found, _, advice = why.partition(";")
        return Finding(found, "slower", advice.rpartition(": ")[2].strip())
    major, minor = torch.cuda.get_device_capability()
    rebuild = f"DDPM_FAST_CUDA_ARCHS={major}{minor} {extension.CUDA_BUILD_COMMAND}"
    try:
        wrong = _wrong_cuda_kernels()
    except RuntimeError as error:
        return Finding(one_line(error), "fails", rebuild)
    if wrong:
        return Finding(f"other values than on the CPU: {', '.join(wrong)}", "fails", rebuild)
    return Finding("philox_words, philox_normal, dropout: as on the CPU")


def nvml_gpus() -> list[str]:
    """What the driver sees, whatever torch can use; empty without a driver."""
    try:
        with _nvml() as nvml:
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            return [
                _described(
                    nvml.nvmlDeviceGetName(handle),
                    nvml.nvmlDeviceGetMemoryInfo(handle).total,
                    *nvml.nvmlDeviceGetCudaComputeCapability(handle),
                )
                for handle in handles
            ]
    except Exception:  # the row Driver says why
        return []


@contextmanager
def _nvml() -> Iterator[ModuleType]:
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _torch_gpus() -> list[str]:
    import torch

    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [_described(gpu.name, gpu.total_memory, gpu.major, gpu.minor) for gpu in found]


def _described(name: str, memory_bytes: int, major: int, minor: int) -> str:
    return f"{name}, {memory_bytes / 2**30:.0f} GiB, compute capability {major}.{minor}"


def _listed(gpus: list[str]) -> str:
    counted = Counter(gpus).items()
    return "; ".join(gpu if count == 1 else f"{count} x {gpu}" for gpu, count in counted)


def _extension_cuda() -> str:
    """The CUDA version that the extension was built with, "" without."""
    from ddpm_fast.kernels.calling import extension

    if extension.why_missing() is not None:
        return ""
    return extension.module().build_info()["cuda_version"]


def _least_driver() -> int:
    """The oldest driver branch that torch's and the extension's CUDA accept; 0: no CUDA."""
    import torch

    versions = [version for version in (torch.version.cuda, _extension_cuda()) if version]
    majors = [int(version.partition(".")[0]) for version in versions]
    return max((MIN_DRIVER.get(major, 0) for major in majors), default=0)


def _wrong_cuda_kernels() -> list[str]:
    import torch

    from ddpm_fast import ops

    rng = torch.tensor([3, 5, 7])
    counter, key = torch.arange(64).view(16, 4), torch.arange(2)
    results = {}
    for device in ("cpu", "cuda"):
        x = torch.linspace(-1, 1, 4 * 3 * 5 * 5, device=device).view(4, 3, 5, 5)
        results[device] = {
            "philox_words": ops.philox_words(counter.to(device), key.to(device), impl="fused"),
            "philox_normal": ops.philox_normal((4, 75), seed=3, device=device, impl="fused"),
            "dropout": ops.dropout(x, 0.5, rng.to(device), 16, impl="fused"),
        }
    # Words are equal; Box-Muller differs by the two math libraries' rounding.
    return [
        name
        for name, expected in results["cpu"].items()
        if not torch.allclose(results["cuda"][name].cpu(), expected, rtol=1e-5, atol=1e-5)
    ]
