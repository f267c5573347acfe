"""From options to a result: world sizes one after the other, each in processes of its own."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from ddpm_fast.errors import UsageError
from ddpm_fast.runtime import host
from ddpm_fast.runtime.gpus import visible_gpus
from ddpm_fast.runtime.monitor import Monitor, every_reading
from ddpm_fast.scaling.assemble import add_predictions, measured_parts
from ddpm_fast.scaling.interconnects import interconnect_of
from ddpm_fast.scaling.launch import read_ranks, run_world
from ddpm_fast.scaling.live import LiveView
from ddpm_fast.scaling.machine import describe, versions
from ddpm_fast.scaling.options import ScalingOptions, check_divides, dividing
from ddpm_fast.scaling.result import SCHEMA, rank_word

WATCHING = 0.05  # share of this process's time for sampling: it waits, the ranks are others
MOST_SAMPLES = 2000  # kept in a result


def choose_worlds(options: ScalingOptions, notes: list[str] | None = None) -> list[int]:
    """World sizes in order; UsageError where the machine has fewer GPUs. Never CPU unasked.

    notes  takes a line on the default sizes that were left out; one that was named is an error
    """
    count = host.cores() if options.backend == "gloo" else _gpus()
    asked = sorted(set(options.gpus))
    if options.backend != "gloo" and (not count or max(asked, default=1) > count):
        raise UsageError(_too_few(asked, count))
    if asked:
        check_divides(options, asked)
        return asked
    worlds, note = dividing(options, powers_of_two(count))
    if note and notes is not None:
        notes.append(note)
    return worlds


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _too_few(asked: list[int], count: int) -> str:
    """What is there, and what may be asked for instead: sizes of more than one are PREDICTED."""
    import torch

    more = _listed([n for n in asked if n > max(1, count)] or [8])
    given = f"--gpus {_listed(asked)}" if asked else "--backend nccl"
    if count:
        has = f"{count} CUDA GPU{'s' * (count > 1)}"
        use = f"--gpus {_listed(powers_of_two(count))} --predict {more}"
    else:
        has, use = "no CUDA GPU", f"--backend gloo --gpus 1,2 --predict {more} (CPU processes)"
    return (
        f"{given}: this machine has {has} that torch {torch.__version__} can use; allowed here, "
        f"predicting what cannot be measured: {use}"
    )


def powers_of_two(count: int) -> list[int]:
    """1, 2, 4, ... up to count, and count itself."""
    return sorted({2**i for i in range(count.bit_length())} | {count}) if count else []


def _listed(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


def measure(options: ScalingOptions, console: Console) -> dict[str, Any]:
    """Measure every world size; after a failure what was measured before is in the result."""
    started = time.monotonic()
    notes: list[str] = []
    worlds = choose_worlds(options, notes)
    gloo = options.backend == "gloo"
    result = _header(options, gloo) | {"notes": notes}
    threads = max(1, host.cores() // max(worlds)) if gloo else None
    if gloo:
        notes.append(
            f"ranks are CPU processes of {threads} thread{'s' * (threads > 1)} each; "
            "their scaling says nothing of GPUs"
        )
        if max(worlds) > host.cores():
            notes.append(f"more processes than this machine's {host.cores()} cores")
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > host.cores() / 2:
        notes.append(f"the machine was busy before: a load of {load:.1f} on {host.cores()} cores")
    ranks: list[list[dict[str, Any]]] = []
    windows = sum(len(_batches(options, n)) for n in worlds) * options.windows
    with (
        tempfile.TemporaryDirectory(prefix="ddpm-fast-scaling-") as work,
        LiveView(console, word=rank_word(result), windows=windows) as view,
    ):
        for n in worlds:
            view.world(n)
            folder = Path(work) / f"world-{n}"
            offset = time.monotonic() - started
            with Monitor({} if gloo else visible_gpus(range(n)), budget=WATCHING) as monitor:

                def on_poll(events, monitor=monitor):
                    for event in events:
                        view.event(event)
                    view.refresh(monitor.latest())

                found = run_world(
                    folder, _spec(options, n, worlds), n, time_limit=options.time_limit,
                    threads=threads, on_poll=on_poll,
                )  # fmt: skip
            if monitor.why_not and not gloo and monitor.why_not not in notes:
                notes.append(monitor.why_not)
            for sample in monitor.samples:
                row = {**asdict(sample), "seconds": sample.seconds + offset, "world_size": n}
                result["samples"].append(row)
            ranks.append(read_ranks(folder, n))
            result["failures"] += found
            if found:
                if skipped := [m for m in worlds if m > n]:
                    notes.append(f"not measured after the failure: N = {_listed(skipped)}")
                break
    result |= measured_parts(ranks, options.strong_batch)
    result["samples"] = thinned(result["samples"])
    add_predictions(result, sorted(set(options.predict)), _interconnect(options, result))
    result["seconds"] = time.monotonic() - started
    return result


def thinned(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """About MOST_SAMPLES of them, evenly, each reading with all its devices."""
    every = max(1, -(-len(samples) // MOST_SAMPLES))
    return every_reading(every, samples, lambda row: (row["world_size"], row["seconds"]))


def _header(options: ScalingOptions, gloo: bool) -> dict[str, Any]:
    precision = options.precision
    if precision == "auto":
        precision = "fp32" if gloo else "bf16"
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "kind": "cpu-processes" if gloo else "gpu",
        "backend": options.backend,
        "preset": options.net,
        "precision": precision,
        "compile": options.compile,
        "demo": options.demo,
        "batch_per_rank": options.batch,
        "global_batch": options.strong_batch,
        "versions": versions(),
        "machine": describe(gpus=not gloo),
        "model": None, "predicted": [], "failures": [], "samples": [],
    }  # fmt: skip


def _batches(options: ScalingOptions, n: int) -> dict[str, int]:
    """Mode -> images a rank; a strong step that is the weak one is measured once, as weak."""
    strong = options.strong_batch // n
    return {"weak": options.batch, **({"strong": strong} if strong != options.batch else {})}


def _spec(options: ScalingOptions, n: int, worlds: list[int]) -> dict[str, Any]:
    """What the workers of a world are told. The smallest also times the other strong batches."""
    batches = _batches(options, n)
    others = {options.strong_batch // m for m in worlds} - set(batches.values())
    precision = options.precision
    if precision == "auto":
        precision = "fp32" if options.backend == "gloo" else "bf16"
    return {
        "backend": options.backend,
        "preset": options.net,
        "precision": precision,
        "compile": options.compile,
        "batches": batches,
        "alone_batches": sorted(others, reverse=True) if n == min(worlds) else [],
        "windows": options.windows,
        "window_s": options.seconds_a_window,
    }


def _interconnect(options: ScalingOptions, result: dict[str, Any]) -> str | None:
    """The one asked for; where no all-reduce was measured, the one of this kind of GPU."""
    if options.interconnect or options.backend == "gloo" or result["all_reduce"]:
        return options.interconnect
    devices = result["machine"]["devices"]
    return interconnect_of(devices[0]) if devices else None
