"""What limits the largest measured world, in words, and what to try."""

from __future__ import annotations

from typing import Any

from ddpm_fast.scaling.result import rank_word

GOOD = 0.95  # efficiency above which nothing is worth mending


def verdict(result: dict[str, Any]) -> list[str]:
    """Sentences, the limit first; each figure is from the rows."""
    rows = [row for row in result["rows"] if row["mode"] == "weak"]
    if not rows:
        return ["Nothing was measured."]
    base, row = rows[0], rows[-1]
    word = rank_word(result)
    cpu = result["kind"] != "gpu"
    if row is base:
        return [f"One world size was measured, {row['world_size']} {word}: no efficiency to judge."]
    many = f"{row['world_size']} {word}{'es' if word.endswith('s') else 's'}"
    efficiency = f"{many} reach an efficiency of {100 * row['efficiency']:.0f} % (weak)"
    sentences = []
    if row["efficiency"] >= GOOD:
        sentences.append(f"{efficiency}: nothing limits them much.")
    else:
        name, lost_ms = max(losses(base, row).items(), key=lambda pair: pair[1])
        share = 100 * lost_ms / row["step_ms"]
        sentences.append(
            f"{efficiency}; what costs most is {name}: {lost_ms:.1f} ms, {share:.0f} % of a step."
        )
        sentences.append(f"To try: {_advice(name, cpu)}.")
    if row["skew"] > 1.1:
        sentences.append(
            f"The slowest {word} needs {row['skew']:.2f} times the fastest's time: look for "
            + ("another program on its core." if cpu else "heat, a power limit, other programs.")
        )
    width = row["images_per_s_high"] / row["images_per_s_low"] - 1
    if width > 0.1:
        sentences.append(
            f"The windows differ much (an interval of {100 * width:.0f} %): close other programs "
            "and measure with a larger --window-s."
        )
    if cpu:
        sentences.append("These are CPU processes: their efficiency says nothing of GPUs.")
    return sentences


def losses(base: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """ms of a weak step that the smallest world does not need, by cause."""
    split, alone = row["split_ms"], base["split_ms"]
    return {
        "communication that the backward pass does not hide":
            split["exposed_communication"] - alone["exposed_communication"],
        "slower compute beside other ranks": split["compute"] - alone["compute"],
        "data": split["data"] - alone["data"],
        "the optimizer": split["optimizer"] - alone["optimizer"],
    }  # fmt: skip


def _advice(name: str, cpu: bool) -> str:
    if name.startswith("communication"):
        more = "a larger --batch-size, which gives the all-reduces more time to hide in"
        return (
            more if cpu else f"{more}, gradient accumulation, or links of more bandwidth (NVLink)"
        )
    if name.startswith("slower"):
        if cpu:
            return "fewer processes than cores, as they share memory bandwidth and clock"
        return "cooling or power limits, and processor cores enough for every GPU"
    if name == "data":
        return "a data set that is kept on the device"
    return "a larger --batch-size, so that there are fewer updates an image"
