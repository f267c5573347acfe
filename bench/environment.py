"""Where a measurement was taken: device, versions, commit, clocks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ddpm_fast.monitoring.devices import nvml_uuid

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numpy", "ddpm-fast", "diffusers", "liger-kernel")


def describe() -> dict[str, Any]:
    """Device, versions of the packages that are installed, commit."""
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    found: dict[str, Any] = {"device": device_name(), "commit": commit(), "versions": versions}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found |= {
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "l2_mib": round(gpu.L2_cache_size / 2**20, 1),
        }
    else:
        found["threads"] = torch.get_num_threads()
    return found


def device_name() -> str:
    """Of the GPU, or "CPU" and the processor's architecture."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}"


def commit() -> str:
    """The checkout's commit, with "+changes" if files differ from it.

    Without git, what DDPM_FAST_COMMIT says, or "unknown".
    """
    found = _git("rev-parse", "--short", "HEAD")
    if not found:
        return os.environ.get("DDPM_FAST_COMMIT", "unknown")
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
