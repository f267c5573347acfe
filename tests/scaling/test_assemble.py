"""Rows from what ranks wrote, the model's fit, and predictions."""

import numpy as np
import pytest

from ddpm_fast.scaling.assemble import (
    add_predictions,
    add_speedups,
    measured_parts,
    measured_row,
    median_interval,
    relative_spread,
)
from ddpm_fast.scaling.predict import make_model


def phase(batch=16, step_s=0.08, alone_s=0.07, **changes):
    return {
        "batch": batch, "steps_per_window": 10, "window_s": [10 * step_s] * 5,
        "alone_window_s": [10 * alone_s] * 5, "alone_step_s": [alone_s] * 50,
        "forward_s": 0.02, "data_s": 0.001, "optimizer_s": 0.004, "compute_s": alone_s - 0.005,
        "communication_s": 0.015, "joules": None, "loss": 1.0, "memory_phases_gib": {"net": 0.4},
        "memory": {"allocated_gib": None, "reserved_gib": None, "process_gib": 0.5},
    } | changes  # fmt: skip


def rank(number, world_size, **phases):
    return {
        "rank": number, "world_size": world_size, "parameters": 100, "bucket_bytes": [400],
        "phases": phases, "compute_alone": [],
        "all_reduce": [{"bytes": b, "seconds": 1e-4 + b / 1e9} for b in (1000, 10**6)]
        if world_size > 1 else [],
    }  # fmt: skip


def test_a_window_ends_with_its_slowest_rank():
    ranks = [rank(0, 2, weak=phase(step_s=0.08)), rank(1, 2, weak=phase(step_s=0.1))]
    row = measured_row("weak", ranks)
    assert row["step_ms"] == pytest.approx(100)
    assert row["images_per_s"] == pytest.approx(320)


def test_the_split_adds_up_to_the_step():
    split = measured_row("weak", [rank(r, 2, weak=phase()) for r in range(2)])["split_ms"]
    assert split["exposed_communication"] == pytest.approx(10)
    assert split["overlapped_communication"] == pytest.approx(5)
    assert sum(split.values()) - split["overlapped_communication"] == pytest.approx(80)


def test_skew_is_of_steps_without_communication():
    ranks = [rank(0, 2, weak=phase(alone_s=0.05)), rank(1, 2, weak=phase(alone_s=0.06))]
    assert measured_row("weak", ranks)["skew"] == pytest.approx(1.2)


def test_energy_is_of_all_ranks_over_all_images():
    ranks = [rank(r, 2, weak=phase(joules=800.0)) for r in range(2)]
    assert measured_row("weak", ranks)["joules_per_image"] == pytest.approx(1.0)


def test_speedups_of_both_modes_start_at_the_row_of_one_rank():
    parts = measured_parts(
        [[rank(0, 1, weak=phase(step_s=0.07))],
         [rank(r, 2, weak=phase(), strong=phase(8, 0.05)) for r in range(2)]], 16)  # fmt: skip
    one, weak, strong = parts["rows"]
    assert one["speedup"] == one["efficiency"] == 1
    assert weak["efficiency"] == pytest.approx(70 / 80)
    assert strong["speedup"] == pytest.approx(70 / 50)
    assert strong["serial_fraction"] == pytest.approx((50 / 70 - 0.5) / 0.5)


def test_without_one_rank_the_smallest_world_counts_as_ideal():
    rows = [measured_row("weak", [rank(r, n, weak=phase()) for r in range(n)]) for n in (2, 4)]
    add_speedups(rows, 16)
    assert [row["speedup"] for row in rows] == [2, 4]


def test_a_world_with_a_missing_rank_or_phase_gives_what_all_ranks_have():
    lost = [rank(0, 2, weak=phase(), strong=phase(8))]
    half = [rank(0, 2, weak=phase(), strong=phase(8)), rank(1, 2, weak=phase())]
    assert measured_parts([lost], 16)["rows"] == []
    assert [row["mode"] for row in measured_parts([half], 16)["rows"]] == ["weak"]


def test_the_interval_of_a_median_holds_the_median_and_grows_with_the_spread():
    low, high = median_interval([9, 10, 10, 10, 11])
    assert 9 <= low <= 10 <= high <= 11
    assert median_interval([10] * 5) == (10, 10)


def test_the_relative_spread_of_normal_values_is_their_standard_deviation():
    values = np.random.default_rng(0).normal(50, 5, 20_000)
    assert relative_spread(values) == pytest.approx(0.1, rel=0.05)


def test_predictions_carry_their_word_inputs_and_residuals(predicted):
    weak = [row for row in predicted["predicted"] if row["mode"] == "weak"]
    assert [(row["label"], row["world_size"]) for row in weak] == [("PREDICTED", 8),
                                                                   ("PREDICTED", 64)]  # fmt: skip
    assert weak[0]["inputs"]["bus_gbytes_per_s"] == pytest.approx(1.0, rel=0.01)
    assert len(predicted["model"]["residuals"]) == 3
    assert max(abs(r["relative"]) for r in predicted["model"]["residuals"]) < 0.1


def test_more_ranks_are_predicted_to_be_less_efficient(predicted):
    efficiency = [row["efficiency"] for row in predicted["predicted"] if row["mode"] == "weak"]
    measured = [row["efficiency"] for row in predicted["rows"] if row["mode"] == "weak"]
    assert [*measured, *efficiency] == sorted([*measured, *efficiency], reverse=True)


def test_the_simulation_behind_a_prediction_is_near_its_closed_form(predicted):
    for row in predicted["predicted"]:
        assert row["simulated_step_ms"] == pytest.approx(row["step_ms"], rel=0.05)


def test_a_batch_that_cannot_be_divided_has_no_strong_prediction(predicted):
    strong = [row["world_size"] for row in predicted["predicted"] if row["mode"] == "strong"]
    assert strong == [8]
    assert any("cannot be divided" in note for note in predicted["notes"])


def test_one_measured_rank_needs_published_figures_for_predictions(result):
    result |= {"rows": result["rows"][:1], "all_reduce": [], "kind": "gpu", "backend": "nccl"}
    model, why_not = make_model(result)
    assert model is None and "--interconnect" in why_not
    add_predictions(result, [8, 1024], "h200-nvlink")
    assert result["predicted"][0]["efficiency"] > 0.9
    assert "published figures" in result["model"]["assumed"][0]
    assert result["predicted"][-1]["simulated_step_ms"] is None
