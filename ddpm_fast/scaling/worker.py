"""One rank, started by torchrun: times its step and its parts, and writes what it found.

python -m torch.distributed.run ... -m ddpm_fast.scaling.worker SPEC.json (see launch.py).
After each phase rank-<r>.json is replaced by a fuller one, so that a rank that dies leaves what
was measured before.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ddpm_fast.runtime import host
from ddpm_fast.runtime.device import set_tf32
from ddpm_fast.runtime.gpus import nvml_uuid
from ddpm_fast.runtime.monitor import EnergyMeter
from ddpm_fast.scaling.alpha_beta import bucket_sizes
from ddpm_fast.scaling.ddp_step import DdpStep

WARM_UP_STEPS = 3  # at least; DDP builds the buckets that it keeps before the third
REPEATS = 5  # of each all-reduce and of each part; the median counts
ALONE_WINDOWS = 3  # of a batch that is timed without communication only
STEADY, MOST_WARM_UPS = 0.1, 10  # all-reduces are warm when two windows differ by less
REDUCE_WINDOW_S, MOST_REDUCES = 0.02, 100  # so that small ones are not timed by threes
SMALL_BYTES = (4 * 2**10, 64 * 2**10, 2**20)
TIMEOUT = timedelta(seconds=120)  # a rank that waits for a dead one gives up


class Worker:
    """A rank and the file in which it collects what it measures."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec, self.folder = spec, Path(spec["folder"])
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.on_gpu = spec["backend"] == "nccl"
        local = int(os.environ["LOCAL_RANK"])
        self.device = torch.device("cuda", local) if self.on_gpu else torch.device("cpu")
        if self.on_gpu:
            torch.cuda.set_device(self.device)
            set_tf32()
        dist.init_process_group(
            spec["backend"], timeout=TIMEOUT, device_id=self.device if self.on_gpu else None
        )
        self.memory = {"start": self.memory_now()}
        self.step = DdpStep(
            preset=spec["preset"], device=self.device, rank=self.rank, world_size=self.world_size,
            bf16=spec["precision"] == "bf16", compile=spec["compile"],
        )  # fmt: skip
        self.memory["net"] = self.memory_now()
        self.meter = EnergyMeter(self.uuid()) if self.on_gpu else None
        self.found: dict[str, Any] = {
            "rank": self.rank, "world_size": self.world_size,
            "parameters": sum(p.numel() for p in self.step.parameters),
            "bucket_bytes": [], "phases": {}, "all_reduce": [],
            "compute_alone": [],
        }  # fmt: skip

    def uuid(self) -> str:
        return nvml_uuid(torch.cuda.get_device_properties(self.device).uuid)

    def run(self) -> None:
        self.say(what="warming up" + " and compiling" * self.spec["compile"])
        self.warm_up(next(iter(self.spec["batches"].values())))
        self.found["bucket_bytes"] = bucket_sizes(self.step.arrival_bytes())
        if self.world_size > 1:
            self.found["all_reduce"] = self.all_reduces()
            self.write()
        for mode, batch in self.spec["batches"].items():
            self.found["phases"][mode] = self.phase(mode, batch)
            self.write()
        for batch in self.spec["alone_batches"]:
            self.say(what=f"compute alone, batch {batch}")
            self.warm_up(batch)
            count = self.steps_for(self.spec["window_s"])
            windows = [self.window(self.step.alone, count) for _ in range(ALONE_WINDOWS)]
            parts = self.part_seconds(self.step.load) + self.part_seconds(self.step.update)
            seconds = statistics.median(windows) / count - parts
            row = {"batch": batch, "seconds": max(1e-9, seconds)}
            self.found["compute_alone"].append(row)
            self.write()
        self.say(what="done")

    def phase(self, mode: str, batch: int) -> dict[str, Any]:
        """Windows with and without communication in turn, then the parts of a step apart."""
        step, spec = self.step, self.spec
        self.say(what=f"{mode}: warming up")
        own_peak = self.forget_peak()
        self.warm_up(batch)
        self.memory |= {part: self.memory_now() for part in step.parts()}
        count = self.steps_for(spec["window_s"])
        windows, alone, alone_steps = [], [], []
        if self.meter:
            self.meter.joules = None if self.meter.joules is None else 0.0
        for number in range(spec["windows"]):
            windows.append(self.window(step.synced, count, measured=True))
            rate = self.world_size * batch * count / windows[-1]
            self.say(what=mode, window=number + 1, images_per_s=rate)
            if self.world_size > 1:
                alone.append(self.window(step.alone, count, each=alone_steps))
        if self.world_size == 1:
            alone = windows
            self.window(step.alone, count, each=alone_steps)
        data_s, optimizer_s = self.part_seconds(step.load), self.part_seconds(step.update)
        return {
            "batch": batch,
            "steps_per_window": count,
            "window_s": windows,
            "alone_window_s": alone,
            "alone_step_s": alone_steps[:200],
            "compute_s": max(1e-9, statistics.median(alone) / count - data_s - optimizer_s),
            "forward_s": self.part_seconds(step.forward_pass) - data_s,
            "data_s": data_s,
            "optimizer_s": optimizer_s,
            "communication_s": self.communication_s(),
            "joules": self.meter.joules if self.meter else None,
            "loss": float(step.last_loss),
            "memory": self.peak_memory(),
            "peak_memory_since": "phase" if own_peak else "start",
            "memory_phases_gib": {**self.memory, "peak": self.memory_now(peak=True)},
        }

    def warm_up(self, batch: int) -> None:
        self.step.set_batch(batch)
        for number in range(WARM_UP_STEPS):
            self.step.synced()
            if number == 0:
                self.memory["first step"] = self.memory_now()
        for _ in range(2):
            self.step.alone()

    def steps_for(self, seconds: float) -> int:
        """How many steps fill that time: rank 0's answer, on every rank."""
        took = self.window(self.step.synced, 2) / 2
        count = torch.tensor(max(2, round(seconds / took)), device=self.device)
        dist.broadcast(count, 0)
        return int(count)

    def window(
        self,
        run: Callable[[], None],
        count: int,
        *,
        measured: bool = False,
        each: list[float] | None = None,
    ) -> float:
        """Seconds of `count` steps, all ranks starting together; of each one into `each`."""
        self.step.wait()
        dist.barrier()
        if measured and self.meter:
            with self.meter.measuring():
                return self.timed(run, count, each)
        return self.timed(run, count, each)

    def timed(self, run: Callable[[], None], count: int, each: list[float] | None) -> float:
        marks = []
        start = time.perf_counter()
        for _ in range(count):
            if each is not None:
                marks.append(self.mark())
            run()
        if each is not None:
            marks.append(self.mark())
        self.step.wait()
        seconds = time.perf_counter() - start
        if each is not None:
            each += [_between(a, b) for a, b in zip(marks, marks[1:], strict=False)]
        return seconds

    def mark(self) -> float | torch.cuda.Event:
        """A point in time: on a GPU one in its own queue, which nobody waits for."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def part_seconds(self, part: Callable[[], Any]) -> float:
        """Median seconds of a part on its own."""
        part()
        times = []
        for _ in range(REPEATS):
            self.step.wait()
            start = time.perf_counter()
            for _ in range(3):
                part()
            self.step.wait()
            times.append((time.perf_counter() - start) / 3)
        return statistics.median(times)

    def communication_s(self) -> float:
        """All buckets' all-reduces, one after the other, with nothing else running."""
        if self.world_size == 1:
            return 0.0
        sizes = self.found["bucket_bytes"]
        buckets = [torch.zeros(size // 4, device=self.device) for size in sizes]
        return self.reduce_seconds(buckets)

    def all_reduces(self) -> list[dict[str, Any]]:
        """Seconds of all-reduces of single tensors, from 4 KiB to the whole gradient."""
        self.say(what="all-reduces")
        whole = sum(self.found["bucket_bytes"])
        rows = []
        for size in sorted({*SMALL_BYTES, *self.found["bucket_bytes"], whole}):
            tensor = torch.zeros(size // 4, device=self.device)
            rows.append({"bytes": size // 4 * 4, "seconds": self.reduce_seconds([tensor])})
        return rows

    def reduce_seconds(self, tensors: list[torch.Tensor]) -> float:
        """Median over REPEATS, of the slowest rank, once two windows in turn agree."""

        def reduce() -> None:
            for tensor in tensors:
                dist.all_reduce(tensor)

        before = float("inf")
        for _ in range(MOST_WARM_UPS):
            now = self.slowest(self.window(reduce, 3) / 3)  # alike on all ranks, so all go on alike
            if abs(now / before - 1) < STEADY:
                break
            before = now
        count = max(3, min(MOST_REDUCES, round(REDUCE_WINDOW_S / now)))
        times = [self.window(reduce, count) / count for _ in range(REPEATS)]
        return self.slowest(statistics.median(times))

    def slowest(self, seconds: float) -> float:
        """The most of any rank, on every rank."""
        most = torch.tensor(seconds, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return float(most)

    def memory_now(self, *, peak: bool = False) -> float:
        """GiB: of the GPU's allocator, on CPU of the process."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
            ask = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
            return ask(self.device) / 2**30
        return host.process_gib()[1 if peak else 0]

    def forget_peak(self) -> bool:
        """Begin a phase; whether its peak is going to be its own, and not that of any before."""
        forgotten = host.forget_peak()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        return self.on_gpu or forgotten

    def peak_memory(self) -> dict[str, float | None]:
        gpu = {"allocated_gib": None, "reserved_gib": None}
        if self.on_gpu:
            gpu = {
                "allocated_gib": torch.cuda.max_memory_allocated(self.device) / 2**30,
                "reserved_gib": torch.cuda.max_memory_reserved(self.device) / 2**30,
            }
        return {**gpu, "process_gib": host.process_gib()[1] or None}

    def write(self) -> None:
        path = self.folder / f"rank-{self.rank}.json"
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(self.found))
        temporary.replace(path)

    def say(self, **event: Any) -> None:
        """A line for the parent's live view."""
        if self.rank == 0:
            with (self.folder / "progress.jsonl").open("a") as file:
                file.write(json.dumps(event) + "\n")


def _between(a: Any, b: Any) -> float:
    return b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3


def main(spec_path: str) -> None:
    spec = json.loads(Path(spec_path).read_text())
    folder, rank = Path(spec["folder"]), os.environ["RANK"]
    (folder / f"rank-{rank}.pid").write_text(str(os.getpid()))
    try:
        Worker(spec).run()
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        (folder / f"rank-{rank}.error").write_text(message)
        traceback.print_exc()
        sys.exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
