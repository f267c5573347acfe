"""The launch table's sweep: which candidate is written down, and on what evidence."""

import json
import os

import pytest
import torch

from bench import sweep
from bench.ceilings import Ceilings
from bench.results import Results
from bench.timing import Samples
from ddpm_fast.kernels import launch
from ddpm_fast.kernels.dropout import SPEC

CPU, CEILINGS = torch.device("cpu"), Ceilings(100.0, 1.0)
CASE = next(case for case in SPEC.cases if case.small)
KERNEL, SHAPE_CLASS = "dropout.forward", "small"


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "sweep.json", "sweep", 100.0)


def best(monkeypatch, results, times):
    """What the sweep chooses where {candidate's BLOCK or None: ms or an error}."""

    def timed(table, spec, case, which, device):
        row = table.get(KERNEL, {}).get("90", {}).get(SHAPE_CLASS)
        found = times[row and row["BLOCK"]]
        if isinstance(found, Exception):
            raise found
        return Samples((found,))

    monkeypatch.setattr(sweep, "_time_with", timed)
    candidates = [{"BLOCK": block} for block in times if block is not None]
    return sweep._best(results, SPEC, CASE, KERNEL, SHAPE_CLASS, candidates, CPU, CEILINGS)


def test_the_fastest_candidate_is_written_with_its_evidence(monkeypatch, results):
    found = best(monkeypatch, results, {None: 2.0, 64: 1.5, 128: 1.0})
    assert found["BLOCK"] == 128
    assert "forward of 4x32x16x16 1 ms" in found["evidence"]
    assert "best of 2; default 2 ms; commit " in found["evidence"]


def test_a_gain_within_the_noise_writes_no_row(monkeypatch, results):
    assert best(monkeypatch, results, {None: 1.01, 64: 1.0}) is None


def test_a_candidate_that_fails_is_a_row_with_its_reason(monkeypatch, results):
    found = best(monkeypatch, results, {None: 2.0, 64: ValueError("out of\nregisters"), 128: 1.0})
    assert found["BLOCK"] == 128
    assert [row["why_not"] for row in results.rows if "why_not" in row] == [
        "ValueError: out of registers"
    ]


def test_the_kernels_see_the_swept_table_and_then_their_own_again(monkeypatch):
    seen = []

    def fused(**inputs):
        seen.append(launch.lookup(KERNEL, SHAPE_CLASS, 90))
        return SPEC.reference(**inputs)

    spec = sweep.KernelSpec(**{**vars(SPEC), "fused": fused})
    before = launch.lookup(KERNEL, SHAPE_CLASS, 90), os.environ.get(sweep.TABLE_VARIABLE)
    table = {KERNEL: {"90": {SHAPE_CLASS: {"BLOCK": 256}}}}
    sweep._time_with(table, spec, CASE, "forward", CPU)
    assert seen and all(row == {"BLOCK": 256} for row in seen)
    assert before == (launch.lookup(KERNEL, SHAPE_CLASS, 90), os.environ.get(sweep.TABLE_VARIABLE))


def test_a_sweep_leaves_a_table_that_the_kernels_can_read(results):
    sweep.sweep(results, CPU, CEILINGS, dry_run=True)
    assert json.loads(results.path.with_name("launch_table.json").read_text()) == {}
    rows = {row["name"]: row["why_not"] for row in results.rows}
    assert rows["dropout"] == "offers no sweep_candidates"
