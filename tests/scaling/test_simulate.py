"""The discrete-event simulation against closed forms, within 1 %."""

import pytest

from ddpm_fast.scaling.alpha_beta import (
    ALGORITHMS,
    Link,
    exposed_seconds,
    ready_times,
    ring_seconds,
    tree_seconds,
)
from ddpm_fast.scaling.simulate import simulate_all_reduces, simulate_step

MIB = 2**20
LINK = Link(alpha_s=5e-6, beta_bytes_per_s=2e9, base_s=1e-5)
BUCKETS = [MIB] + [25 * MIB] * 2 + [7 * MIB]
both = pytest.mark.parametrize("algorithm", ALGORITHMS)


def end(*arguments):
    return max(simulate_all_reduces(*arguments)[-1])


@both
@pytest.mark.parametrize("n", [2, 3, 7, 8, 16])
@pytest.mark.parametrize("size", [1000, MIB, 25 * MIB])
def test_one_all_reduce_takes_its_closed_form(algorithm, n, size):
    expected = ALGORITHMS[algorithm](size, n, LINK)
    assert end([size], [[0.0] * n], LINK, algorithm) == pytest.approx(expected, rel=0.01)


@both
def test_all_reduces_that_are_ready_at_once_take_the_sum(algorithm):
    expected = sum(ALGORITHMS[algorithm](size, 8, LINK) for size in BUCKETS)
    ready = [[0.0] * 8 for _ in BUCKETS]
    assert end(BUCKETS, ready, LINK, algorithm) == pytest.approx(expected, rel=0.01)


@both
def test_a_late_rank_delays_all_by_as_much(algorithm):
    late = [[0.0] * 7 + [0.5]]
    on_time = end([MIB], [[0.0] * 8], LINK, algorithm)
    # the others' part of the work is over by then, so a little less than the whole is left
    assert 0.5 < end([MIB], late, LINK, algorithm) <= 0.5 + on_time + 1e-12


def test_a_ring_waits_for_its_last_rank_then_takes_its_whole_time():
    late = [[0.0] * 7 + [0.5]]
    assert end([MIB], late, LINK) == pytest.approx(0.5 + ring_seconds(MIB, 8, LINK), rel=0.01)


@both
@pytest.mark.parametrize("backward_s", [1e-3, 0.05, 10.0])  # bound by communication, mixed, compute
def test_an_overlapped_step_takes_its_closed_form(algorithm, backward_s):
    times = [ALGORITHMS[algorithm](size, 8, LINK) for size in BUCKETS]
    exposed = exposed_seconds(times, ready_times(BUCKETS, backward_s), backward_s)
    simulated = simulate_step(
        forward_s=backward_s / 2, backward_s=backward_s, buckets=BUCKETS, link=LINK,
        factors=[1.0] * 8, algorithm=algorithm,
    )  # fmt: skip
    assert simulated == pytest.approx(1.5 * backward_s + exposed, rel=0.01)


def test_a_step_with_one_slow_rank_takes_the_slow_ranks_time():
    step = dict(forward_s=1.0, backward_s=2.0, buckets=BUCKETS, link=LINK)
    slow = simulate_step(factors=[1.2] + [1.0] * 7, **step)
    assert slow == pytest.approx(3.6 + ring_seconds(BUCKETS[-1], 8, LINK), rel=0.01)


def test_one_rank_alone_only_computes():
    step = dict(forward_s=1.0, backward_s=2.0, buckets=BUCKETS, link=LINK)
    assert simulate_step(factors=[1.0], **step) == 3.0


def test_no_bandwidth_is_beaten():
    size = 100 * MIB
    for form in (ring_seconds, tree_seconds):
        assert form(size, 8, LINK) > size / LINK.beta_bytes_per_s
