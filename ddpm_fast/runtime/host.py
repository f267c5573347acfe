"""This machine's processors and memory, from /proc where there is one."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

DEVICE = "this machine"
MARK_GIB = 0.01  # beyond what is in use, a mark was not reset: a process may grow between two reads


def cpu_name() -> str:
    """The processor's model, or its architecture."""
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> tuple[float, float]:
    """(total, in use) of the machine; 0 where it is not told."""
    values = {}
    for line in _lines("/proc/meminfo"):
        name, _, value = line.partition(":")
        values[name] = float(value.split()[0]) / 2**20  # KiB
    total = values.get("MemTotal", 0.0)
    return total, total - values.get("MemAvailable", total)


def process_gib() -> tuple[float, float]:
    """(now, at most so far) of this process's resident memory; 0 where it is not told."""
    values = {}
    for line in _lines("/proc/self/status"):
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            values[name] = float(value.split()[0]) / 2**20
    return values.get("VmRSS", 0.0), values.get("VmHWM", 0.0)


def forget_peak() -> bool:
    """Let process_gib's second value start again at what is in use now; whether that was done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux, proc(5): resets VmHWM
    except OSError:  # another system, or a sandbox that has no such file
        return False
    now, most = process_gib()
    return most - now < MARK_GIB


class HostReader:
    """Samples for a machine without GPUs: utilisation of all cores, memory in use."""

    def __init__(self) -> None:
        self._before = _ticks()

    def read(self) -> Iterator[tuple[str, dict[str, float | None]]]:
        busy, total = _ticks()
        passed = total - self._before[1]
        share = 100 * (busy - self._before[0]) / passed if passed > 0 else None
        self._before = (busy, total)
        used = memory_gib()[1]
        yield DEVICE, {"utilisation": share, "memory_gib": used or None}

    def joules(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


def _ticks() -> tuple[float, float]:
    """(busy, all) clock ticks of all cores since the machine started."""
    for line in _lines("/proc/stat"):
        if line.startswith("cpu "):
            ticks = [float(word) for word in line.split()[1:9]]
            return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # idle, waiting for disks
    return 0.0, 0.0


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
