"""Ranks that beat in one store, here as objects of one process."""

import threading
import time

import pytest
import torch.distributed as dist

from ddpm_fast.runtime.heartbeat import LEFT, WATCHED, Heartbeat

TIMEOUT_S = 0.5


class Stuck:
    """A store whose host is frozen: no call comes back."""

    def set(self, *_):
        threading.Event().wait()

    def set_timeout(self, _):
        pass


@pytest.fixture
def start():
    """start(rank, size, store) -> (heartbeat, list of what it lost); ended with the test."""
    started = []

    def begin(rank, size, store, timeout_s=TIMEOUT_S):
        lost = []
        started.append(Heartbeat(store, rank, size, timeout_s=timeout_s, lost=lost.append))
        return started[-1], lost

    yield begin
    for heartbeat in started:
        heartbeat.stop(left=False)


def wait_for(lost):
    start = time.monotonic()
    while not lost and time.monotonic() - start < 20:
        time.sleep(0.01)
    return time.monotonic() - start


def test_ranks_that_beat_lose_none_and_one_that_left_is_not_missed(start):
    store = dist.HashStore()
    ranks = [start(rank, 3, store) for rank in range(3)]
    time.sleep(TIMEOUT_S)
    ranks[2][0].stop(left=True)
    time.sleep(2 * TIMEOUT_S)
    assert [lost for _, lost in ranks] == [[], [], []]
    assert store.get("beat_2") == LEFT


def test_a_rank_whose_beat_stands_still_is_named_by_the_others(start):
    store = dist.HashStore()
    ranks = [start(rank, 3, store) for rank in range(3)]
    ranks[1][0].stop(left=False)
    for _, lost in (ranks[0], ranks[2]):
        assert wait_for(lost) < 10 * TIMEOUT_S
        assert lost == ["rank 1 was not heard of for 0.5 s"]


def test_a_rank_that_never_came_is_missed_too(start):
    _, lost = start(0, 2, dist.HashStore())
    assert wait_for(lost) > 0.8 * TIMEOUT_S
    assert lost == ["rank 1 was not heard of for 0.5 s"]


def test_a_store_that_does_not_answer_is_told_as_such(start):
    heartbeat, lost = start(0, 2, Stuck())
    wait_for(lost)
    assert lost == ["the store of torchrun did not answer for 0.5 s"]
    heartbeat.stop(left=True)  # returns


def test_time_in_which_this_process_was_stopped_itself_does_not_count(start):
    heartbeat, lost = start(0, 2, dist.HashStore(), timeout_s=30)
    heartbeat._looked -= 3600
    assert heartbeat._who_is_lost() is None


def test_of_many_ranks_each_is_watched_by_as_many_as_it_watches(start):
    size, store = 2 * WATCHED, dist.HashStore()
    watched = [start(rank, size, store, timeout_s=60)[0]._others for rank in (0, size - 1)]
    assert watched == [list(range(1, WATCHED + 1)), list(range(WATCHED))]
