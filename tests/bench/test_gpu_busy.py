"""The GPU's busy share and the profile of a step: overlapping kernels count once as time covered,
names that span several kernels not at all."""

import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench import step_profile
from bench.gpu_busy import columns, covered
from bench.step_profile import Span, on_the_gpu, profile_of, record, text_of


def event(start, end, device=DeviceType.CUDA, annotation=False):
    time_range = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(
        name="k", device_type=device, time_range=time_range, is_user_annotation=annotation
    )


def test_kernels_at_the_same_time_count_once():
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.0)]) == 4.0
    assert covered([]) == 0.0


def test_only_what_runs_on_the_gpu_counts():
    events = [
        event(0.0, 2.0), event(0.0, 9.0, annotation=True), event(0.0, 9.0, DeviceType.CPU),
    ]  # fmt: skip
    assert list(on_the_gpu(events)) == [Span("k", 0.0, 2.0)]


def test_the_share_says_how_it_was_found_or_that_it_was_not():
    found = columns([Span("k", 0.0, 97.0)], 100.0)
    assert found["gpu_busy_percent"] == 97.0 and "torch.profiler" in found["gpu_busy_by"]
    assert found["profile"]["kernels"][0]["name"] == "k"
    assert columns([], 100.0) == {"gpu_busy_by": "not found: torch.profiler saw no kernels"}


@pytest.mark.parametrize(("before", "then"), [(None, "0"), ("1", "1")])
def test_a_profiler_on_cuda_leaves_cupti_up_for_the_next_unless_told_otherwise(
    monkeypatch, before, then
):
    monkeypatch.setenv("TEARDOWN_CUPTI", "1")  # to be taken back at the end
    monkeypatch.setenv("DISABLE_CUPTI_LAZY_REINIT", "1")
    if before is None:
        monkeypatch.delenv("TEARDOWN_CUPTI")
    found = []

    @contextmanager
    def profiler(activities):
        found.append((activities, os.environ.get("TEARDOWN_CUPTI")))
        yield SimpleNamespace(events=list)

    monkeypatch.setattr(step_profile, "profiler_of", profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert record(lambda: None, torch.device("cuda"), steps=1) == []
    assert found == [([ProfilerActivity.CUDA], then)]


def test_a_profile_is_of_one_step_and_sums_a_kernels_calls():
    spans = [Span("conv", 0.0, 40.0), Span("conv", 50.0, 90.0), Span("cast", 0.0, 4.0)]
    spans += [Span("cast", 9.0, 10.0)]
    found = profile_of(spans, steps=2)
    assert found["kernels"] == [
        {"name": "conv", "us": 40.0, "calls": 1.0}, {"name": "cast", "us": 2.5, "calls": 1.0},
    ]  # fmt: skip
    assert (found["us"], found["calls"], found["steps"]) == (42.5, 2.0, 2)
    assert (found["short_us"], found["short_calls"]) == (2.5, 1.0)  # by the mean call


def test_the_totals_of_a_profile_hold_the_kernels_that_its_list_leaves_out(monkeypatch):
    monkeypatch.setattr(step_profile, "MOST_KERNELS", 3)
    monkeypatch.setattr(step_profile, "NAME_CHARACTERS", 8)
    found = profile_of([Span(f"kernel {i}", 0.0, 10.0 + i) for i in range(5)], steps=1)
    assert [row["us"] for row in found["kernels"]] == [14.0, 13.0, 12.0]
    assert (found["us"], found["calls"]) == (60.0, 5.0)
    assert all(len(row["name"]) == 8 for row in found["kernels"])


def test_on_a_cpu_the_profile_is_of_operators_without_those_that_they_call():
    x = torch.randn(64, 64)
    found = profile_of(record(lambda: torch.nn.functional.linear(x, x), torch.device("cpu"), 3), 3)
    by_name = {row["name"]: row for row in found["kernels"]}
    assert by_name["aten::linear"]["calls"] == 1.0
    assert by_name["aten::mm"]["us"] > 0 or by_name["aten::addmm"]["us"] > 0
    assert found["us"] == pytest.approx(sum(row["us"] for row in found["kernels"]), rel=0.01)


def test_the_text_of_a_profile_has_a_line_a_kernel_with_its_share():
    found = profile_of([Span("conv", 0.0, 30.0), Span("cast", 0.0, 2.0)] * 2, steps=2)
    lines = text_of(found, "ours").splitlines()
    assert lines[0].startswith("ours: 2 kernels a step, 32.0 us")
    assert lines[1].split() == ["30.0", "us", "93.8", "%", "1.0", "x", "conv"]
