"""From measured rows to a model of the step, and from the model to rows that were not measured.

T_n(b) = data + optimizer + slowdown * straggler(n) * compute(b) + exposed communication(n, b)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ddpm_fast.scaling.alpha_beta import (
    Link,
    LinkFit,
    all_reduce_seconds,
    exposed_seconds,
    fit_line,
    fit_link,
    ready_times,
    straggler_factor,
)
from ddpm_fast.scaling.interconnects import Interconnect
from ddpm_fast.scaling.result import base_row
from ddpm_fast.scaling.simulate import simulate_step

MOST_SIMULATED = 64  # ranks: beyond, a ring's messages take minutes
SEEDS = 4  # simulated steps, each with other stragglers


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """The parts of the formula, each measured unless `assumed` says otherwise.

    compute    (fixed_s, per_image_s) of one rank alone;  slowdown  mean compute of the ranks of
               the largest measured world over that of one alone: shared cores, memory, power
    jitter     standard deviation / mean of a rank's step time
    link       n -> Link
    """

    compute: tuple[float, float]
    data_s: float
    optimizer_s: float
    backward_share: float
    slowdown: float
    jitter: float
    buckets: tuple[int, ...]
    link: Callable[[int], Link]
    link_source: str
    algorithms: tuple[str, ...]
    assumed: tuple[str, ...] = field(default=())

    def compute_s(self, batch: float) -> float:
        return self.compute[0] + self.compute[1] * batch

    def step(self, n: int, batch: float, *, slowdown: float | None = None) -> dict[str, float]:
        """Seconds of a step of n ranks with `batch` images each, and of its parts."""
        slow = 1.0 if n == 1 else self.slowdown if slowdown is None else slowdown
        compute_s = self.compute_s(batch) * slow * straggler_factor(self.jitter, n)
        backward_s = compute_s * self.backward_share
        bucket_s = [0.0] * len(self.buckets)
        if n > 1:
            link = self.link(n)
            bucket_s = [all_reduce_seconds(b, n, link, self.algorithms) for b in self.buckets]
        exposed = exposed_seconds(bucket_s, ready_times(self.buckets, backward_s), backward_s)
        return {
            "step_s": self.data_s + self.optimizer_s + compute_s + exposed,
            "compute_s": compute_s,
            "exposed_s": exposed,
            "communication_s": sum(bucket_s),
        }

    def simulated_step_s(self, n: int, batch: float) -> float | None:
        """The same by discrete events with drawn stragglers; None for more ranks than it takes."""
        if n == 1 or n > MOST_SIMULATED:
            return None
        link, compute_s = self.link(n), self.compute_s(batch) * self.slowdown
        total = sum(self.buckets)
        algorithm = min(
            self.algorithms, key=lambda name: all_reduce_seconds(total, n, link, (name,))
        )
        rng = np.random.default_rng(0)
        seconds = [
            simulate_step(
                forward_s=compute_s * (1 - self.backward_share),
                backward_s=compute_s * self.backward_share,
                buckets=self.buckets,
                link=link,
                factors=np.maximum(0.5, rng.normal(1, self.jitter, n)).tolist(),
                algorithm=algorithm,
            )
            for _ in range(SEEDS)
        ]
        return self.data_s + self.optimizer_s + float(np.mean(seconds))


def fit_links(measured: Sequence[dict[str, Any]]) -> dict[int, LinkFit]:
    """World size -> link, from rows of {world_size, bytes, seconds}; sizes that fit nothing go."""
    fits = {}
    for n in sorted({row["world_size"] for row in measured}):
        rows = [row for row in measured if row["world_size"] == n]
        try:
            fits[n] = fit_link([r["bytes"] for r in rows], [r["seconds"] for r in rows], n)
        except ValueError:
            continue
    return fits


def extrapolated(fits: dict[int, LinkFit]) -> Callable[[int], Link]:
    """The link fitted at n, else at the nearest smaller world, else at the smallest."""

    def link(n: int) -> Link:
        smaller = [size for size in fits if size <= n]
        return fits[max(smaller) if smaller else min(fits)].link

    return link


def make_model(
    result: dict[str, Any], preset: Interconnect | None = None
) -> tuple[StepModel | None, str]:
    """The model of a result's measured rows, or None and why there is none.

    preset  an interconnect that takes the place of the measured all-reduces
    """
    alone = result["compute_alone"]
    if not result["rows"] or not alone:
        return None, "no model: it needs the smallest world of --gpus to be measured"
    fits = fit_links(result["all_reduce"])
    assumed: list[str] = []
    if preset is not None:
        link, source = preset.link, preset.source
        assumed.append("the interconnect is published figures, not this machine's")
    elif fits:
        link = extrapolated(fits)
        source = f"fitted on all-reduces among {' and '.join(map(str, fits))} ranks"
        assumed.append(f"more than {max(fits)} ranks see the link that {max(fits)} saw")
    else:
        return (
            None,
            "no model: no all-reduce was measured; --interconnect NAME gives published ones",
        )
    rows, base = result["rows"], result["rows"][0]
    compute = fit_line([r["batch"] for r in alone], [r["seconds"] for r in alone])
    slowdowns = measured_slowdowns(rows, compute)
    if not slowdowns:
        assumed.append("ranks do not slow each other down: one world size was measured")
    if len({row["batch"] for row in alone}) < 2:
        assumed.append("compute grows with the batch from 0: one batch size was measured")
    return StepModel(
        compute=compute,
        data_s=base["split_ms"]["data"] / 1e3,
        optimizer_s=base["split_ms"]["optimizer"] / 1e3,
        backward_share=result["backward_share"],
        slowdown=max(1.0, slowdowns[max(slowdowns)]) if slowdowns else 1.0,
        jitter=result["jitter"],
        buckets=tuple(result["bucket_bytes"]),
        link=link,
        link_source=source,
        algorithms=("ring",) if result["backend"] == "gloo" else ("ring", "tree"),
        assumed=tuple(assumed),
    ), ""


def measured_slowdowns(
    rows: Sequence[dict[str, Any]], compute: tuple[float, float]
) -> dict[int, float]:
    """World size -> compute of its weak row over that of one rank alone with the same batch."""
    return {
        row["world_size"]: row["split_ms"]["compute"]
        / 1e3
        / (compute[0] + compute[1] * row["batch_per_rank"])
        for row in rows
        if row["world_size"] > 1 and row["mode"] == "weak"
    }


def residuals(model: StepModel, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """(model - measured) / measured step time of each row; fitted and tested on the same run."""
    slowdowns = measured_slowdowns(rows, model.compute)
    out = []
    for row in rows:
        n, batch = row["world_size"], row["batch_per_rank"]
        step_ms = model.step(n, batch, slowdown=slowdowns.get(n))["step_s"] * 1e3
        out.append({
            "mode": row["mode"], "world_size": n, "measured_ms": row["step_ms"],
            "model_ms": step_ms, "relative": step_ms / row["step_ms"] - 1,
        })  # fmt: skip
    return out


def predicted_rows(
    model: StepModel, result: dict[str, Any], worlds: Sequence[int]
) -> list[dict[str, Any]]:
    """PREDICTED rows, weak and, where the batch can be divided, strong."""
    out = []
    for n in worlds:
        for mode in ("weak", "strong"):
            base = base_row(result["rows"], mode, result["global_batch"])
            total = result["batch_per_rank"] * n if mode == "weak" else result["global_batch"]
            if total % n:
                continue
            parts = model.step(n, total // n)
            rate = total / parts["step_s"]
            speedup = rate / base["images_per_s"] * base["world_size"]
            simulated = model.simulated_step_s(n, total // n)
            link = model.link(n)
            out.append({
                "label": "PREDICTED", "mode": mode, "world_size": n, "batch_per_rank": total // n,
                "images_per_s": rate, "step_ms": parts["step_s"] * 1e3, "speedup": speedup,
                "efficiency": speedup / n,
                "exposed_communication_ms": parts["exposed_s"] * 1e3,
                "communication_ms": parts["communication_s"] * 1e3,
                "simulated_step_ms": None if simulated is None else simulated * 1e3,
                "inputs": {
                    "alpha_us": link.alpha_s * 1e6, "base_us": link.base_s * 1e6,
                    "bus_gbytes_per_s": link.beta_bytes_per_s / 1e9,
                    "compute_fixed_ms": model.compute[0] * 1e3,
                    "compute_ms_per_image": model.compute[1] * 1e3,
                    "slowdown": model.slowdown, "jitter": model.jitter,
                    "backward_share": model.backward_share,
                },
            })  # fmt: skip
    return out
