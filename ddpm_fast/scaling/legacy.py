"""A result under the original repository's field names (its benchmark_results.json).

single_gpu is the row of one rank, multi_gpu the weak row of the largest measured world.
"""

from __future__ import annotations

import statistics
from typing import Any

from ddpm_fast.scaling.result import memory_of


def legacy_view(result: dict[str, Any]) -> dict[str, Any]:
    """The original's JSON; a side that was not measured is None, as in a run that skipped it.

    memory_history holds a peak a rank, where the original's held samples over the steps;
    avg_loss is rank 0's last loss and loss_std None, as losses are not read in a timed window.
    """
    weak = [row for row in result["rows"] if row["mode"] == "weak"]
    single = next((row for row in weak if row["world_size"] == 1), None)
    multi = max((row for row in weak if row["world_size"] > 1),
                key=lambda row: row["world_size"], default=None)  # fmt: skip
    view: dict[str, Any] = {
        "benchmark_timestamp": result["created"],
        "single_gpu": _side(single),
        "multi_gpu": _side(multi),
    }
    if single and multi:
        ratio = multi["images_per_s"] / single["images_per_s"]
        view["speedup_analysis"] = {
            "time_speedup": ratio,  # for the same number of images
            "throughput_speedup": ratio,
            "efficiency_per_gpu": ratio / multi["world_size"],
        }
    return view


def _side(row: dict[str, Any] | None) -> dict[str, Any] | None:
    if row is None:
        return None
    n, steps = row["world_size"], row["steps_per_window"]
    images = n * row["batch_per_rank"] * steps
    seconds = [images / rate for rate in row["window_images_per_s"]]
    return {
        "total_time_seconds": sum(seconds),
        "avg_batch_time_seconds": statistics.fmean(seconds) / steps,
        "throughput_samples_per_second": row["images_per_s"],
        "total_samples": images * len(seconds),
        "total_steps": steps * len(seconds),
        "avg_loss": row["loss"],
        "loss_std": None,
        "gpu_count": n,
        "device_ids": list(range(n)),
        "memory_history": [
            {f"gpu_{rank['rank']}": {"max_memory_gb": memory_of(rank)}}
            for rank in row["peak_memory"]
        ],
    }
