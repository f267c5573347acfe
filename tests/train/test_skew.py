"""Which rank is told to be slow: one that stays behind, not one that has an image more."""

import math
from types import SimpleNamespace

import pytest

from ddpm_fast.train.skew import SkewWatch


def watch(seconds, batch_size):
    """What three measurements of ranks that take so many seconds tell, and the last skew."""
    told = []
    world = SimpleNamespace(size=len(seconds), gather=lambda own: seconds)
    ranks = SkewWatch(world, batch_size, told.append)
    skews = [ranks.measure(step, seconds[0], 0.0) for step in (10, 20, 30)]
    return told, skews[-1]


def test_a_slow_rank_is_named_once_when_it_is_slow_twice():
    told, skew = watch([1.0, 1.0, 1.6], 12)
    assert skew == 1.6
    assert told == [
        "warning: rank 2 is slow: its forward pass and wait for data at step 20 took 1.6 times "
        "the median"
    ]


@pytest.mark.parametrize(
    "seconds, batch_size, slow", [([1, 1, 2.0], 4, False), ([1, 1, 3.1], 4, True),
                                  ([10, 10, 11], 31, False), ([10, 10, 17], 31, True)]
)  # fmt: skip
def test_where_a_rank_has_an_image_more_it_may_take_longer(seconds, batch_size, slow):
    assert bool(watch(seconds, batch_size)[0]) == slow


def test_a_time_that_is_not_known_is_no_skew():
    assert watch([1.0, math.nan], 8) == ([], None)
