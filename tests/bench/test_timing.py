"""Medians, quantiles, pairs in turns, floors."""

import os

import pytest
import torch

from bench.ceilings import Ceilings, measure
from bench.replay import Replay
from bench.timing import Samples, count_sets, speedup, time_in_turns

CPU = torch.device("cpu")


def test_samples_give_median_and_quantiles():
    samples = Samples((5.0, 1.0, 2.0, 4.0, 3.0))
    assert samples.median_ms == 3.0
    assert samples.row() == {"ms": 3.0, "ms_q20": 2.0, "ms_q80": 5.0}


def test_speedup_is_by_pairs_of_the_same_round():
    # The machine slows down tenfold on the way: pairs do not see that.
    ours, other = Samples((1.0, 2.0, 10.0)), Samples((2.0, 4.0, 20.0))
    assert speedup(ours, other) == {"speedup": 2.0, "speedup_q20": 2.0, "speedup_q80": 2.0}


def test_calls_are_made_in_turns_and_rotate_among_their_buffers():
    made = []
    calls = {
        name: [lambda name=name, i=i: made.append((name, i)) for i in range(3)] for name in "ab"
    }
    samples = time_in_turns(calls, CPU, repeats=6)
    assert {name: len(each.ms) for name, each in samples.items()} == {"a": 6, "b": 6}
    assert [name for name, _ in made] == ["a", "b"] * (len(made) // 2)
    assert all(first[1] != second[1] for first, second in zip(made, made[1:], strict=False))


def test_a_slow_call_is_repeated_less_often():
    fast = time_in_turns({"x": [lambda: None]}, CPU, seconds=0.01)["x"]
    assert 7 <= len(fast.ms) <= 100


def test_cpu_measurements_use_one_set_of_buffers():
    assert count_sets(CPU, 1, cold=True) == 1


def test_the_floor_is_the_larger_of_bytes_and_operations():
    ceilings = Ceilings(copy_gb_s=4000.0, matmul_tflop_s=800.0)
    assert ceilings.floor_ms(4_000_000, 0) == pytest.approx(1e-3)
    assert ceilings.floor_ms(4_000_000, 8_000_000_000) == pytest.approx(1e-2)


def test_ceilings_are_measured_with_their_rows():
    ceilings, rows = measure(CPU, tiny=True)
    assert ceilings.copy_gb_s > 0 and ceilings.matmul_tflop_s > 0
    assert [row["name"].partition(" ")[0] for row in rows] == ["copy", "matmul"]


def test_replay_gives_each_round_its_sample():
    replay = Replay()
    replay.load([1.0, 3.0])
    readings = [replay() for _ in range(4)]
    rounds = [end - begin for begin, end in zip(readings[::2], readings[1::2], strict=True)]
    assert rounds == pytest.approx([1e-3, 3e-3])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="other tests use the device too")
def test_a_copy_takes_as_long_by_events_as_by_the_clock():
    import time

    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    calls = {"copy": [lambda: target.copy_(source)]}
    by_events = time_in_turns(calls, torch.device("cuda"), repeats=20)["copy"].median_ms
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        target.copy_(source)
    torch.cuda.synchronize()
    assert by_events == pytest.approx(1e3 * (time.perf_counter() - start) / 50, rel=0.2)
