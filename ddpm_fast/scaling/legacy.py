"""A result under the original repository's field names (its benchmark_results.json).

single_gpu is the row of one rank, multi_gpu the weak row of the largest measured world.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ddpm_fast.scaling.result import memory_of


def legacy_view(result: dict[str, Any]) -> dict[str, Any]:
    """The original's JSON; a side that was not measured is None, as in a run that skipped it.

    memory_history is the monitor's samples, with their number as the step: allocated is what NVML
    says is in use of the whole GPU, reserved and max are the rank's peaks. avg_loss is rank 0's
    last loss and loss_std None, as losses are not read in a timed window.
    """
    weak = [row for row in result["rows"] if row["mode"] == "weak"]
    single = next((row for row in weak if row["world_size"] == 1), None)
    multi = max((row for row in weak if row["world_size"] > 1),
                key=lambda row: row["world_size"], default=None)  # fmt: skip
    view: dict[str, Any] = {
        "benchmark_timestamp": result["created"],
        "single_gpu": _side(single, result),
        "multi_gpu": _side(multi, result),
    }
    if single and multi:
        ratio = multi["images_per_s"] / single["images_per_s"]
        view["speedup_analysis"] = {
            "time_speedup": ratio,  # for the same number of images
            "throughput_speedup": ratio,
            "efficiency_per_gpu": ratio / multi["world_size"],
        }
    return view


def _side(row: dict[str, Any] | None, result: dict[str, Any]) -> dict[str, Any] | None:
    if row is None:
        return None
    n, steps = row["world_size"], row["steps_per_window"]
    images = n * row["batch_per_rank"] * steps
    seconds = [images / rate for rate in row["window_images_per_s"]]
    return {
        "total_time_seconds": sum(seconds),
        "total_time_minutes": sum(seconds) / 60,
        "avg_batch_time_seconds": statistics.fmean(seconds) / steps,
        "throughput_samples_per_second": row["images_per_s"],
        "total_samples": images * len(seconds),
        "total_steps": steps * len(seconds),
        "avg_loss": row["loss"],
        "loss_std": None,
        "gpu_count": n,
        "device_ids": [rank["rank"] for rank in row["peak_memory"]],
        "memory_history": _memory_history(row, result["samples"]),
    }


def _memory_history(row: dict[str, Any], samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """An entry for each time at which the devices were read while this world ran.

    CPU processes share the machine's memory: it stands under the first of them.
    """
    times: dict[float, list[dict[str, Any]]] = {}
    for sample in samples:
        if sample["world_size"] == row["world_size"] and sample["memory_gib"] is not None:
            times.setdefault(sample["seconds"], []).append(sample)
    history = []
    for step, read in enumerate(times.values()):
        entry: dict[str, Any] = {}
        for sample in read:
            number = sample["device"].removeprefix("GPU ")
            rank = int(number) if number.isdigit() else 0
            peak = row["peak_memory"][rank] if rank < len(row["peak_memory"]) else {}
            entry[f"gpu_{rank}"] = {
                "memory_allocated_gb": sample["memory_gib"],
                "memory_reserved_gb": peak.get("reserved_gib"),
                "max_memory_gb": memory_of(peak) if peak else None,
            }
        total = sum(sample["memory_gib"] for sample in read)
        history.append({**entry, "total_memory_gb": total, "step": step})
    return history
