"""Where a measurement was taken: device, versions, commit, clocks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ddpm_fast.runtime.gpus import nvml_uuid

ROOT = Path(__file__).resolve().parent.parent
COMMIT_VARIABLE, UNKNOWN_COMMIT = "DDPM_FAST_COMMIT", "unknown"
NO_GPU = "no CUDA device that torch can use; --dry-run runs tiny sizes on the CPU"
PACKAGES = ("torch", "triton", "numpy", "ddpm-fast", "diffusers", "liger-kernel", "setuptools")


def describe() -> dict[str, Any]:
    """Device, versions of the packages that are installed, commit, torch's attention for the shape
    that trains, and on a GPU whether fp32 is TF32, which is false in all of bench's rows."""
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    found: dict[str, Any] = {"device": device_name(), "commit": commit(), "versions": versions}
    found["sdpa_backend"] = sdpa_backend()
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found |= {
            "tf32": tf32(),
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "l2_mib": round(gpu.L2_cache_size / 2**20, 1),
        }
    else:
        found["threads"] = torch.get_num_threads()
    return found


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def sdpa_backend() -> str:
    """The backend that F.scaled_dot_product_attention takes, forward and backward, for what the
    CIFAR-10 net trains: 16x16 tokens, one head of 256, views of one packed projection; bf16 on a
    GPU, fp32 else. "unknown: ..." where torch does not say."""
    import torch
    from torch.nn.attention import SDPBackend

    n, tokens, size = 8, 256, 256
    on_gpu = torch.cuda.is_available()
    try:
        packed = torch.randn(n, tokens, 3, 1, size, device="cuda" if on_gpu else "cpu")
        packed = packed.to(torch.bfloat16 if on_gpu else torch.float32).requires_grad_()
        q, k, v = packed.transpose(1, 3).unbind(2)
        return SDPBackend(torch._fused_sdp_choice(q, k, v)).name
    except (RuntimeError, AttributeError, ValueError) as error:
        return f"unknown: {type(error).__name__}: {' '.join(str(error).split())[:100]}"


def tf32() -> bool | str:
    """Whether fp32 convolutions and matrix products multiply in TF32; "mixed": one of them does."""
    import torch

    found = {torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32}
    return found.pop() if len(found) == 1 else "mixed"


def device_name() -> str:
    """Of the GPU, or "CPU" and the processor's architecture."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}"


def commit() -> str:
    """The checkout's commit, with "+changes" if files differ from it.

    Without git, what the variable DDPM_FAST_COMMIT says, or UNKNOWN_COMMIT.
    """
    found = _git("rev-parse", "--short", "HEAD")
    if not found:
        return os.environ.get(COMMIT_VARIABLE) or UNKNOWN_COMMIT
    return found + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def clocks() -> dict[str, Any] | None:
    """The GPU's clocks, temperature, power and its limit; None without nvidia-ml-py or GPU."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception:  # any of the library's errors means that there is nothing to read
        return None
    try:
        gpu = _first_gpu(nvml)
        return {
            "driver": nvml.nvmlSystemGetDriverVersion(),
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "memory_mhz": nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
            "celsius": nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
            "watts": round(nvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
            "watts_limit": _or_none(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, gpu),
        }
    except nvml.NVMLError:
        return None
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _first_gpu(nvml: Any) -> Any:
    """torch's first GPU, which is measured; NVML counts all of the machine, by their place in it.

    Where torch does not use the GPU yet it is not asked, as that would take memory on it beside
    what is measured.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        uuid = nvml_uuid(torch.cuda.get_device_properties(0).uuid)
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    if first.startswith("GPU-"):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    return nvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdigit() else 0)


def _or_none(nvml: Any, query: Callable[[Any], int], gpu: Any) -> int | None:
    """Watts of a query in milliwatts that some GPUs do not support."""
    try:
        return round(query(gpu) / 1000)
    except nvml.NVMLError:
        return None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
