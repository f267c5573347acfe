"""The roofline as the report's sections and as JSON: floors, PREDICTED, measured, the residual."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

from bench.ceilings import Ceilings
from bench.report_data import Bar, Section, Suite
from bench.roofline import GIVEN, TRAINING, Device, Row, kernels, step
from ddpm_fast.nn.config import preset

PRESET, SIDE, BATCHES = "cifar10", 32, (128, 512)
IMPL = "ours compiled bf16 captured"  # which the model is of
TARGET_PERCENT, TARGET = 70, "batch 512"


@dataclass(frozen=True)
class Roofline:
    device: Device
    steps: list[Row]
    kernels: list[Row]


def roofline(device: Device, suite: Suite | None = None) -> Roofline:
    """The model's, with what the suite measured of its rows."""
    ours = [row for row in (suite.rows("kernels") if suite else []) if row["impl"] == "ours"]
    passes = kernels(device, {row["name"].removesuffix(" ours"): row["ms"] for row in ours})
    measured = {
        row["batch"]: row
        for row in (suite.rows("models") if suite else [])
        if (row["what"], row["preset"], row["impl"]) == (TRAINING, PRESET, IMPL)
    }
    steps = [
        step(device, preset(PRESET), SIDE, batch, measured.get(batch))
        for batch in sorted({*BATCHES, *measured})
    ]
    return Roofline(device, steps, passes)


def rooflines(suites: Sequence[Suite], name: str | None = None) -> list[Roofline]:
    """Of each suite that has ceilings; without suites, of the named device or of all given ones."""
    if not suites:
        return [roofline(GIVEN[each]) for each in GIVEN if name in (None, each)]
    return [roofline(device, suite) for suite in suites if (device := device_of(suite))]


def device_of(suite: Suite) -> Device | None:
    """The device with the run's largest measured ceilings, else with the given ones."""
    given = next((device for name, device in GIVEN.items() if name in suite.device), None)
    found = [
        Ceilings(stage["copy_gb_s"], stage["matmul_tflop_s"])
        for stage in suite.data["stages"].values()
        if "matmul_tflop_s" in stage
    ]
    if not found:
        return given
    sms = suite.data.get("multiprocessors", given.sms if given else 0)
    hopper = given or suite.data.get("compute_capability") == "9.0"
    sms = sms if hopper and isinstance(sms, int) and sms > 0 else 0
    return Device(suite.device, reduce(Ceilings.larger, found), "measured in the same run", sms)


def roofline_sections(found: Roofline) -> list[Section]:
    title, inputs = f"Roofline of {found.device.name}", _inputs(found.device)
    what = f"a training step of {PRESET}, bf16, compiled and captured"
    return [
        Section(
            f"{title}: {what}",
            [inputs, _target(found.steps), _residuals(found.steps)],
            _table(found.steps),
            list(map(_step_plot, found.steps)),
        ),
        Section(
            f"{title}: kernels",
            [inputs, _residuals(found.kernels)],
            _table(found.kernels),
            list(map(_kernel_plot, found.kernels)),
        ),
    ]


def as_json(found: Roofline) -> dict[str, Any]:
    """Each row has the word, the model's terms, and the residual where something is measured."""
    steps, passes = (
        [
            {
                "kind": "PREDICTED",
                **asdict(row),
                "floor_ms": row.floor_ms,
                "predicted_ms": row.predicted_ms,
                "residual": row.residual,
            }
            for row in rows
        ]
        for rows in (found.steps, found.kernels)
    )
    return {"device": asdict(found.device), "steps": steps, "kernels": passes}


def _inputs(device: Device) -> str:
    rates = device.ceilings
    sms = f"{device.sms} SMs" if device.sms else "issue slots and waves of tiles not counted"
    return (
        f"PREDICTED by the model in bench/roofline.py from a copy of {rates.copy_gb_s:,.0f} GB/s"
        f" and a matrix product of {rates.matmul_tflop_s:,.0f} TFLOP/s ({device.source}), {sms}."
        " Floor: the least bytes and operations at those rates. Shares are of the floor."
    )


def _target(steps: Sequence[Row]) -> str:
    row = next(row for row in steps if row.name == TARGET)
    ms = row.measured_ms
    measured = f"measured {_share(row.floor_ms, ms)}" if ms else "not measured"
    return (
        f"Target at {TARGET}: {TARGET_PERCENT} % of the hardware's limit, the floor:"
        f" PREDICTED {_share(row.floor_ms, row.predicted_ms)}, {measured}."
    )


def _residuals(rows: Sequence[Row]) -> str:
    found = [row.residual for row in rows if row.residual]
    if not found:
        return "Residual, measured / PREDICTED: not measured."
    spread = f"{min(found):.2f} to {max(found):.2f} in {len(found)} rows"
    return f"Residual, measured / PREDICTED: median {statistics.median(found):.2f}, {spread}."


def _table(rows: Sequence[Row]) -> list[list[str]]:
    """A line a row, and one for each part of a step."""
    cells = [["what", "floor ms", "predicted ms", "measured ms", "residual", "its terms, ms"]]
    for row in rows:
        longest = sorted(row.terms.items(), key=lambda term: -term[1])
        bound = ", ".join(f"{term} {ms:.3g}" for term, ms in longest) or "-"
        cells.append([row.name, *_cells(row.floor_ms, row.predicted_ms, row.measured_ms), bound])
        for part in row.predicted if len(row.predicted) > 1 else ():
            each = row.floor.get(part), row.predicted[part], row.measured.get(part)
            cells.append([f"{row.name}: {part}", *_cells(*each), "-"])
    return cells


def _cells(floor: float | None, predicted: float, measured: float | None) -> list[str]:
    shown = [
        f"{ms:.3g}" + (f" ({_share(floor, ms)})" if floor else "")
        for ms in (predicted, measured)
        if ms is not None
    ]
    ratio = [] if measured is None else [f"{measured / predicted:.2f}"]
    cells = [f"{floor:.3g}" if floor else "-", f"PREDICTED {shown[0]}", *shown[1:], *ratio]
    return cells + ["-"] * (4 - len(cells))


def _step_plot(row: Row) -> tuple[str, list[Bar]]:
    """A bar's parts; the longest bar is as wide as the plot."""
    stacks = {"floor": row.floor, "PREDICTED": row.predicted}
    if row.measured_ms:
        stacks["measured"] = row.measured or {"not by part": row.measured_ms}
    widest = max(sum(stack.values()) for stack in stacks.values())
    return row.name, [
        Bar(
            kind,
            [(part, 100 * ms / widest) for part, ms in stack.items()],
            _text(row, kind, ms := sum(stack.values()), f"{ms:.3g} ms"),
        )
        for kind, stack in stacks.items()
    ]


def _kernel_plot(row: Row) -> tuple[str, list[Bar]]:
    """A bar of shares of the floor; the floor is as wide as the plot."""
    times = {"PREDICTED": row.predicted_ms, "measured": row.measured_ms}
    return row.name, [
        Bar(
            kind,
            [("", min(100.0, 100 * row.floor_ms / ms))],
            _text(row, kind, ms, f"{1e3 * ms:.3g} us"),
        )
        for kind, ms in times.items()
        if ms
    ]


def _text(row: Row, kind: str, ms: float, shown: str) -> str:
    words = [f"{kind} {shown}"]
    words += [] if kind == "floor" else [_share(row.floor_ms, ms)]
    words += [f"residual {row.residual:.2f}"] if kind == "measured" else []
    return ", ".join(words)


def _share(floor_ms: float, ms: float) -> str:
    return f"{100 * floor_ms / ms:.0f} %"
