"""The gradients of a net in one piece of memory, which the ranks add up by one all-reduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn


class FlatGradients:
    """Parameters' gradients as views of one tensor that keeps its address.

    parameters  on one device, of one dtype, each dense in some layout, which its gradient has too
    ranks       of the process group
    send_dtype  what the gradients are rounded to on their way; None: as they are

    For a step whose sending lies outside of its graphs. Where DDP sends while the backward pass
    goes on, this waits for its end.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], ranks: int, send_dtype: torch.dtype | None = None
    ) -> None:
        first = parameters[0]
        sizes = [p.numel() for p in parameters]
        self._flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        self._ranks, self._send_dtype = ranks, send_dtype
        for piece, p in zip(self._flat.split(sizes), parameters, strict=True):
            p.grad = piece.as_strided(p.shape, p.stride())

    def zero_(self) -> None:
        """Forget the last step's; what a backward pass finds it adds to in place."""
        self._flat.zero_()

    def send(self) -> None:
        """Make them the mean over the ranks, as DDP and its compression hook do."""
        sent = self._flat.div_(self._ranks).to(self._send_dtype or self._flat.dtype)
        dist.all_reduce(sent)
        if sent is not self._flat:
            self._flat.copy_(sent)
