"""A room per fused op: its maths, its plain-torch reference, its launch.

MODULES is the one list of kernels; SPECS are theirs, in the same order, imported when first asked
for: `from ddpm_fast.kernels import SPECS` imports torch, `import ddpm_fast.kernels` does not. The
SPEC of <name> is in <name>/op.py, its Triton code in <name>/forward_triton.py, which does without
torch (tuning/offline.py says why).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm_fast.kernels.spec import KernelSpec

    SPECS: tuple[KernelSpec, ...]

MODULES = (
    "philox", "dropout", "q_sample", "posterior_step", "group_norm_silu", "attention", "adamw_ema",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name != "SPECS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    specs = tuple(import_module(f"{__name__}.{module}.op").SPEC for module in MODULES)
    globals()["SPECS"] = specs
    return specs
