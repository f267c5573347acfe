"""The machine in words and matrices: processor, GPUs, how they are joined, versions, commit."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from ddpm_fast.runtime import host
from ddpm_fast.runtime.gpus import visible_gpus

# nvmlGpuTopologyLevel_t -> what nvidia-smi topo -m calls it
LEVELS = {0: "SELF", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
MOST_NVLINKS = 18
PACKAGES = ("torch", "triton", "numpy", "ddpm-fast")


def describe(*, gpus: bool) -> dict[str, Any]:
    """The `machine` of a result; with gpus, those that torch sees, and imports torch."""
    found: dict[str, Any] = {
        "cpu": host.cpu_name(), "cores": host.cores(), "memory_gib": round(host.memory_gib()[0], 1),
        "devices": [], "links": [], "p2p": [], "driver": None,
    }  # fmt: skip
    if gpus:
        import torch

        count = range(torch.cuda.device_count())
        properties = [torch.cuda.get_device_properties(i) for i in count]
        found["devices"] = [f"{p.name}, {p.total_memory / 2**30:.0f} GiB" for p in properties]
        found["p2p"] = [
            [i == j or torch.cuda.can_device_access_peer(i, j) for j in count] for i in count
        ]
        with contextlib.suppress(Exception):  # without NVML there is no topology to show
            import pynvml

            found["driver"], found["links"] = topology(pynvml, list(visible_gpus(count).values()))
    return found


def topology(nvml: ModuleType, uuids: list[str]) -> tuple[str, list[list[str]]]:
    """The driver's version and, for each pair of GPUs, NV<links>, PIX, PXB, PHB, NODE or SYS."""
    nvml.nvmlInit()
    try:
        gpus = [nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        addresses = [nvml.nvmlDeviceGetPciInfo(gpu).busId for gpu in gpus]
        nvlinks = [_nvlinks(nvml, gpu) for gpu in gpus]
        links = [
            ["X" if i == j else _link(nvml, gpus[i], gpus[j], nvlinks[i], addresses, j)
             for j in range(len(gpus))]
            for i in range(len(gpus))
        ]  # fmt: skip
        return nvml.nvmlSystemGetDriverVersion(), links
    finally:
        nvml.nvmlShutdown()


def _nvlinks(nvml: ModuleType, gpu: Any) -> list[str | None]:
    """The PCI address at the far end of each active NVLink; None where NVML does not tell it."""
    ends: list[str | None] = []
    for number in range(MOST_NVLINKS):
        try:
            if not nvml.nvmlDeviceGetNvLinkState(gpu, number):
                continue
        except Exception:  # past the last link, or a GPU without
            break
        try:
            ends.append(nvml.nvmlDeviceGetNvLinkRemotePciInfo(gpu, number).busId)
        except Exception:  # a virtual machine is not told of the switches that its links end at
            ends.append(None)
    return ends


def _link(
    nvml: ModuleType, gpu: Any, other: Any, ends: list[str | None], addresses: list[str], j: int
) -> str:
    """Links that end at no GPU end at a switch, which joins all.

    Where every far end is unknown they may also end at another of the GPUs: "NV18?".
    """
    direct = ends.count(addresses[j])
    switched = sum(end not in addresses for end in ends)
    if direct or switched:
        return f"NV{direct or switched}{'' if any(ends) else '?'}"
    try:
        return LEVELS.get(nvml.nvmlDeviceGetTopologyCommonAncestor(gpu, other), "?")
    except Exception:  # the driver does not say
        return "?"


def versions() -> dict[str, str]:
    """Python, the packages that a result depends on, and the checkout's commit if there is one."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    if commit := _commit():
        found["commit"] = commit
    return found


def _commit() -> str:
    """Short hash, with "+changes" where files differ from it; "" outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    words = []
    for command in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno")):
        try:
            done = subprocess.run(
                ["git", *command], cwd=root, capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        words.append(done.stdout.strip())
    return words[0] + ("+changes" if words[1] else "")
