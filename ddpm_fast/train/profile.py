"""Profile some steps of a run: a table by kernel, or by op on a CPU, and a trace.

Two profiles are taken, of steps that the run takes anyway. One of a step that is launched op by op,
which tells each op's shapes and kernels: their FLOPs and bytes. One of the steps as they are once
warm, maybe a CUDA graph, which tells times. A kernel has the FLOPs and bytes of the ops that launch
it; those of an op with several kernels are shared among them by time, so their rate is the op's.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ddpm_fast.runtime.graphs import WARM_UP_CALLS, keep_cupti
from ddpm_fast.train.mfu import peak_tflop_s
from ddpm_fast.train.step import TrainStep
from ddpm_fast.train.work import Work, work_of

STEP = "ddpm_fast step"  # its name in the trace
TOP = 20  # rows that are printed
SHORT_US = 3.0  # a kernel below is mostly its launch

# Memory bandwidth, GB/s, by the device's name; NVIDIA's data sheets
PEAK_GB_S = (
    (r"\bH100 80GB HBM3$", 3350.0),
    (r"\bH200\b", 4800.0),
    (r"\bB200\b", 8000.0),
    (r"\bA100-SXM4-80GB\b", 2039.0),
    (r"\bA100-SXM4-40GB\b", 1555.0),
    (r"\bL40S\b", 864.0),
    (r"\bRTX 4090$", 1008.0),
    (r"\bRTX 3090$", 936.0),
)


@dataclass(frozen=True)
class Row:
    """A kernel, or an op on a CPU, of a mean step.

    ms, calls  a step;  flops, bytes  a step, None: not known
    ceiling  share of the device's, the larger of products' and bytes'; None: not known
    """

    name: str
    ms: float
    calls: float
    flops: float | None = None
    bytes: float | None = None
    ceiling: float | None = None


@dataclass(frozen=True)
class Ceilings:
    """The device's peaks by its data sheet; None: not known."""

    tflop_s: float | None = None
    gb_s: float | None = None

    def share(self, work: Work, ms: float) -> float | None:
        """The least time of its work at the peaks, over its time."""
        floors_ms = []
        if self.tflop_s and work.flops:
            floors_ms.append(work.flops / self.tflop_s / 1e9)
        if self.gb_s and work.bytes:
            floors_ms.append(work.bytes / self.gb_s / 1e6)
        return max(floors_ms) / ms if floors_ms and ms else None


def ceilings_of(train_step: TrainStep) -> Ceilings:
    """Products' in bf16 only: what fp32 reaches depends on the kernels."""
    device = train_step.batches.device
    if device.type != "cuda":
        return Ceilings()
    name = torch.cuda.get_device_name(device)
    return Ceilings(
        tflop_s=peak_tflop_s(name) if train_step.autocast_dtype else None,
        gb_s=next((peak for pattern, peak in PEAK_GB_S if re.search(pattern, name)), None),
    )


class StepProfile:
    """Runs a run's steps, of which `steps` under the profiler once they are warm.

    folder  gets step_XXXXXXXX.json, .txt and .trace.json.gz;  say  the table's top rows, or why
            there is none: a profile that fails costs no step

    `profiling`: the last step was slowed.
    """

    def __init__(
        self, train_step: TrainStep, steps: int, folder: Path, say: Callable[[str], None]
    ) -> None:
        self._train_step, self._folder, self._say = train_step, folder, say
        self._wanted = self._left = steps
        self._calls, self._first, self.profiling = 0, 0, False
        self._profiler: profile | None = None
        self._work: dict[str, Work] = {}
        self._on_cuda = train_step.batches.device.type == "cuda"

    def __call__(self, step: int) -> None:
        """Run step number `step`."""
        # A capture comes later: this call is launched op by op.
        with_shapes = self._on_cuda and self._calls == WARM_UP_CALLS - 1
        if self._left and self._profiler is None and (with_shapes or self._is_warm()):
            self._start(step, with_shapes=with_shapes or not self._on_cuda)
        self.profiling = self._profiler is not None
        if not self.profiling:
            self._train_step(step)
        else:
            with record_function(STEP):
                self._train_step(step)
                if self._on_cuda:
                    torch.cuda.synchronize()  # so that the step's kernels are inside
            if with_shapes:
                self._stop(self._read_work)
            else:
                self._left -= 1
        self._calls += 1

    def report_if_due(self) -> None:
        """Write and say what was found, once all steps were taken."""
        if not self._left:
            self.close()

    def close(self) -> None:
        """Write what was found, if that was not done."""
        if self._profiler is not None:
            self._stop(self._report)
        elif self._left:
            self._say("no profile: the run ended before its steps were warm")
        self._left = 0

    def _is_warm(self) -> bool:
        train_step = self._train_step
        return self._calls >= WARM_UP_CALLS and bool(train_step.captured or train_step.why_no_graph)

    def _start(self, step: int, *, with_shapes: bool) -> None:
        if self._on_cuda:
            keep_cupti()
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self._on_cuda]
        try:
            profiler = profile(activities=activities, record_shapes=with_shapes)
            profiler.start()
        except RuntimeError as error:
            self._give_up(error)
        else:
            self._profiler, self._first = profiler, step

    def _stop(self, use: Callable[[profile], None]) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        try:
            profiler.stop()
            use(profiler)
        except Exception as error:  # whatever it is, the run goes on
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._left = 0
        reason = str(error).strip().partition("\n")[0]
        self._say(f"warning: no profile: {reason}; training goes on")

    def _read_work(self, profiler: profile) -> None:
        self._work = work_by_name(profiler.events(), on_cuda=self._on_cuda)

    def _report(self, profiler: profile) -> None:
        events, steps = profiler.events(), self._wanted - self._left
        if not self._on_cuda:
            self._work = work_by_name(steps_of(events), on_cuda=False, steps=steps)
        ceilings = ceilings_of(self._train_step)
        found = Table.of(events, self._work, ceilings, on_cuda=self._on_cuda)
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"step_{self._first + 1:08d}"
        profiler.export_chrome_trace(f"{path}.trace.json.gz")
        head = f"profile of steps {self._first + 1} to {self._first + steps}: {found.head()}"
        facts = {"first_step": self._first + 1, "steps": steps} | asdict(found)
        Path(f"{path}.json").write_text(json.dumps(facts, indent=1) + "\n")
        Path(f"{path}.txt").write_text("\n".join([head, *found.lines()]) + "\n")
        for line in [head, *found.lines(TOP), f"all of it: {path}.txt, .json, .trace.json.gz"]:
            self._say(line)


def steps_of(events: Iterable[Any]) -> list[Any]:
    """The events of whole steps, in which all others of theirs lie."""
    return [e for e in events if e.name == STEP and e.device_type == DeviceType.CPU]


def known_ops(events: Iterable[Any]) -> Iterator[tuple[Any, Work | None]]:
    """Ops with what work_of knows of them; what runs inside a known op belongs to that."""

    def walk(event: Any) -> Iterator[tuple[Any, Work | None]]:
        work = work_of(event)
        yield event, work
        if work is None:
            for child in event.cpu_children:
                yield from walk(child)

    for event in events:
        if event.device_type == DeviceType.CPU and event.cpu_parent is None:
            yield from walk(event)


def work_by_name(events: Iterable[Any], *, on_cuda: bool, steps: int = 1) -> dict[str, Work]:
    """A mean step's work by kernel, or by op on a CPU; None for what some of its calls have.

    events  of so many steps, with shapes
    """
    found: dict[str, list[tuple[float | None, float | None]]] = defaultdict(list)
    for event, work in known_ops(events):
        flops, moved = work or (None, None)
        for name, share in _kernels(event, work) if on_cuda else [(event.name, 1.0)]:
            part = share / steps
            found[name].append(
                (None if flops is None else part * flops, None if moved is None else part * moved)
            )
    return {
        name: Work(
            *(None if None in column else sum(column) for column in zip(*parts, strict=True))
        )
        for name, parts in found.items()
    }


def _kernels(event: Any, work: Work | None) -> list[tuple[str, float]]:
    """Kernels that a known op launched, or an unknown one itself, and their shares of its time."""
    found, ops = [], [event]
    while ops:
        op = ops.pop()
        found += [(kernel.name, kernel.duration) for kernel in op.kernels]
        ops += [] if work is None else op.cpu_children
    total = sum(duration for _, duration in found)
    return [(name, duration / total if total else 0.0) for name, duration in found]


@dataclass(frozen=True)
class Table:
    """A mean step.

    step_ms  its wall time under the profiler;  busy_ms  of its kernels, or ops on a CPU
    short_ms, short_calls  of kernels under SHORT_US; None on a CPU
    rows     the longest first
    """

    step_ms: float
    busy_ms: float
    calls: float
    short_ms: float | None
    short_calls: float | None
    ceilings: Ceilings
    rows: tuple[Row, ...]

    @classmethod
    def of(
        cls, events: Iterable[Any], work: Mapping[str, Work], ceilings: Ceilings, *, on_cuda: bool
    ) -> Table:
        """Of the events inside a step; work  as of work_by_name."""
        events = list(events)
        steps = steps_of(events)
        spans = [(e.time_range.start, e.time_range.end) for e in steps]
        inside = (e for e in events if any(a <= e.time_range.start < b for a, b in spans))
        spent = list(_kernel_times(inside) if on_cuda else _op_times(steps))
        times, count = defaultdict(list), max(len(steps), 1)
        for name, us in spent:
            times[name].append(us)
        short = [us for _, us in spent if us < SHORT_US]
        rows = []
        for name, each in times.items():
            ms, its = sum(each) / count / 1e3, work.get(name)
            share = ceilings.share(its, ms) if its else None
            rows.append(Row(name, ms, len(each) / count, *(its or (None, None)), share))
        return cls(
            step_ms=sum(b - a for a, b in spans) / count / 1e3,
            busy_ms=sum(us for _, us in spent) / count / 1e3,
            calls=len(spent) / count,
            short_ms=sum(short) / count / 1e3 if on_cuda else None,
            short_calls=len(short) / count if on_cuda else None,
            ceilings=ceilings,
            rows=tuple(sorted(rows, key=lambda row: -row.ms)),
        )

    def head(self) -> str:
        what = "ops" if self.short_calls is None else "kernels"
        line = f"{self.step_ms:.2f} ms a step, {self.busy_ms:.2f} ms in {self.calls:.0f} {what}"
        if self.short_calls is None:
            return line
        share = self.short_ms / self.busy_ms if self.busy_ms else 0.0
        return f"{line}, {share:.1%} of it in {self.short_calls:.0f} under {SHORT_US:g} us"

    def lines(self, top: int | None = None) -> list[str]:
        """Columns; names are cut."""
        out = ["ms/step   share  calls    GFLOP       MB  TFLOP/s     GB/s  ceiling  name"]
        for row in self.rows[:top]:
            share = row.ms / self.busy_ms if self.busy_ms else 0.0
            rate = 1e3 / row.ms if row.ms else 0.0
            gflop = None if not row.flops else row.flops / 1e9
            mb = None if row.bytes is None else row.bytes / 1e6
            out.append(
                f"{row.ms:7.3f} {share:7.1%} {row.calls:6.0f} {_cell(gflop)} {_cell(mb)} "
                f"{_cell(gflop and gflop * rate / 1e3)} {_cell(mb and mb * rate / 1e3)} "
                f"{'-' if row.ceiling is None else f'{row.ceiling:.0%}':>8}  {row.name[:110]}"
            )
        return out


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.2f}':>8}"


def _kernel_times(events: Iterable[Any]) -> Iterator[tuple[str, float]]:
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            yield event.name, event.time_range.elapsed_us()


def _op_times(steps: Iterable[Any]) -> Iterator[tuple[str, float]]:
    """A known op's whole time; another op's without the ops that it calls."""
    for event, work in known_ops(steps):
        if event.name != STEP:
            yield event.name, event.self_cpu_time_total if work is None else event.cpu_time_total
