"""pytest bench --benchmark-only: what a row carries, and that a wrong kernel gets none."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import environment, test_kernels
from bench.ceilings import Ceilings
from bench.conftest import GPU_STATE, mend
from bench.timing import COLD_CACHES, MOST_SETS, count_sets
from ddpm_fast.kernels.dropout.op import SPEC as DROPOUT

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.slow
def test_the_suites_rows_carry_figures_ceilings_and_where_they_are_from(tmp_path):
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "pytest", "-q", "bench/test_kernels.py", "--benchmark-only",
               "-k", "dropout and (ours or eager or compiled)",
               f"--benchmark-json={path}"]  # fmt: skip
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environ
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["benchmarks"]
    assert {row["name"] for row in rows} >= {"ours", "eager"}
    for row in rows:
        info, stats = row["extra_info"], row["stats"]
        assert info["ms_q20"] <= info["ms"] <= info["ms_q80"]
        assert stats["median"] == pytest.approx(info["ms"] / 1e3, rel=1e-3)
        ceilings = Ceilings(info["copy_gb_s"], info["matmul_tflop_s"])
        assert info["percent_of_floor"] == ceilings.percent_of_floor(info)
        assert info["gb_s"] > 0
        assert (
            info["commit"]
            and info["sdpa_backend"]
            and info["versions"]["torch"] == torch.__version__
        )
        assert info["threads"] >= 1 and set(GPU_STATE) < set(info)
    if not torch.cuda.is_available():
        assert "CPU figures" in done.stdout
        assert all(row["extra_info"]["device"].startswith("CPU") for row in rows)
        assert "compiled" not in {row["name"] for row in rows}


@pytest.fixture
def measure(monkeypatch):
    """measure(spec, label, run) -> names of the rows that a small case leaves on the CPU."""

    def measured(spec, label, run):
        rows, case = [], next(case for case in spec.cases if case.small)
        subject = replace(subject_of(spec.name, case.name, label, CPU), run=run, why_not="")
        monkeypatch.setattr(test_kernels, "subject_of", lambda *_: subject)
        test_kernels.test_kernel(
            spec, case, "forward", "warm", label, CPU, Ceilings(10.0, 1.0),
            lambda group, name, samples, figures: rows.append(name),
        )  # fmt: skip
        return rows

    subject_of = test_kernels.subject_of
    monkeypatch.setattr(test_kernels, "SECONDS", 1e-3)
    test_kernels.refusal.cache_clear()
    yield measured
    test_kernels.refusal.cache_clear()  # what it found is of this test's subject


@pytest.mark.parametrize("factor", [1, 1.01])
def test_a_wrong_kernel_fails_and_has_no_row(measure, factor):
    def run(**inputs):
        return factor * DROPOUT.reference(**inputs)

    if factor == 1:
        assert measure(DROPOUT, "eager", run) == ["eager"]
    else:
        with pytest.raises(pytest.fail.Exception, match="no figure for eager: output is 1.0e-"):
            measure(DROPOUT, "eager", run)


def refusing(run, after):
    """`run`, but as SDPA does for a head size that a backend lacks, after so many calls."""
    calls = iter(range(after))

    def refuses(**inputs):
        if next(calls, None) is None:
            raise RuntimeError("No available kernel.\nAborting execution.")
        return run(**inputs)

    return refuses


PEERS = [("attention", "SDPA cudnn_attention"), ("residual_block", "diffusers")]


@pytest.mark.parametrize("after", [0, 1, 3])  # asked for its parity, warming up, being timed
@pytest.mark.parametrize(("kernel", "label"), PEERS)
def test_a_peer_that_refuses_a_case_is_skipped_with_its_reason(measure, kernel, label, after):
    spec = next(spec for spec in test_kernels.TIMED if spec.name == kernel)
    reason = f"{label}: fails: RuntimeError: No available kernel. Aborting execution."
    with pytest.raises(pytest.skip.Exception, match=re.escape(reason)):
        measure(spec, label, refusing(spec.reference, after))


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("label", ["ours", "eager"])
def test_what_is_no_peer_has_to_run(measure, label, after):
    with pytest.raises(RuntimeError, match="No available kernel"):
        measure(DROPOUT, label, refusing(DROPOUT.reference, after))


def test_a_peer_after_which_the_device_is_lost_fails(measure, monkeypatch):
    monkeypatch.setattr(test_kernels, "is_lost", lambda device: True)
    (kernel, label), *_ = PEERS
    spec = next(spec for spec in test_kernels.TIMED if spec.name == kernel)
    with pytest.raises(RuntimeError, match="No available kernel"):
        measure(spec, label, refusing(spec.reference, 0))


def test_shares_of_the_floor_are_of_the_larger_ceiling():
    rows = [("a", {"gb_s": 50.0, "tflop_s": 1.2, "percent_of_floor": 120.0}), ("net", {"ms": 1.0})]
    mend(rows, Ceilings(100.0, 1.0), Ceilings(80.0, 2.0))
    assert rows[0][1] == {"gb_s": 50.0, "tflop_s": 1.2, "copy_gb_s": 100.0, "matmul_tflop_s": 2.0,
                          "percent_of_floor": 60.0}  # fmt: skip
    assert rows[1][1] == {"ms": 1.0}


@pytest.mark.parametrize(
    ("bytes_per_call", "cold", "expected"),
    [(1, True, MOST_SETS), (50 * 2**20, True, 1 + COLD_CACHES), (10 * 2**20, True, 16),
     (2**40, True, 2), (2**40, False, 1)],
)  # fmt: skip
def test_sets_of_a_cold_measurement_fill_the_l2(monkeypatch, bytes_per_call, cold, expected):
    h200 = SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    assert count_sets(GPU, bytes_per_call, cold) == expected
    assert count_sets(CPU, bytes_per_call, cold) == 1


@pytest.mark.parametrize(
    ("initialized", "visible", "expected"),
    [(True, "3", "GPU-b"), (False, "3,1", 3), (False, "GPU-c,GPU-d", "GPU-c"), (False, "", 0)],
)
def test_clocks_are_of_torchs_first_gpu(monkeypatch, initialized, visible, expected):
    nvml = SimpleNamespace(
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid, nvmlDeviceGetHandleByIndex=lambda index: index
    )
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid="b"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment._first_gpu(nvml) == expected
