"""Tables of adamw_ema's Triton kernels on the device, and the three launches of a step."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.kernels.calling.target import arch_of, device_name_of, on_device_of

SPARE_ROWS = 2  # captures with no step of their own between them


class Numbers(NamedTuple):
    """A parameter group's, in the order of the table's columns."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    def columns(self) -> list[int]:
        """As the kernels read them: the bits of fp64."""
        logs = [_log2(self.beta1), _log2(self.beta2)]
        values = (self.beta1, self.beta2, *logs, self.eps, self.weight_decay)
        return [struct.unpack("<q", struct.pack("<d", value))[0] for value in values]


class Tables:
    """Where the tensors of a step are, as the kernels find it, and their scratch.

    sizes     elements of each tensor
    num_emas  averages of each
    outcome   (4,) fp32: norm of the gradients, whether it is finite, the clip coefficient, whether
              the update applied

    All addresses here stay the same for the object's life, so that a graph can hold them.
    """

    def __init__(self, sizes: Sequence[int], num_emas: int, outcome: Tensor) -> None:
        from ddpm_fast.kernels.adamw_ema import forward_triton as kernels

        device = outcome.device
        self.sizes, self.num_emas, self.outcome = tuple(sizes), num_emas, outcome
        self.numbers = kernels.numbers(arch_of(device), device_name_of(device))
        chunk = self.numbers["CHUNK"]
        chunks = [(i, at) for i, size in enumerate(sizes) for at in range(0, size, chunk)]
        self.num_chunks, self.columns = len(chunks), kernels.EMA.value + num_emas
        self.chunks = torch.tensor(chunks, dtype=torch.int64).to(device)
        self.rows = torch.zeros(len(sizes), self.columns, dtype=torch.int64, device=device)
        self.partials = torch.zeros(len(chunks), device=device)
        self.coefficients = torch.zeros(len(sizes), kernels.COEFFICIENTS.value, device=device)
        self._rows_now: list[list[int]] = []
        # A graph copies its own rows to the device at each replay, from memory that is kept. It
        # cannot be pinned during a capture, so some lies ready.
        self._spare = [self._host_rows() for _ in range(SPARE_ROWS)]
        self._captured: list[Tensor] = []

    def point(
        self, addresses: Sequence[Sequence[int]], numbers: Sequence[Numbers], *, capturing: bool
    ) -> None:
        """Fill the rows; a copy to the device only where something changed, or for a graph.

        addresses  of each tensor: weight, grad, exp_avg, exp_avg_sq, step, lr, its averages
        """
        columns = {group: group.columns() for group in set(numbers)}
        rows = [
            [*a[:6], size, _aligned(a), *columns[group], *a[6:]]
            for a, size, group in zip(addresses, self.sizes, numbers, strict=True)
        ]
        if capturing:
            host = self._spare.pop() if self._spare else self._host_rows()
            self._captured.append(host)
        else:
            while len(self._spare) < SPARE_ROWS:
                self._spare.append(self._host_rows())
            if rows == self._rows_now and not self._captured:  # a graph's replay changes them
                return
            host = self._host_rows()
        host.copy_(torch.tensor(rows, dtype=torch.int64).reshape(host.shape))
        self.rows.copy_(host, non_blocking=True)
        self._rows_now = rows

    def launch(
        self,
        ema_weights: Tensor,
        *,
        max_norm: float,
        skip_nonfinite: bool,
        refused: Tensor | None = None,
    ) -> None:
        """Norm, outcome, update.

        ema_weights  (num_emas,) fp32
        refused      () fp32: where it is not 0, nothing is changed
        """
        from ddpm_fast.kernels.adamw_ema import forward_triton as kernels

        with on_device_of(self.outcome):
            if self.num_chunks:
                kernels.norm_kernel[(self.num_chunks,)](
                    self.chunks, self.rows, self.partials, COLUMNS=self.columns, **self.numbers
                )
            kernels.outcome_kernel[(1,)](
                self.rows, self.partials, self.outcome if refused is None else refused,
                self.coefficients, self.outcome, self.num_chunks, len(self.sizes), float(max_norm),
                COLUMNS=self.columns, SKIP_NONFINITE=skip_nonfinite,
                HAS_REFUSED=refused is not None, BLOCK=kernels.OUTCOME_BLOCK,
                num_warps=kernels.OUTCOME_WARPS, num_stages=kernels.NUM_STAGES,
            )  # fmt: skip
            if self.num_chunks:
                kernels.update_kernel[(self.num_chunks,)](
                    self.chunks, self.rows, self.coefficients, self.outcome, ema_weights,
                    COLUMNS=self.columns, NUM_EMAS=self.num_emas, **self.numbers,
                )  # fmt: skip

    def _host_rows(self) -> Tensor:
        pinned = self.rows.device.type == "cuda"
        return torch.empty(self.rows.shape, dtype=torch.int64, pin_memory=pinned)


def _aligned(addresses: Sequence[int]) -> int:
    weight, grad, exp_avg, exp_avg_sq, _, _, *emas = addresses
    return int(all(a % 16 == 0 for a in (weight, grad, exp_avg, exp_avg_sq, *emas)))


def _log2(beta: float) -> float:
    return math.log2(beta) if beta else -math.inf
