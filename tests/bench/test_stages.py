"""Stages of the GPU suite: one kernel's error is its own, killed tests leave what they found."""

import errno
import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import failures, gpu_tests, kernel_rows, model_rows, outcomes, stages
from bench.ceilings import Ceilings
from bench.failures import DeviceLost
from bench.models import Setup
from bench.results import DEVICE_LOST, SUITE, Results, read_json, started_row, write_json
from bench.subjects import Subject
from ddpm_fast import kernels
from ddpm_fast.kernels.dropout.op import SPEC

CPU, CEILINGS = torch.device("cpu"), Ceilings(copy_gb_s=10.0, matmul_tflop_s=0.1)


@pytest.fixture
def results(tmp_path):
    write_json(tmp_path / SUITE, {"stages": {"ceilings": dict(copy_gb_s=1.0, matmul_tflop_s=1.0)}})
    return Results(tmp_path / "stage.json", "kernels", 1000.0)


@pytest.fixture
def measured(monkeypatch):
    """The cases that run_kernels measures, of kernels a to c with two cases each; b's fail."""
    seen = []

    def measure(results, spec, case, *_):
        seen.append(f"{spec.name}{case.name}")
        if spec.name == "b":
            raise RuntimeError("CUDA error:\nillegal")
        results.add(seen[-1], impl="ours", ms=1.0)

    cases = [SimpleNamespace(name=name, small=False) for name in "12"]
    specs = [SimpleNamespace(name=name, cases=cases) for name in "abc"]
    monkeypatch.setattr(kernels, "SPECS", specs)
    monkeypatch.setattr(stages, "_measure_case", measure)
    return seen


def test_a_kernel_that_fails_is_told_and_the_others_go_on(results, measured):
    with pytest.raises(stages.StageFailed, match="b 1 ours: fails: RuntimeError: CUDA error: il"):
        stages.run_kernels(results, CPU, dry_run=False)
    assert measured == ["a1", "b1", "c1", "a2", "b2", "c2"]


def test_kernels_that_most_of_a_step_is_made_of_come_first(results, measured, monkeypatch):
    monkeypatch.setattr(stages, "FIRST_KERNELS", ("c", "a"))
    with pytest.raises(stages.StageFailed):
        stages.run_kernels(results, CPU, dry_run=False)
    assert measured == ["a1", "c1", "a2", "c2", "b1", "b2"]
    names = {import_module(f"ddpm_fast.kernels.{name}.op").SPEC.name for name in kernels.MODULES}
    monkeypatch.undo()
    assert set(stages.FIRST_KERNELS) <= names


def test_after_a_lost_device_another_process_goes_on_behind_that_kernel(
    results, measured, monkeypatch
):
    monkeypatch.setattr(stages, "is_lost", lambda device: True)
    with pytest.raises(DeviceLost, match="b 1"):
        stages.run_kernels(results, CPU, dry_run=False)
    assert measured == ["a1", "b1"]
    measured.clear()
    again = Results(results.path, "kernels", 1000.0)
    again.go_on(results.data)
    with pytest.raises(stages.StageFailed, match="^b 1 ours: fails"):
        stages.run_kernels(again, CPU, dry_run=False)
    assert measured == ["c1", "a2", "c2"]
    assert [row["name"] for row in again.rows] == ["a1", "b 1 ours", "c1", "a2", "c2"]


def test_a_stage_goes_on_after_the_rows_it_has_and_its_imports_count(tmp_path, monkeypatch):
    def run(results, device, dry_run):
        left_s.append(results.left_s())
        results.add("second")
        raise DeviceLost("second")

    left_s = []
    write_json(tmp_path / "kernels.json", {"rows": [{"name": "first"}], "lost": ["x"], "next": 2})
    monkeypatch.setattr(stages, "run_kernels", run)
    command = ["kernels", "--out", str(tmp_path), "--seconds", "100", "--dry-run", "--go-on"]
    started = f"{time.monotonic() - 30:.3f}"
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(stages, "stop_on_sigterm", lambda: None)
    monkeypatch.setattr(stages, "end_with_parent", lambda: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # and back at the end
    assert stages.main([*command, "--started", started]) == DEVICE_LOST
    found = read_json(tmp_path / "kernels.json")
    assert [row["name"] for row in found["rows"]] == ["first", "second"] and found["next"] == 2
    assert left_s[0] == pytest.approx(100 - 30 - stages.MARGIN_S, abs=3)


def test_a_lost_device_is_one_that_fails_at_the_next_call_too(monkeypatch):
    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert not failures.is_lost(CPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not failures.is_lost(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert failures.is_lost(torch.device("cuda"))


def test_a_pass_stops_where_one_of_its_subjects_loses_the_device(monkeypatch):
    def broken(**inputs):
        raise RuntimeError("illegal access")

    values = next(case.values for case in SPEC.cases if case.small)
    subjects = [Subject("ours", broken, 1.0), Subject("eager", SPEC.reference, 1.0)]
    arguments = (SPEC, subjects, values, CPU, torch.float32, "forward", CEILINGS)
    rows = kernel_rows.compare(*arguments, seconds=0.01)
    assert rows[0]["why_not"] == "fails: RuntimeError: illegal access" and rows[1]["ms"] > 0
    monkeypatch.setattr(kernel_rows, "is_lost", lambda device: True)
    with pytest.raises(RuntimeError, match="illegal"):
        kernel_rows.compare(*arguments, seconds=0.01)


def test_a_model_that_loses_the_device_has_its_row_and_is_not_measured_again(results, monkeypatch):
    setups = [Setup(net=net, bf16=False, recompute="nonsense") for net in ("ours", "ours")]
    setups[1] = Setup(net="original", bf16=False)
    monkeypatch.setattr(model_rows, "MEMORY", setups)
    monkeypatch.setattr(model_rows, "is_lost", lambda device: True)
    with pytest.raises(DeviceLost):
        model_rows.measure_memory(results, CPU, CEILINGS, dry_run=True)
    assert [row["why_not"][:5] for row in results.rows] == ["fails"]
    again = Results(results.path, "memory", 1000.0)
    again.go_on(results.data)
    model_rows.measure_memory(again, CPU, CEILINGS, dry_run=True)
    assert len(again.rows) == 2 and again.rows[1]["ms"] > 0


def test_what_is_not_installed_is_the_first_row(results, monkeypatch):
    measure = stages.bench_ceilings.measure
    monkeypatch.setattr(
        stages.bench_ceilings, "measure", lambda device, tiny: measure(device, tiny=True)
    )
    monkeypatch.setattr(stages.packages, "missing", lambda: {"tyro": "not there"})
    stages.run_ceilings(results, CPU, dry_run=True)
    assert results.rows[0]["name"] == "packages"
    assert "tyro (not there)" in results.rows[0]["found"]


def test_shares_of_the_floor_are_by_the_larger_ceilings_of_before_and_after(results, monkeypatch):
    """Those of kernels by their rates, those of nets as they would have been counted with them."""
    after = Ceilings(copy_gb_s=20.0, matmul_tflop_s=0.05)
    monkeypatch.setattr(stages.bench_ceilings, "measure", lambda device, tiny: (after, []))

    def add(results, *_):
        setup = Setup(net="ours", bf16=False)
        results.add("red", impl="other", why_not="parity: red")
        model = model_rows.Model(setup, CPU, 2, tiny=True)
        samples = model_rows.Samples((50.0,))
        columns = model_rows.figures(model, "forward", samples, CEILINGS)
        results.add("net", what="forward", preset="cifar10", impl=setup.label, batch=2, ms=50.0,
                    **columns)  # fmt: skip
        by_larger.update(model_rows.figures(model, "forward", samples, Ceilings(20.0, 0.1)))

    by_larger = {}
    monkeypatch.setattr(stages, "read_ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr(model_rows, "measure_models", add)
    stages.run_models(results, CPU, dry_run=True)
    red, net = results.rows
    assert "percent_of_floor" not in red
    assert net["percent_of_floor"] == by_larger["percent_of_floor"]
    assert net["mfu_percent"] == by_larger["mfu_percent"]
    assert results.data["copy_gb_s"] == 20.0 and results.data["matmul_tflop_s"] == 0.1
    row = dict(name="k", impl="ours", gb_s=10.0, percent_of_floor=100.0)
    results.rows[:] = [row]
    monkeypatch.setattr(kernels, "SPECS", [SimpleNamespace(name="a", cases=[])])
    stages.run_kernels(results, CPU, dry_run=True)
    assert row["percent_of_floor"] == 50.0


def test_a_stage_refers_to_the_largest_ceilings_that_were_found_before_it(results):
    found = {"ceilings": dict(copy_gb_s=1.0, matmul_tflop_s=2.0), "tests": {},
             "kernels": dict(copy_gb_s=3.0, matmul_tflop_s=1.0)}  # fmt: skip
    write_json(results.path.with_name(SUITE), {"stages": found})
    assert stages.read_ceilings(results, CPU, True) == Ceilings(3.0, 2.0)


TESTS = """
import pytest

def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip
def test_not_here(): pass
@pytest.fixture
def broken():
    yield
    raise OSError("full")
def test_breaks_later(broken): pass
"""


def test_outcomes_are_in_the_file_as_they_come(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_bad_import.py").write_text("import nothing_of_that_name")
    path = tmp_path / "outcomes.jsonl"
    flags = ["-p", "no:cacheprovider", "-p", "no:terminal", "--rootdir", str(tmp_path)]
    flags += ["--continue-on-collection-errors", "--import-mode=importlib", "-c", os.devnull]
    pytest.main([*flags, str(tmp_path)], plugins=[outcomes.Recorder(path)])
    with open(path, "a") as file:
        file.write('{"name": "cut sh')
    found = outcomes.read(path)
    assert {name.rpartition("::")[2] or name: row["outcome"] for name, row in found.items()} == {
        "test_bad_import.py": "failed", "test_good": "passed", "test_bad": "failed",
        "test_not_here": "skipped", "test_breaks_later": "failed",
    }  # fmt: skip
    why = {name.rpartition("::")[2]: row["why"] for name, row in found.items()}
    assert why["test_bad"] == "assert 1 == 2" and why["test_breaks_later"] == "OSError: full"


def test_tests_that_do_not_stop_when_interrupted_are_killed_and_counted(results, monkeypatch):
    monkeypatch.setattr(gpu_tests, "GRACE_S", 0.2)
    monkeypatch.setattr(gpu_tests, "NOTE_S", 0.05)
    lines = [dict(name=f"t{i}", outcome="passed", why="") for i in range(3)]
    lines.append(dict(name="t9", outcome="failed", why="no"))
    code = (
        "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        f"open(os.environ[{outcomes.VARIABLE!r}], 'w').write({''.join(map(lines_of, lines))!r});"
        "time.sleep(60)"
    )
    environs = []
    run = gpu_tests._run_or_interrupt
    monkeypatch.setattr(
        gpu_tests, "_run_or_interrupt",
        lambda command, seconds, environ, note: environs.append(environ) or run(
            [sys.executable, "-c", code], 1.0, environ, note
        ),
    )  # fmt: skip
    start = time.monotonic()
    with pytest.raises(stages.StageFailed):
        stages.run_tests(results, CPU, dry_run=True)
    assert time.monotonic() - start < 10
    assert environs[0]["DDPM_FAST_TRIALS"] == "5"
    assert results.rows == [
        {"name": "pytest -m gpu", "found": "3 passed, 1 failed, 0 skipped, exit code -9"},
        {"name": "t9", "found": "no"},
    ]


def lines_of(row):
    return json.dumps(row) + "\n"


def test_a_row_that_a_killed_stage_had_started_leaves_a_trace(tmp_path):
    results = Results(tmp_path / "models.json", "models", 100.0)
    assert not results.over("first")
    results.add("first batch 128", ms=1.0)
    assert started_row(read_json(results.path)) is None
    assert not results.over("second")
    assert started_row(read_json(results.path))["name"] == "second"
    again = Results(tmp_path / "models.json", "models", 100.0)
    again.go_on(read_json(results.path) or results.data)
    assert started_row(again.data) is None


def test_on_a_full_disk_a_stage_goes_on_and_its_rows_stand_in_its_output(
    tmp_path, monkeypatch, capsys
):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    results = Results(tmp_path / "kernels.json", "kernels", 100.0)
    results.add("first", ms=1.0)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        results.add("second", ms=2.0)
        results.add("third", ms=3.0)
    said = capsys.readouterr().out
    assert "second  ms=2.0" in said and said.count("No space left") == 1
    assert [row["name"] for row in read_json(results.path)["rows"]] == ["first"]
    results.add("fourth", ms=4.0)
    assert len(read_json(results.path)["rows"]) == 4 and len(list(tmp_path.iterdir())) == 1
