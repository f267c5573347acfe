"""Parts of a step: every way computes the same, and one that does not has no figure."""

import pytest
import torch

from bench import stages, step_parts
from bench.results import Results
from bench.step_parts import Part, measure_step_parts

CPU = torch.device("cpu")


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "parts.json", "parts", 1000.0)


@pytest.fixture
def once(monkeypatch, one_thread):
    timed = step_parts.time_in_turns
    monkeypatch.setattr(
        step_parts, "time_in_turns", lambda calls, device, seconds: timed(calls, device, repeats=1)
    )


def test_every_part_has_a_first_way_and_others_of_the_same_result(results, once):
    measure_step_parts(results, CPU, dry_run=True)
    assert all(row["parity"].startswith("green") and row["ms"] > 0 for row in results.rows)
    ways = {}
    for row in results.rows:
        ways.setdefault(row["what"].split(" ")[0], []).append((row["impl"], "speedup" in row))
    both = [False, True]
    assert [compared for _, compared in ways["upsample"]] == both * 2  # forward, backward
    assert ways["first"] == [("plain", False), ("padded to 8 channels", True)] * 2
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
    with pytest.raises(stages.StageFailed, match="not the same function: p b"):
        stages.run_parts(results, CPU, dry_run=True)


def test_an_optimizer_that_leaves_the_averages_is_red(monkeypatch):
    def without(parameters, averages):
        return step_parts._foreach_step(parameters, [each.clone() for each in averages])

    monkeypatch.setattr(step_parts, "_fused_step", without)
    (part,) = step_parts._optimizer(CPU, True)
    assert not part.parity("FusedAdamW").green
