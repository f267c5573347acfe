"""What limits the largest measured worlds, in words, and what to try."""

from __future__ import annotations

from typing import Any

from ddpm_fast.scaling.doubts import noisy, width
from ddpm_fast.scaling.result import base_row, count, rank_word

GOOD = 0.95  # efficiency above which nothing is worth mending


def verdict(result: dict[str, Any]) -> list[str]:
    """Sentences, the limit first; each figure is from the rows."""
    rows = result["rows"]
    if not rows:
        return ["Nothing was measured."]
    word, cpu = rank_word(result), result["kind"] != "gpu"
    most = max(row["world_size"] for row in rows)
    if most == min(row["world_size"] for row in rows):
        return [f"One world size was measured, {count(most, word)}: no efficiency to judge."]
    sentences = []
    for mode in ("weak", "strong"):
        largest = max((row for row in rows if row["mode"] == mode),
                      key=lambda row: row["world_size"], default=None)  # fmt: skip
        if largest is not None:
            base = base_row(rows, mode, result["global_batch"])
            sentences += _limit(base, largest, count(largest["world_size"], word), cpu)
    worst = max(rows, key=lambda row: row["skew"])
    if worst["skew"] > 1.1:
        sentences.append(
            f"The slowest {word} needs {worst['skew']:.2f} times the fastest's time: look for "
            + ("another program on its core." if cpu else "heat, a power limit, other programs.")
        )
    if row := noisy(rows):
        sentences.append(
            f"The windows of {count(row['world_size'], word)} ({row['mode']}) differ much (an "
            f"interval of {100 * width(row):.0f} %): close other programs and measure with a "
            "larger --window-s."
        )
    if cpu:
        sentences.append("These are CPU processes: their efficiency says nothing of GPUs.")
    return sentences


def _limit(base: dict[str, Any], row: dict[str, Any], ranks: str, cpu: bool) -> list[str]:
    """What the largest world of a mode reaches, and what costs most of the rest."""
    if row is base:
        return []
    efficiency = f"{ranks} reach an efficiency of {100 * row['efficiency']:.0f} % ({row['mode']})"
    if row["efficiency"] >= GOOD:
        return [f"{efficiency}: nothing limits them much."]
    name, lost_ms = max(losses(base, row).items(), key=lambda pair: pair[1])
    share = 100 * lost_ms / row["step_ms"]
    return [
        f"{efficiency}; what costs most is {name}: {lost_ms:.1f} ms, {share:.0f} % of a step.",
        f"To try: {_advice(name, cpu, row['mode'])}.",
    ]


def losses(base: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """ms of a step that it would not need if the smallest world's parts scaled ideally, by cause.

    Ideally a rank's computing and data go with its share of the images; the optimizer, which has
    the whole net on every rank, would cost nothing more than that share either.
    """
    split, alone = row["split_ms"], base["split_ms"]
    share = row["batch_per_rank"] / base["batch_per_rank"]
    return {
        "communication that the backward pass does not hide":
            split["exposed_communication"] - alone["exposed_communication"],
        "slower compute beside other ranks": split["compute"] - share * alone["compute"],
        "data": split["data"] - share * alone["data"],
        "the optimizer": split["optimizer"] - share * alone["optimizer"],
    }  # fmt: skip


def _advice(name: str, cpu: bool, mode: str) -> str:
    batch = "--global-batch" if mode == "strong" else "--batch-size"
    if name.startswith("communication"):
        more = f"a larger {batch}, which gives the all-reduces more time to hide in"
        return (
            more if cpu else f"{more}, gradient accumulation, or links of more bandwidth (NVLink)"
        )
    if name.startswith("slower"):
        advice = (
            "fewer processes than cores, as they share memory bandwidth and clock"
            if cpu
            else "cooling or power limits, and processor cores enough for every GPU"
        )
        few = f", or a larger {batch}: few images keep a rank less busy"
        return advice + (few if mode == "strong" else "")
    if name == "data":
        return "a data set that is kept on the device"
    return f"a larger {batch}, so that there are fewer updates an image"
