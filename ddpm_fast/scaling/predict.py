"""From measured rows to a model of the step, and from the model to rows that were not measured.

T_n(b) = data + optimizer + slowdown * straggler(n) * compute(b) + exposed communication(n, b)
E_n(b) = T_1(b) / T_n(b), both the model's: a measured T_1 would add the model's error to E.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ddpm_fast.scaling.alpha_beta import (
    ALGORITHMS,
    FITTED,
    Link,
    LinkFit,
    all_reduce_seconds,
    exposed_seconds,
    fit_line,
    fit_link,
    ready_times,
    straggler_factor,
)
from ddpm_fast.scaling.interconnects import INTERCONNECTS, Interconnect, interconnect_of
from ddpm_fast.scaling.result import base_row
from ddpm_fast.scaling.simulate import simulate_step

MOST_SIMULATED = 64  # ranks: beyond, a ring's messages take minutes
SIMULATED_RANKS = 512  # in all steps together; each step has other stragglers
LEAST_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """The parts of the formula, each measured unless `assumed` says otherwise.

    compute     (fixed_s, per_image_s) of one rank alone
    slowdowns   measured world size -> its slowest rank's compute over that of one alone: shared
                cores, memory, power
    jitter      standard deviation / mean of a rank's step time
    link        n -> Link
    algorithms  of which an all-reduce takes the cheapest; of a fitted link the one it was fitted as
    """

    compute: tuple[float, float]
    data_s: float
    optimizer_s: float
    backward_share: float
    slowdowns: Mapping[int, float]
    jitter: float
    buckets: tuple[int, ...]
    link: Callable[[int], Link]
    link_source: str
    algorithms: tuple[str, ...]
    assumed: tuple[str, ...] = field(default=())

    def compute_s(self, batch: float) -> float:
        return self.compute[0] + self.compute[1] * batch

    def slowdown(self, n: int) -> float:
        """Of the largest measured world within n, else of the smallest; of one rank 1.

        Less than 1 would be noise that a prediction takes for a gain.
        """
        if n == 1 or not self.slowdowns:
            return 1.0
        return max(1.0, self.slowdowns[_nearest_within(n, self.slowdowns)])

    def step(self, n: int, batch: float) -> dict[str, float]:
        """Seconds of a step of n ranks with `batch` images each, and of its parts."""
        compute_s = self.compute_s(batch) * self.slowdown(n) * straggler_factor(self.jitter, n)
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
        link, compute_s = self.link(n), self.compute_s(batch) * self.slowdown(n)
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
            for _ in range(max(LEAST_STEPS, SIMULATED_RANKS // n))
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
    return lambda n: fits[_nearest_within(n, fits)].link


def with_network(link: Callable[[int], Link], machine: Interconnect) -> Callable[[int], Link]:
    """A measured link, and beyond one machine of this kind at most what its network carries."""

    def slower(n: int) -> Link:
        measured, published = link(n), machine.link(n)
        if n <= machine.gpus:
            return measured
        return Link(
            alpha_s=max(measured.alpha_s, published.alpha_s),
            beta_bytes_per_s=min(measured.beta_bytes_per_s, machine.network_gbytes_per_s * 1e9),
            base_s=measured.base_s,
        )

    return slower


def _nearest_within(n: int, sizes: Iterable[int]) -> int:
    """The largest size up to n, else the smallest."""
    within = [size for size in sizes if size <= n]
    return max(within) if within else min(sizes)


def make_model(
    result: dict[str, Any], preset: Interconnect | None = None
) -> tuple[StepModel | None, str]:
    """The model of a result's measured rows, or None and why there is none.

    preset  an interconnect that takes the place of the measured all-reduces
    """
    rows, alone = result["rows"], result["compute_alone"]
    if not rows or not alone:
        return None, "no model: it needs the smallest world of --gpus to be measured"
    fits = fit_links(result["all_reduce"])
    compute = fit_line([r["batch"] for r in alone], [r["seconds"] for r in alone])
    slowdowns = measured_slowdowns(rows, compute)
    if preset is not None:
        link, source, algorithms = preset.link, preset.source, tuple(ALGORITHMS)
        assumed = ["the interconnect is published figures, not this machine's"]
    elif fits:
        link, assumed = _measured_link(fits, result)
        algorithms = FITTED
        source = f"fitted on all-reduces among {' and '.join(map(str, fits))} ranks"
    else:
        published = "--interconnect NAME gives published ones"
        processes = "measure at least 2 processes, as --gpus 1,2"
        advice = processes if result["backend"] == "gloo" else published
        return None, f"no model: no all-reduce was measured; {advice}"
    assumed += [_more_of_the_same(result), *_slowdown_assumed(slowdowns)]
    if len({row["batch"] for row in alone}) < 2:
        assumed.append("compute grows with the batch from 0: one batch size was measured")
    return StepModel(
        compute=compute,
        data_s=rows[0]["split_ms"]["data"] / 1e3,
        optimizer_s=rows[0]["split_ms"]["optimizer"] / 1e3,
        backward_share=result["backward_share"],
        slowdowns=slowdowns,
        jitter=result["jitter"],
        buckets=tuple(result["bucket_bytes"]),
        link=link,
        link_source=source,
        algorithms=algorithms,
        assumed=tuple(assumed),
    ), ""


def _more_of_the_same(result: dict[str, Any]) -> str:
    if result["kind"] == "gpu":
        return (
            "every further GPU is as the measured ones, with as much power, cooling, processor and "
            "memory for itself"
        )
    return (
        "every further process has a core and memory of its own as the measured ones, as if the "
        f"machine of {result['machine']['cores']} cores grew with them"
    )


def _slowdown_assumed(slowdowns: Mapping[int, float]) -> list[str]:
    if not slowdowns:
        return ["ranks do not slow each other down: one world size was measured"]
    most = max(slowdowns)
    return [
        f"among more than {most} ranks computing is as much slower than alone as among {most}: "
        f"{max(1.0, slowdowns[most]):.2f} times"
    ]


def _measured_link(
    fits: dict[int, LinkFit], result: dict[str, Any]
) -> tuple[Callable[[int], Link], list[str]]:
    """What was fitted, beyond one machine with the network of its kind; and what that assumes."""
    link, devices = extrapolated(fits), result["machine"]["devices"]
    said = [
        f"more than {max(fits)} ranks see the link that {max(fits)} saw, and sum by a ring, as "
        "which it was fitted"
    ]
    name = interconnect_of(devices[0]) if devices and result["kind"] == "gpu" else None
    if name is None:
        if result["kind"] == "gpu":
            said.append("machines are joined by links as fast as those within one")
        return link, said
    machine = INTERCONNECTS[name]
    said.append(
        f"more than {machine.gpus} GPUs are machines of {machine.gpus} joined by at most "
        f"{machine.network_gbytes_per_s:g} GB/s ({name}, published)"
    )
    return with_network(link, machine), said


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
    out = []
    for row in rows:
        n, batch = row["world_size"], row["batch_per_rank"]
        step_ms = model.step(n, batch)["step_s"] * 1e3
        out.append({
            "mode": row["mode"], "world_size": n, "measured_ms": row["step_ms"],
            "model_ms": step_ms, "relative": step_ms / row["step_ms"] - 1,
        })  # fmt: skip
    return out


def predicted_rows(
    model: StepModel, result: dict[str, Any], worlds: Sequence[int]
) -> list[dict[str, Any]]:
    """PREDICTED rows, weak and, where the batch can be divided, strong.

    Speedups are over the model's own step of the world that measured rows are compared with.
    """
    out = []
    for n in worlds:
        for mode in ("weak", "strong"):
            base = base_row(result["rows"], mode, result["global_batch"])
            total = result["batch_per_rank"] * n if mode == "weak" else result["global_batch"]
            if total % n:
                continue
            parts = model.step(n, total // n)
            rate, alone = total / parts["step_s"], base["world_size"]
            base_s = model.step(alone, base["batch_per_rank"])["step_s"]
            speedup = rate / (alone * base["batch_per_rank"] / base_s) * alone
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
                    "base_ranks": alone, "base_step_ms": base_s * 1e3,
                    "alpha_us": link.alpha_s * 1e6, "base_us": link.base_s * 1e6,
                    "bus_gbytes_per_s": link.beta_bytes_per_s / 1e9,
                    "compute_fixed_ms": model.compute[0] * 1e3,
                    "compute_ms_per_image": model.compute[1] * 1e3,
                    "slowdown": model.slowdown(n), "jitter": model.jitter,
                    "backward_share": model.backward_share,
                },
            })  # fmt: skip
    return out
