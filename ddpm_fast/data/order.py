"""Which image sits at which position of a run: epoch e is the set, sorted by Philox words.

Position p = step * batch_size + i belongs to epoch p // M; the order of an epoch is a function of
(seed, epoch), so any rank finds the rows of any step by itself and a resumed run goes on exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.kernels.philox.op import Stream


def epoch_order(num_rows: int, *, seed: int, epoch: int) -> Tensor:
    """A uniform permutation of range(num_rows): (num_rows,) int64 on the CPU."""
    counters = -(-num_rows // 4)
    counter = torch.zeros(counters, 4, dtype=torch.int64)
    counter[:, 0] = torch.arange(counters)
    counter[:, 1], counter[:, 3] = Stream.DATA_ORDER, epoch
    key = torch.tensor([seed & 0xFFFFFFFF, seed >> 32]).expand(counters, 2)
    words = ops.philox_words(counter, key).flatten()[:num_rows]
    return torch.argsort(words, stable=True)


class DataOrder:
    """Rows of consecutive positions; keeps the two epochs it last met.

    num_rows  M >= 1, images of the set;  seed  the run's
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows, self.seed = num_rows, seed
        self._epochs: dict[int, Tensor] = {}

    def rows(self, position: int, count: int) -> Tensor:
        """(count,) int64: the rows at position, position + 1, ...; each epoch meets each once."""
        parts = []
        while count:
            epoch, start = divmod(position, self.num_rows)
            part = self._epoch(epoch)[start : start + count]
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            for old in [e for e in self._epochs if e < epoch - 1]:
                del self._epochs[old]
            self._epochs[epoch] = epoch_order(self.num_rows, seed=self.seed, epoch=epoch)
        return self._epochs[epoch]
