"""Launch numbers by kernel, architecture and shape class, from launch_table.json.

A row holds the numbers and their evidence: a measurement, or "not yet measured". The GPU suite's
sweep writes the file; a kernel without a row for its shape computes its own default.
"""

from __future__ import annotations

import functools
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any


def lookup(kernel: str, shape_class: str, arch: int) -> dict[str, Any] | None:
    """The numbers of a row without its evidence, or None.

    kernel  such as "group_norm_silu.forward";  shape_class  such as "t256 d256"
    arch    80, 90, 100, ...
    """
    row = _table().get(kernel, {}).get(str(arch), {}).get(shape_class)
    return None if row is None else {k: v for k, v in row.items() if k != "evidence"}


@functools.cache
def _table() -> dict[str, Any]:
    """DDPM_FAST_LAUNCH_TABLE names another file, for sweeps."""
    override = os.environ.get("DDPM_FAST_LAUNCH_TABLE")
    path = Path(override) if override else files("ddpm_fast.kernels") / "launch_table.json"
    return json.loads(path.read_text())
