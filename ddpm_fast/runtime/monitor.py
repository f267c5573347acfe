"""What the GPUs do while something runs, sampled by a thread: a context manager.

    with Monitor() as monitor:
        train()
    monitor.samples, monitor.joules()

NVML is asked seldom enough to cost less than a budget of the time. Without NVML, its samples are
this machine's processors and memory, and `why_not` says in one line why.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from types import ModuleType
from typing import Any, TypeVar

from ddpm_fast.runtime.host import HostReader

BUDGET = 5e-4  # share of the time spent sampling; half of what is promised
KEPT = 20_000  # samples; the oldest are thinned beyond


@dataclass(frozen=True)
class Sample:
    """seconds since the start; utilisation in percent, memory in GiB; None: not told."""

    seconds: float
    device: str
    utilisation: float | None = None
    memory_gib: float | None = None
    watts: float | None = None
    celsius: float | None = None
    sm_mhz: float | None = None
    memory_mhz: float | None = None


T = TypeVar("T")


def every_reading(every: int, samples: Iterable[T], reading: Callable[[T], Any]) -> list[T]:
    """The samples of one reading in `every`: all devices of a reading stay or go together.

    reading  tells which reading a sample is of
    """
    groups = (list(group) for _, group in groupby(samples, reading))
    return [sample for group in islice(groups, 0, None, every) for sample in group]


Devices = Mapping[int, str] | Sequence[int | str]

MEASURES = ("utilisation", "memory_gib", "watts", "celsius", "sm_mhz", "memory_mhz")


class Monitor:
    """Samples while the context is open.

    devices     UUIDs of GPUs by the number that a sample calls them, as torch's; or NVML's numbers
                or UUIDs in order; None: all; empty: none, as when the processors do the work
    interval_s  between samples, or more where sampling is slow
    budget      share of the time that sampling may take: for a process that does the work itself
                BUDGET, more for one that only watches
    nvml        the pynvml module, for tests
    raises      ValueError  an interval that is not positive, a budget that is no share
    """

    def __init__(
        self,
        devices: Devices | None = None,
        *,
        interval_s: float = 0.5,
        budget: float = BUDGET,
        nvml: ModuleType | None = None,
    ) -> None:
        if not interval_s > 0:
            raise ValueError(f"interval_s={interval_s} must be positive")
        if not 0 < budget <= 1:
            raise ValueError(f"budget={budget} must be more than 0 and at most 1")
        self.interval_s, self.budget, self.samples = interval_s, budget, []
        self.why_not: str | None = None
        self._devices, self._nvml = devices, nvml
        self._reader: NvmlReader | HostReader = HostReader()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._busy_s, self._started, self._ended = 0.0, 0.0, None
        self._energy: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> Monitor:
        try:
            if self._devices is not None and not self._devices:
                self.why_not = "GPUs are not monitored: none is used"
            else:
                self._reader = NvmlReader(self._devices, self._nvml)
        except Exception as error:  # no package, no driver, no GPU: whatever NVML's reason is
            self.why_not = f"GPUs are not monitored: {_reason(error)}"
        self._started = time.perf_counter()
        self._energy = {name: (j, j) for name, j in self._reader.joules().items()}
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        for name, joules in self._reader.joules().items():
            self._energy[name] = (self._energy.get(name, (joules,))[0], joules)
        self._ended = time.perf_counter()
        self._reader.close()

    def latest(self) -> list[Sample]:
        """The last sample of each device."""
        return list({sample.device: sample for sample in list(self.samples)}.values())

    def means_since(self, seconds: float) -> dict[str, float]:
        """Means over all devices of what was told since then; {} without a sample.

        seconds  since the start, as Sample.seconds
        returns  "utilisation", "memory_gib", "watts", ... as far as they were told
        """
        recent = [asdict(sample) for sample in list(self.samples) if sample.seconds >= seconds]
        told = {
            name: [sample[name] for sample in recent if sample[name] is not None]
            for name in MEASURES
        }
        return {name: statistics.fmean(values) for name, values in told.items() if values}

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._started

    def joules(self) -> dict[str, float]:
        """Energy of each GPU while the context was open, from its counter; empty if untold."""
        return {name: end - start for name, (start, end) in self._energy.items()}

    @property
    def overhead(self) -> float:
        """Seconds spent sampling over seconds open."""
        return self._busy_s / max(1e-9, (self._ended or time.perf_counter()) - self._started)

    def _run(self) -> None:
        while True:
            start = time.perf_counter()
            with contextlib.suppress(Exception):  # a GPU that is lost must not end the run
                for device, values in self._reader.read():
                    self.samples.append(Sample(start - self._started, device, **values))
            if len(self.samples) > KEPT:
                self._thin()
            took = time.perf_counter() - start
            self._busy_s += took
            if self._stop.wait(max(self.interval_s, took / self.budget)):
                return

    def _thin(self) -> None:
        """Of the older half of the samples, those of every other reading stay."""
        middle = self.samples[KEPT // 2].seconds
        old = [sample for sample in self.samples if sample.seconds < middle]
        self.samples[: len(old)] = every_reading(2, old, lambda sample: sample.seconds)


class NvmlReader:
    """Reads GPUs through nvidia-ml-py; any of its errors when made means there is none."""

    def __init__(self, devices: Devices | None = None, nvml: ModuleType | None = None) -> None:
        if nvml is None:
            import pynvml as nvml
        self.nvml = nvml
        nvml.nvmlInit()
        try:
            if devices is None:
                devices = range(nvml.nvmlDeviceGetCount())
            named = devices if isinstance(devices, Mapping) else dict(enumerate(devices))
            if not named:
                raise LookupError("NVML knows no GPU")
            self.handles = {f"GPU {i}": _handle(nvml, device) for i, device in named.items()}
        except Exception:
            nvml.nvmlShutdown()
            raise

    def read(self) -> Iterator[tuple[str, dict[str, float | None]]]:
        """(device, values) of each GPU; what it does not tell is None."""
        nvml = self.nvml
        for name, gpu in self.handles.items():
            memory, load = _told(nvml.nvmlDeviceGetMemoryInfo, gpu), _told(
                nvml.nvmlDeviceGetUtilizationRates, gpu)  # fmt: skip
            milliwatts = _told(nvml.nvmlDeviceGetPowerUsage, gpu)
            yield (
                name,
                {
                    "utilisation": None if load is None else load.gpu,
                    "memory_gib": None if memory is None else memory.used / 2**30,
                    "watts": None if milliwatts is None else milliwatts / 1e3,
                    "celsius": _told(nvml.nvmlDeviceGetTemperature, gpu, nvml.NVML_TEMPERATURE_GPU),
                    "sm_mhz": _told(nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_SM),
                    "memory_mhz": _told(nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_MEM),
                },
            )

    def joules(self) -> dict[str, float]:
        """Each GPU's energy counter; those without (before Volta) are left out."""
        read = {
            name: _told(self.nvml.nvmlDeviceGetTotalEnergyConsumption, gpu)
            for name, gpu in self.handles.items()
        }
        return {name: millijoules / 1e3 for name, millijoules in read.items() if millijoules}

    def close(self) -> None:
        self.nvml.nvmlShutdown()


class EnergyMeter:
    """One GPU's joules over the pieces of work done within `measuring()`; None if untold."""

    def __init__(self, device: int | str, nvml: ModuleType | None = None) -> None:
        self.joules: float | None = None
        self._reader: NvmlReader | None = None
        try:
            self._reader = NvmlReader([device], nvml)
        except Exception:  # as in Monitor: there is no counter to read
            return
        self.joules = 0.0 if self._reader.joules() else None

    @contextmanager
    def measuring(self) -> Iterator[None]:
        before = self._read()
        yield
        after = self._read()
        if self.joules is not None:
            self.joules = self.joules + after - before if before and after else None

    def _read(self) -> float | None:
        return sum(self._reader.joules().values()) if self.joules is not None else None


def _handle(nvml: ModuleType, device: int | str) -> Any:
    if isinstance(device, int):
        return nvml.nvmlDeviceGetHandleByIndex(device)
    return nvml.nvmlDeviceGetHandleByUUID(device)


def _told(ask, *arguments) -> Any:
    try:
        return ask(*arguments)
    except Exception:  # NVMLError_NotSupported and its kin: this GPU does not say
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return "no nvidia-ml-py (pip install nvidia-ml-py)"
    name = type(error).__name__
    if name in ("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded"):
        return "no NVIDIA driver"
    return " ".join(f"{name}: {error}".split())
