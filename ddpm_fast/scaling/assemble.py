"""From what each rank wrote to the rows of a result, and on to its predictions.

A step's split is by difference: exposed communication is what the slowest rank's steps take longer
than steps without communication, the median over pairs of windows timed one after the other;
compute is what data, optimizer and that leave of the median window's step.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpm_fast.scaling.interconnects import interconnect
from ddpm_fast.scaling.predict import fit_links, make_model, predicted_rows, residuals
from ddpm_fast.scaling.result import base_row

RESAMPLES = 2000
NORMAL_IQR = 1.349  # interquartile range of a normal distribution, in standard deviations


def median_interval(values: Sequence[float], *, share: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the median; the same for the same values.

    Of 5 values it is in effect from the least to the most, which holds the median of what they were
    drawn from in 94 of 100 runs (1 - 2 / 2**5).
    """
    rng = np.random.default_rng(0)
    drawn = rng.choice(np.asarray(values, float), (RESAMPLES, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def relative_spread(values: Sequence[float]) -> float:
    """Interquartile range as a normal's standard deviation, over the median; 0 for one value."""
    low, middle, high = np.quantile(np.asarray(values, float), [0.25, 0.5, 0.75])
    return float((high - low) / NORMAL_IQR / middle)


def measured_row(mode: str, ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row from the same phase of every rank; speedup and efficiency are filled in later."""
    phases = [rank["phases"][mode] for rank in ranks]
    first, n = phases[0], len(ranks)
    steps, images = first["steps_per_window"], n * first["batch"] * first["steps_per_window"]
    windows = [max(times) for times in zip(*(p["window_s"] for p in phases), strict=True)]
    rates = [images / seconds for seconds in windows]
    rate = images * len(windows) / sum(windows)
    low, high = median_interval(rates)
    step_s = statistics.median(windows) / steps
    alone = [max(times) for times in zip(*(p["alone_window_s"] for p in phases), strict=True)]
    of_ranks = [statistics.median(p["alone_window_s"]) for p in phases]
    communication_s = max(p["communication_s"] for p in phases)
    data_s, optimizer_s = (max(p[key] for p in phases) for key in ("data_s", "optimizer_s"))
    joules = [p["joules"] for p in phases]
    peaks_since = [p["peak_memory_since"] for p in phases]
    exposed_s = 0.0
    if n > 1:
        pairs = zip(windows, alone, strict=True)
        exposed_s = statistics.median(synced - own for synced, own in pairs) / steps
    # No part is negative. One that would be makes the sum another than the step, and that is told.
    split = {
        "compute": step_s - exposed_s - data_s - optimizer_s,
        "exposed_communication": exposed_s,
        "overlapped_communication": communication_s - max(0.0, exposed_s),
        "data": data_s,
        "optimizer": optimizer_s,
    }
    return {
        "mode": mode,
        "world_size": n,
        "batch_per_rank": first["batch"],
        "window_images_per_s": rates,
        "images_per_s": rate,
        "images_per_s_low": min(low, rate),
        "images_per_s_high": max(high, rate),
        "step_ms": step_s * 1e3,
        "steps_per_window": steps,
        "split_ms": {name: max(0.0, seconds) * 1e3 for name, seconds in split.items()},
        "communication_ms": communication_s * 1e3,
        "skew": max(of_ranks) / min(of_ranks),
        "peak_memory": [{"rank": r, **phase["memory"]} for r, phase in enumerate(phases)],
        "peak_memory_since": "start" if "start" in peaks_since else "phase",
        "memory_phases_gib": first["memory_phases_gib"],
        "joules_per_image": None if None in joules else sum(joules) / (images * len(windows)),
        "loss": first["loss"],
    }


def add_speedups(rows: list[dict[str, Any]], global_batch: int) -> None:
    """Speedup and efficiency with their intervals, and Karp and Flatt's (1990) serial fraction.

    An interval is from the ends of both rows' that are farthest apart. The serial fraction is over
    one rank, so without a row of one there is none.
    """
    for row in rows:
        base, n = base_row(rows, row["mode"], global_batch), row["world_size"]
        others = base["world_size"]
        low, high = (1.0, 1.0) if row is base else (
            row["images_per_s_low"] / base["images_per_s_high"],
            row["images_per_s_high"] / base["images_per_s_low"],
        )  # fmt: skip
        speedup = row["images_per_s"] / base["images_per_s"] * others
        for name, ratio in (("", speedup), ("_low", low * others), ("_high", high * others)):
            row[f"speedup{name}"], row[f"efficiency{name}"] = ratio, ratio / n
        row["serial_fraction"] = None
        if row["mode"] == "strong" and n > 1 == others:
            row["serial_fraction"] = (1 / speedup - 1 / n) / (1 - 1 / n)


def _is_strong_too(row: dict[str, Any], global_batch: int) -> bool:
    """Whether a weak row's step is the strong one, which is then measured once.

    Of one rank it is the base of both modes (see base_row), and one row is enough.
    """
    return 1 < row["world_size"] == global_batch / row["batch_per_rank"]


def measured_parts(worlds: Sequence[Sequence[dict[str, Any]]], global_batch: int) -> dict[str, Any]:
    """The measured fields of a result from the ranks' files, a sequence for each world size.

    Worlds of which a rank wrote nothing, or lacks a phase, give what all ranks have. A weak phase
    whose whole batch is the strong rows' gives a row of each mode.
    """
    rows, all_reduce = [], []
    complete = [ranks for ranks in worlds if ranks and len(ranks) == ranks[0]["world_size"]]
    for ranks in sorted(complete, key=len):
        for mode in ("weak", "strong"):
            if all(mode in rank["phases"] for rank in ranks):
                rows.append(measured_row(mode, ranks))
                if mode == "weak" and _is_strong_too(rows[-1], global_batch):
                    rows.append(rows[-1] | {"mode": "strong"})
        for measured in ranks[0]["all_reduce"]:
            n = len(ranks)
            bus = measured["bytes"] / measured["seconds"] * 2 * (n - 1) / n / 1e9
            all_reduce.append({"world_size": n, **measured, "bus_gbytes_per_s": bus})
    add_speedups(rows, global_batch)
    parts = {"rows": rows, "all_reduce": all_reduce, "parameters": None,
             "bucket_bytes": [], "compute_alone": [], "backward_share": None,
             "jitter": None}  # fmt: skip
    smallest = min((r for r in complete if r[0]["phases"]), key=len, default=None)
    if smallest:
        rank, largest = smallest[0], max((r for r in complete if r[0]["phases"]), key=len)
        phase = next(iter(rank["phases"].values()))
        compute_s = phase["compute_s"]
        parts |= {
            "parameters": rank["parameters"],
            "bucket_bytes": rank["bucket_bytes"],
            "compute_alone": [{"batch": phase["batch"], "seconds": compute_s}]
            + rank["compute_alone"],
            "backward_share": min(1.0, max(0.0, 1 - phase["forward_s"] / compute_s)),
            "jitter": statistics.fmean(
                relative_spread(p["alone_step_s"]) for r in largest for p in r["phases"].values()
            ),
        }
    return parts


def add_predictions(
    result: dict[str, Any], worlds: Sequence[int], preset_name: str | None = None
) -> None:
    """Fit the model on the result's rows; write fits, residuals and PREDICTED rows into it."""
    preset = interconnect(preset_name) if preset_name else None
    model, why_not = make_model(result, preset)
    if model is None:
        if worlds:
            result["notes"].append(why_not)
        return
    fits = fit_links(result["all_reduce"])
    result["model"] = {
        "link_source": model.link_source,
        "fits": [
            {"world_size": n, "alpha_us": fit.link.alpha_s * 1e6,
             "bus_gbytes_per_s": fit.link.beta_bytes_per_s / 1e9, "rms_residual": fit.rms_residual}
            for n, fit in fits.items()
        ],
        "residuals": residuals(model, result["rows"]),
        "assumed": list(model.assumed),
    }  # fmt: skip
    result["predicted"] = predicted_rows(model, result, worlds)
    whole = [n for n in worlds if result["global_batch"] % n]
    if whole:
        result["notes"].append(
            f"no strong prediction for {', '.join(map(str, whole))}: a global batch of "
            f"{result['global_batch']} cannot be divided by it"
        )
