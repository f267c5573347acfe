"""A result as a run on two CPU processes leaves it, with made-up round numbers."""

import copy

import pytest

from ddpm_fast.scaling import predict
from ddpm_fast.scaling.assemble import add_predictions


def row(mode, n, batch, rate, *, compute, exposed, overlapped=2.0):
    step_ms = n * batch / rate * 1e3
    return {
        "mode": mode, "world_size": n, "batch_per_rank": batch,
        "window_images_per_s": [rate * f for f in (0.99, 1.0, 1.0, 1.0, 1.01)],
        "images_per_s": rate, "images_per_s_low": 0.99 * rate, "images_per_s_high": 1.01 * rate,
        "step_ms": step_ms, "steps_per_window": 10, "speedup": rate / 200,
        "efficiency": rate / 200 / n, "serial_fraction": None if mode == "weak" else 0.1,
        "split_ms": {"compute": compute, "exposed_communication": exposed,
                     "overlapped_communication": overlapped if n > 1 else 0.0,
                     "data": 1.0, "optimizer": 4.0},
        "communication_ms": exposed + overlapped if n > 1 else 0.0,
        "skew": 1.05,
        "peak_memory": [{"rank": r, "allocated_gib": None, "reserved_gib": None,
                         "process_gib": 0.5 + 0.01 * r} for r in range(n)],
        "memory_phases_gib": {"start": 0.3, "net": 0.35, "first step": 0.45, "peak": 0.5},
        "joules_per_image": None, "loss": 0.9,
    }  # fmt: skip


@pytest.fixture
def result():
    """One and two processes measured, no predictions."""
    return measured()


def measured():
    return {
        "schema": "ddpm_fast.scaling/1", "created": "2026-11-23T20:00:00+00:00", "seconds": 60.0,
        "kind": "cpu-processes", "backend": "gloo", "preset": "digits", "precision": "fp32",
        "compile": False, "demo": True, "batch_per_rank": 16, "global_batch": 16,
        "parameters": 1_100_000, "bucket_bytes": [2**20, 3_400_000], "backward_share": 0.66,
        "jitter": 0.02, "versions": {"torch": "2.13.0"},
        "machine": {"cpu": "a CPU", "cores": 2, "memory_gib": 23.0, "devices": [], "links": [],
                    "p2p": [], "driver": None},
        "rows": [row("weak", 1, 16, 200.0, compute=75.0, exposed=0.0),
                 row("weak", 2, 16, 360.0, compute=80.0, exposed=3.9),
                 row("strong", 2, 8, 320.0, compute=41.0, exposed=4.0)],
        "compute_alone": [{"batch": 16, "seconds": 0.075}, {"batch": 8, "seconds": 0.038}],
        "all_reduce": [{"world_size": 2, "bytes": size, "seconds": 1e-4 + size / 1e9,
                        "bus_gbytes_per_s": size / (1e-4 + size / 1e9) / 1e9}
                       for size in (1024, 2**16, 2**20, 4_448_576)],
        "model": None, "predicted": [], "failures": [],
        "samples": [{"seconds": float(s), "world_size": 1 + s // 2, "device": "this machine",
                     "utilisation": 50.0, "memory_gib": 2.0 + s / 10, "watts": None,
                     "celsius": None, "sm_mhz": None, "memory_mhz": None} for s in range(4)],
        "notes": [],
    }  # fmt: skip


@pytest.fixture(scope="session")
def with_predictions():
    result = measured()
    add_predictions(result, [8, 64])
    assert predict.make_model(result)[0] is not None
    return result


@pytest.fixture
def predicted(with_predictions):
    """The same with PREDICTED rows for 8 and 64."""
    return copy.deepcopy(with_predictions)
