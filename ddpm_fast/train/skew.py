"""Which rank keeps the others waiting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from ddpm_fast.runtime.ranks import World

# An own time of so many medians is told, if the ranks have equally many images; of two ranks one
# takes 3 times the other's then.
SLOW_RANK = 1.5


class SkewWatch:
    """Compares what the ranks take; `say` hears of each slow one once.

    batch_size  images a step, of all ranks: where one has more than another, it may take longer
    """

    def __init__(self, world: World, batch_size: int, say: Callable[[str], None]) -> None:
        self._world, self._say = world, say
        least = batch_size // world.size
        self._slow = SLOW_RANK * (-(-batch_size // world.size) / least)
        self._slow_rank: int | None = None  # at the last measurement
        self._told: set[int] = set()

    def measure(self, step: int, forward_s: float | None, waits_s: float) -> float | None:
        """The slowest rank's own time a step over the median; one slow twice in a row is named.

        forward_s  of this rank's forward pass, which waits for no other; None: not known
        waits_s    that it waited for its data, a step
        returns    None where there is one rank, or one's time is not known
        """
        if self._world.size == 1:
            return None
        seconds = self._world.gather(math.nan if forward_s is None else forward_s + waits_s)
        if not all(s > 0 for s in seconds):
            return None
        skew = max(seconds) / statistics.median(seconds)
        slow = seconds.index(max(seconds)) if skew > self._slow else None
        if slow is not None and slow == self._slow_rank and slow not in self._told:
            self._told.add(slow)
            self._say(
                f"warning: rank {slow} is slow: its forward pass and wait for data at step {step} "
                f"took {skew:.1f} times the median"
            )
        self._slow_rank = slow
        return round(skew, 3)
