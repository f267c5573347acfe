"""Which launch numbers the sweep times, and in what order: chosen without a GPU.

    python -m bench.sweep_candidates [--jobs N]     writes sweep_candidates.json beside this file

Of each kernel and shape class the candidates are compiled for sm_90, as a GPU's Triton would, the
likely ones first; the first MOST that fit are kept. What spills or needs memory that the chip does
not have is dropped, and so is the default, which the sweep times anyway. Classes stand in the order
of their predicted time in a training step of the cifar10 preset. A kernel's forward_triton.py has

    sweep_candidates(values, arch) -> [(kernel, shape_class, numbers), ...], likely ones first
    sweep_launch(kernel, values, arch) -> the Launch of that case under the current launch table

values  of a case;  kernel  such as "group_norm_silu.backward", whose last part is the pass that is
timed;  shape_class, numbers  a key and a row of launch_table.json
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench.sweep import CHOSEN, Class, classes, trial_table
from ddpm_fast.kernels.spec import Launch
from ddpm_fast.kernels.tuning import offline

ARCH = 90
MOST = 5
STEP_IMAGES = 512

# Of an H100, est.: bytes and instructions a second that kernels reach, 87 and 75 % of all; a launch
BYTES_PER_S, INSTRUCTIONS_PER_S, LAUNCH_US = 0.87 * 3.0e12, 0.75 * 31e12, 3.0

# Norms of a training step by channels, positions, dropout
NORMS = {
    (128, 1024, False): 3, (128, 1024, True): 5, (256, 1024, False): 2, (384, 1024, False): 1,
    (128, 256, False): 1, (256, 256, False): 6, (256, 256, True): 5, (384, 256, False): 1,
    (512, 256, False): 2, (256, 64, False): 2, (256, 64, True): 5, (512, 64, False): 3,
    (256, 16, False): 5, (256, 16, True): 7, (512, 16, False): 3,
}  # fmt: skip


def launch_of(found: Class, numbers: Mapping[str, Any] | None = None) -> Launch:
    """Of the class's case with these numbers, or with the kernel's default."""
    rows = {} if numbers is None else {str(ARCH): {found.shape_class: numbers}}
    with trial_table({found.kernel: rows}):
        return import_module(found.module).sweep_launch(found.kernel, found.case.values, ARCH)


def fitting(found: Class) -> Iterator[Mapping[str, Any]]:
    """Candidates that compile, do not spill and are not the default, likely ones first."""
    default = launch_of(found)
    for numbers in found.candidates:
        launch = launch_of(found, numbers)
        if launch != default and not offline.misfits(
            offline.source_of(launch), offline.options_of(launch), ARCH
        ):
            yield numbers


def predicted_step_us(found: Class, rows: Mapping[str, offline.Row]) -> float:
    """Time of the default in a step, est.: of memory or of instructions, whichever is more.

    rows  of resources.json by launch: the instructions, where it has this one
    """
    values, count = found.case.values, count_in_step(found)
    backward = found.kernel.endswith("backward")
    dtype = torch.bfloat16 if torch.bfloat16 in found.spec.tolerance else torch.float32
    moved = found.spec.bytes_moved(values, dtype, backward)
    seconds, row = moved / BYTES_PER_S, rows.get(launch_of(found).name)
    if found.kernel.startswith("group_norm") and row is not None:
        elements = moved / dtype.itemsize / (3 if backward else 2)
        seconds = max(seconds, row.resources.instructions * elements / INSTRUCTIONS_PER_S)
    images = values.get("n", STEP_IMAGES)
    return round(count * (LAUNCH_US + 1e6 * seconds * STEP_IMAGES / images), 1)


def count_in_step(found: Class) -> int:
    values = found.case.values
    if found.kernel.startswith("adamw"):
        return 1
    if "hw" not in values:  # attention: ours at 16 pixels; at 256 torch's is trained
        return 1 if (values["h"], values["c"], values["heads"]) == (4, 256, 1) else 0
    channels = values["c1"] + values.get("c2", 0)
    return NORMS[channels, values["hw"], bool(values.get("dropout"))]


def row_of(found: Class, rows: Mapping[str, offline.Row]) -> dict[str, Any]:
    """A row of the file."""
    kept = [dict(numbers) for numbers, _ in zip(fitting(found), range(MOST), strict=False)]
    return {
        "kernel": found.kernel,
        "shape_class": found.shape_class,
        "predicted_step_us": predicted_step_us(found, rows),
        "candidates": kept,
    }


def _row(index: int) -> dict[str, Any]:
    _, stored = offline.read(Path(offline.__file__).with_name("resources.json"))
    rows = {row.launch: row for row in stored if row.arch == ARCH}
    return row_of(classes(ARCH)[index], rows)  # a kernel cannot be handed to another process


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sweep_candidates", description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    with ProcessPoolExecutor(parser.parse_args().jobs) as pool:
        rows = list(pool.map(_row, range(len(classes(ARCH)))))
    rows.sort(key=lambda row: -row["predicted_step_us"])
    write(rows)


def write(rows: Sequence[Mapping[str, Any]]) -> None:
    """A class a line, with the Triton that compiled them."""
    import triton

    lines = ",\n".join(map(json.dumps, rows))
    CHOSEN.write_text(f'{{"triton": "{triton.__version__}", "classes": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
