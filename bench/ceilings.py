"""What this machine can do at most, measured in the same run as what is compared with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench.timing import Samples, count_sets, time_in_turns


@dataclass(frozen=True)
class Ceilings:
    """Rates that nothing measured beside them should pass, but for what stays in a cache.

    copy_gb_s       bytes read and written by a copy within the device's memory
    matmul_tflop_s  of a square matrix product, bf16 on a GPU, fp32 on a CPU, random data
    """

    copy_gb_s: float
    matmul_tflop_s: float

    def floor_ms(self, bytes_moved: int, flops: int) -> float:
        """The least time for these bytes and floating-point operations."""
        return max(bytes_moved / self.copy_gb_s / 1e6, flops / self.matmul_tflop_s / 1e9)

    def percent_of_floor(self, rates: Mapping[str, Any]) -> float:
        """Of a row with gb_s, and tflop_s where it is of products: the larger share is the floor's.

        floor_ms / ms, as bytes / ms is gb_s.
        """
        shares = rates["gb_s"] / self.copy_gb_s, rates.get("tflop_s", 0) / self.matmul_tflop_s
        return round(100 * max(shares), 1)

    def larger(self, other: Ceilings) -> Ceilings:
        """What two measurements found at most: a ceiling taken at a bad moment is too low."""
        return Ceilings(
            copy_gb_s=max(self.copy_gb_s, other.copy_gb_s),
            matmul_tflop_s=max(self.matmul_tflop_s, other.matmul_tflop_s),
        )


MOST_PERCENT = 105.0  # of the floor; beyond, the ceiling was taken too low, or a cache helped


def is_above(percent: float | None) -> bool:
    """Whether a percentage of the floor is more than noise of the ceiling explains."""
    return percent is not None and percent > MOST_PERCENT


def measure(device: torch.device, *, tiny: bool = False) -> tuple[Ceilings, list[dict]]:
    """The ceilings, and the rows that say how they were found.

    tiny  sizes that take a moment on a CPU
    """
    copied = 2**22 if tiny or device.type == "cpu" else 2**30
    side = 256 if tiny else 1024 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    copy, matmul = _time_copy(device, copied), _time_matmul(device, side, dtype)
    ceilings = Ceilings(
        copy_gb_s=round(2 * copied / copy.median_ms / 1e6, 1),
        matmul_tflop_s=round(2 * side**3 / matmul.median_ms / 1e9, 3),
    )
    name = str(dtype).removeprefix("torch.")
    return ceilings, [
        {"name": f"copy {copied / 1e6:.0f} MB", **copy.row(), "gb_s": ceilings.copy_gb_s},
        {
            "name": f"matmul {name} {side}x{side}x{side}",
            **matmul.row(),
            "tflop_s": ceilings.matmul_tflop_s,
        },
    ]


def _time_copy(device: torch.device, size: int) -> Samples:
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = [lambda: target.copy_(source)] * count_sets(device, 2 * size, cold=True)
    return time_in_turns({"copy": calls}, device, seconds=0.3)["copy"]


def _time_matmul(device: torch.device, side: int, dtype: torch.dtype) -> Samples:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return time_in_turns({"matmul": [lambda: a @ b]}, device, seconds=0.3)["matmul"]
