"""The launch table's sweep: which candidate is written down, and on what evidence."""

import json
import os
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from bench import sweep, sweep_candidates
from bench.ceilings import Ceilings
from bench.results import Results
from bench.timing import Samples
from ddpm_fast.kernels.dropout.op import SPEC
from ddpm_fast.kernels.tuning import lookup as launch
from ddpm_fast.nn import norm
from ddpm_fast.nn.config import preset
from ddpm_fast.nn.unet import UNet

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


STORED = json.loads(sweep.CHOSEN.read_text())["classes"]


def test_a_dry_run_names_every_class_and_leaves_a_table_that_the_kernels_can_read(results):
    sweep.sweep(results, CPU, CEILINGS, dry_run=True)
    assert json.loads(results.path.with_name("launch_table.json").read_text()) == {}
    rows = {row["name"]: row["why_not"] for row in results.rows}
    assert list(rows) == [f"{row['kernel']} {row['shape_class']}" for row in STORED]
    assert all(why_not.startswith("dry run") for why_not in rows.values())


def test_what_is_swept_on_one_device_becomes_its_own_rows(monkeypatch, results):
    monkeypatch.setattr(sweep, "device_name_of", lambda device: "NVIDIA H200")
    monkeypatch.setattr(sweep, "_best", lambda *found: {"num_warps": 4, "evidence": "none"})
    sweep.sweep(results, CPU, CEILINGS, dry_run=False)
    table = json.loads(results.path.with_name("launch_table.json").read_text())
    assert len(table["group_norm_silu.forward"]["90 NVIDIA H200"]) > 10
    assert all(list(rows) == ["90 NVIDIA H200"] for rows in table.values())


def test_every_class_has_at_most_five_of_the_candidates_that_its_kernel_offers():
    offered = {(found.kernel, found.shape_class): found for found in sweep.classes(90)}
    assert offered.keys() == {(row["kernel"], row["shape_class"]) for row in STORED}
    for row in STORED:
        found, kept = offered[row["kernel"], row["shape_class"]], row["candidates"]
        assert 0 < len(kept) <= 5 and all(each in found.candidates for each in kept), row


def test_classes_are_swept_in_the_order_of_their_time_in_a_step():
    times = [row["predicted_step_us"] for row in STORED]
    assert times == sorted(times, reverse=True) and times[0] > 500
    first = {(row["kernel"], row["shape_class"]) for row in STORED[:3]}
    assert ("group_norm_silu.backward", "hw1024 c128 g32 16bit dropout") in first


@pytest.mark.parametrize(
    ("direction", "first"),
    [("backward", [(4, 8), (4, 16)]), ("forward", [(4, 16), (8, 16)])],
)
@pytest.mark.parametrize("dropout", ["", " dropout"])
def test_tiles_that_hold_a_whole_group_are_timed_first(direction, first, dropout):
    key = (f"group_norm_silu.{direction}", f"hw1024 c128 g32 16bit{dropout}")
    (row,) = (row for row in STORED if (row["kernel"], row["shape_class"]) == key)
    kept = row["candidates"][:2]
    assert all(each["BLOCK_HW"] == 1024 for each in kept)
    assert sorted((each["GROUPS"], each["num_warps"]) for each in kept) == first


def test_what_spills_is_dropped_and_five_are_kept_in_the_kernels_order(monkeypatch):
    found = next(each for each in sweep.classes(90) if each.kernel == "adamw_ema.forward")
    monkeypatch.setattr(
        sweep_candidates, "launch_of", lambda found, numbers=None: SimpleNamespace(name=numbers)
    )
    monkeypatch.setattr(sweep_candidates.offline, "source_of", lambda launch: launch.name)
    monkeypatch.setattr(sweep_candidates.offline, "options_of", lambda launch: {})
    spilling = found.candidates[1]
    monkeypatch.setattr(
        sweep_candidates.offline, "misfits", lambda numbers, *_: ["spills"] * (numbers == spilling)
    )
    row = sweep_candidates.row_of(found, {})
    assert row["candidates"] == [found.candidates[i] for i in (0, 2, 3, 4, 5)]


def test_norms_are_counted_as_the_cifar10_net_has_them(monkeypatch):
    found = Counter()

    def counted(x, weight, *_, dropout=0.0, residual=None, **options):
        found[weight.shape[0], x.shape[2] * x.shape[3], dropout > 0] += 1
        y = x.new_empty(len(x), weight.shape[0], *x.shape[2:])
        return y if residual is None else (y, x + residual)

    monkeypatch.setattr(norm, "runs_fused", lambda impl, x: True)
    monkeypatch.setattr(norm.ops, "group_norm_silu", counted)
    with FakeTensorMode():
        net = UNet.from_config(preset("cifar10")).train()
        net(torch.empty(2, 3, 32, 32), torch.zeros(2).long())
    assert found == sweep_candidates.NORMS
