"""Parts of a step: every way computes the same, and one that does not has no figure."""

import contextlib

import pytest
import torch

from bench import convolutions, part, stages, step_parts
from bench.convolutions import LIMITS, UPSAMPLED, algorithms
from bench.part import Part
from bench.results import Results
from bench.step_parts import measure_step_parts
from ddpm_fast.nn.unet import UNet
from ddpm_fast.nn.upsample import Upsample

CPU = torch.device("cpu")


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "parts.json", "parts", 1000.0)


@pytest.fixture
def once(monkeypatch, one_thread):
    timed = part.time_in_turns
    monkeypatch.setattr(
        part, "time_in_turns", lambda calls, device, **_: timed(calls, device, repeats=1)
    )


def test_every_part_has_a_first_way_and_others_of_the_same_result(results, once):
    measure_step_parts(results, CPU, dry_run=True)
    assert all(row["parity"].startswith("green") and row["ms"] > 0 for row in results.rows)
    ways = {}
    for row in results.rows:
        ways.setdefault(row["what"].split(" ")[0], []).append((row["impl"], "speedup" in row))
    both = [False, True]
    passes = 2 * len(LIMITS)  # forward, backward
    assert [compared for _, compared in ways["upsample"]] == both * passes
    assert ways["first"] == [("plain", False), ("padded to 8 channels", True)] * passes
    assert ways["last"] == [("plain", False), ("padded to 8 outputs", True)] * passes
    assert ways["3x3"] == [("cuDNN", False)] * passes
    assert ways["clip,"] == [
        ("fused + foreach", False), ("fused, as the trainer", True), ("FusedAdamW", True),
    ]  # fmt: skip
    assert ways["q_sample"] == [("plain", False), ("ours", True)]


def test_a_way_that_computes_something_else_has_no_figure(results, once, monkeypatch):
    ones = torch.ones(3)
    part = Part("p", {"a": list, "b": list}, {"a": [ones], "b": [1.1 * ones]}, 1e-2)
    step_parts._measure(results, part, CPU, 0.1)
    first, other = results.rows
    assert first["ms"] >= 0 and "ms" not in other
    assert other["why_not"] == "parity: red: result of a 1.0e-01 of 1e-02"
    monkeypatch.setattr(step_parts, "measure_step_parts", lambda *_: None)
    with pytest.raises(stages.StageFailed, match="p b"):
        stages.run_parts(results, CPU, dry_run=True)


def test_an_optimizer_that_leaves_the_averages_is_red(monkeypatch):
    def without(parameters, averages):
        return step_parts._foreach_step(parameters, [each.clone() for each in averages])

    monkeypatch.setattr(step_parts, "_fused_step", without)
    (part,) = step_parts._optimizer(CPU, True)
    assert not part.parity("FusedAdamW").green


def test_convolutions_are_timed_by_ten_and_by_all_algorithms_of_different_shapes(
    results, once, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        step_parts, "convolutions", lambda device, images, tiny: asked.append(images) or {}
    )
    monkeypatch.setattr(step_parts, "_q_sample", lambda *_: [])
    monkeypatch.setattr(step_parts, "_optimizer", lambda *_: [])
    measure_step_parts(results, CPU, dry_run=False)
    assert list(LIMITS.values()) == [10, 0]
    assert len(set(asked)) == 2  # a shape that cuDNN has met keeps its algorithm


def test_a_part_that_fails_is_told_and_the_others_go_on(results, once, monkeypatch):
    def fails():
        raise RuntimeError("no engine")

    def makers(device, images, tiny):
        return {"bad": fails, "good": found["3x3 (8, 8, 8)"]}

    found = convolutions.convolutions(CPU, 2, True)
    monkeypatch.setattr(step_parts, "convolutions", makers)
    with pytest.raises(stages.StageFailed, match="bad, 10 algorithms"):
        stages.run_parts(results, CPU, dry_run=True)
    assert sum("why_not" in row for row in results.rows) == len(LIMITS)
    assert sum(row["name"].startswith("3x3") for row in results.rows) == 2 * len(LIMITS)


def test_after_a_lost_device_the_parts_go_on_behind_the_one_that_lost_it(
    results, once, monkeypatch
):
    def fails():
        raise RuntimeError("illegal access")

    monkeypatch.setattr(
        step_parts,
        "convolutions",
        lambda device, images, tiny: {"bad": fails, "good": list},
    )
    monkeypatch.setattr(step_parts, "is_lost", lambda device: True)
    with pytest.raises(stages.DeviceLost, match="bad"):
        measure_step_parts(results, CPU, dry_run=True)
    again = Results(results.path, "parts", 1000.0)
    again.go_on(results.data)
    with pytest.raises(stages.DeviceLost, match="bad, all"):
        measure_step_parts(again, CPU, dry_run=True)
    assert [row["name"] for row in again.rows if "why_not" in row] == [
        f"bad, {name}" for name in LIMITS
    ]


def test_the_upsampled_sizes_are_the_cifar10_nets():
    with torch.device("meta"):
        net = UNet.from_preset("cifar10")
        seen = []
        for module in net.modules():
            if isinstance(module, Upsample):
                module.register_forward_pre_hook(
                    lambda module, args: seen.append((args[0].shape[1], args[0].shape[2]))
                )
        net(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64))
    assert sorted(seen) == sorted(UPSAMPLED)


@pytest.mark.parametrize("fails", [False, True])
def test_the_algorithms_limit_ends_with_its_block(monkeypatch, fails):
    class cudnn:
        benchmark_limit = 10

        @staticmethod
        def is_available():
            return True

    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    with contextlib.suppress(RuntimeError), algorithms(0):
        assert cudnn.benchmark_limit == 0
        if fails:
            raise RuntimeError
    assert cudnn.benchmark_limit == 10
