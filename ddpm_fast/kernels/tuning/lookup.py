"""Launch numbers by kernel, chip and shape class, from launch_table.json.

A chip is a device, "90 NVIDIA H200", or all of an architecture, "90"; a device's own row wins: two
devices of one architecture differ in memory and L2. A row holds the numbers and their evidence: a
measurement, or "not yet measured". The GPU suite's sweep writes the file; a kernel without a row
for its shape computes its own default.
"""

from __future__ import annotations

import functools
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any


def chip_of(arch: int, device_name: str) -> str:
    """The key of a device's own rows, such as "90 NVIDIA H200"; "90" without a name."""
    return f"{arch} {device_name}".rstrip()


def lookup(
    kernel: str, shape_class: str, arch: int, device_name: str = ""
) -> dict[str, Any] | None:
    """The numbers of a row without its evidence, or None.

    kernel       such as "group_norm_silu.forward";  shape_class  such as "t256 d256"
    arch         80, 90, 100, ...
    device_name  such as "NVIDIA H200"; "": no device's own rows
    """
    rows = _table().get(kernel, {})
    for chip in (chip_of(arch, device_name), str(arch)):
        row = rows.get(chip, {}).get(shape_class)
        if row is not None:
            return {k: v for k, v in row.items() if k != "evidence"}
    return None


@functools.cache
def _table() -> dict[str, Any]:
    """DDPM_FAST_LAUNCH_TABLE names another file, for sweeps."""
    override = os.environ.get("DDPM_FAST_LAUNCH_TABLE")
    path = Path(override) if override else files("ddpm_fast.kernels.tuning") / "launch_table.json"
    return json.loads(path.read_text())
