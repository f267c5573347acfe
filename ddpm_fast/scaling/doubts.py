"""Reasons to trust a result less than its figures look, found in the figures themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ddpm_fast.scaling.result import base_row, count, rank_word

SUM_OFF = 0.02  # of a step: parts are rounded by nothing, so more is a part that was cut at 0
MODEL_OFF = 0.2  # of a measured time: beyond, a prediction is a guess
NOISE = 0.1  # width of a row's interval


def doubts(result: dict[str, Any]) -> Iterator[str]:
    """A sentence each: a base of several ranks, parts that do not add up, a model that is off."""
    word = rank_word(result)
    for mode in ("weak", "strong"):
        rows = [row for row in result["rows"] if row["mode"] == mode]
        if rows and (n := base_row(result["rows"], mode, result["global_batch"])["world_size"]) > 1:
            yield f"{mode}: N = 1 was not measured; {count(n, word)} count as ideal"
    for row in result["rows"]:
        yield from _of_split(row, count(row["world_size"], word))
    if result["model"]:
        yield from _of_model(result["model"])


def noisy(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with the widest interval, if that is wide."""
    widest = max(rows, key=width, default=None)
    return widest if widest and width(widest) > NOISE else None


def width(row: dict[str, Any]) -> float:
    """Of a row's interval, over its lower end."""
    return row["images_per_s_high"] / row["images_per_s_low"] - 1


def _of_split(row: dict[str, Any], ranks: str) -> Iterator[str]:
    split, step_ms = row["split_ms"], row["step_ms"]
    exposed, communication = split["exposed_communication"], row["communication_ms"]
    total = sum(split.values()) - split["overlapped_communication"]
    if abs(total / step_ms - 1) > SUM_OFF:
        yield (
            f"{ranks} ({row['mode']}): the parts add up to {total:.1f} ms, a step takes "
            f"{step_ms:.1f}: noise, or parts that take longer on their own than in a step"
        )
    if exposed > communication:
        yield (
            f"{ranks} ({row['mode']}): {exposed:.1f} ms of communication are exposed, but the "
            f"all-reduces take {communication:.1f} on their own: ranks wait for each other, or "
            "all-reduces and computing slow each other down"
        )


def _of_model(model: dict[str, Any]) -> Iterator[str]:
    for fit in model["fits"]:
        if fit["rms_residual"] > MODEL_OFF:
            yield (
                f"the all-reduces among {fit['world_size']} are {100 * fit['rms_residual']:.0f} % "
                "(RMS) from a latency and a bandwidth: PREDICTED rows are guesses"
            )
    for row in model["residuals"]:
        if abs(row["relative"]) > MODEL_OFF:
            yield (
                f"the model is {100 * row['relative']:+.0f} % from the measured step of N = "
                f"{row['world_size']} ({row['mode']}): PREDICTED rows are guesses"
            )
