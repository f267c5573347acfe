"""Rows from what ranks wrote, the model's fit, and predictions."""

import numpy as np
import pytest

from ddpm_fast.scaling.alpha_beta import Link, ring_seconds, tree_seconds
from ddpm_fast.scaling.assemble import (
    add_predictions,
    add_speedups,
    measured_parts,
    measured_row,
    median_interval,
    relative_spread,
)
from ddpm_fast.scaling.doubts import doubts
from ddpm_fast.scaling.interconnects import INTERCONNECTS
from ddpm_fast.scaling.predict import make_model, predicted_rows


def phase(batch=16, step_s=0.08, alone_s=0.07, **changes):
    return {
        "batch": batch, "steps_per_window": 10, "window_s": [10 * step_s] * 5,
        "alone_window_s": [10 * alone_s] * 5, "alone_step_s": [alone_s] * 50,
        "forward_s": 0.02, "data_s": 0.001, "optimizer_s": 0.004, "compute_s": alone_s - 0.005,
        "communication_s": 0.015, "joules": None, "loss": 1.0, "memory_phases_gib": {"net": 0.4},
        "memory": {"allocated_gib": None, "reserved_gib": None, "process_gib": 0.5},
        "peak_memory_since": "phase",
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


SLOW = [1.0, 1.0, 1.0, 1.0, 3.0]  # seconds of windows of 10 steps


def test_what_slows_both_windows_of_a_pair_is_no_communication():
    both = phase(window_s=SLOW, alone_window_s=SLOW)
    row = measured_row("weak", [rank(r, 2, weak=both) for r in range(2)])
    assert row["split_ms"]["exposed_communication"] == 0
    assert row["step_ms"] == pytest.approx(100)
    assert row["images_per_s"] == pytest.approx(2 * 16 * 10 * 5 / 7)
    both = phase(window_s=[1.1, 1.1, 3.1, 3.1, 3.1], alone_window_s=[1.0, 1.0, 1.0, 3.0, 3.0])
    split = measured_row("weak", [rank(r, 2, weak=both) for r in range(2)])["split_ms"]
    assert split["exposed_communication"] == pytest.approx(10)
    both = phase(window_s=[1.1, 1.1, 1.1, 1.1, 3.1], alone_window_s=SLOW)
    split = measured_row("weak", [rank(r, 2, weak=both) for r in range(2)])["split_ms"]
    assert split["exposed_communication"] == pytest.approx(10)


def test_exposed_communication_is_over_the_slowest_rank_of_each_window():
    ranks = [rank(0, 2, weak=phase(step_s=0.08, alone_s=0.05)),
             rank(1, 2, weak=phase(step_s=0.08, alone_s=0.07))]  # fmt: skip
    split = measured_row("weak", ranks)["split_ms"]
    assert split["exposed_communication"] == pytest.approx(10)


def test_parts_that_cannot_add_up_are_told_and_not_hidden(result):
    for changes in (dict(optimizer_s=0.09), dict(step_s=0.06, alone_s=0.07)):
        result["rows"] = [measured_row("weak", [rank(r, 2, weak=phase(**changes)) for r in (0, 1)])]
        told = [line for line in doubts(result) if "parts add up to" in line]
        assert len(told) == 1 and told[0].startswith("2 processes (weak)"), changes


def test_more_exposed_than_communicated_is_told(result):
    result["rows"] = [measured_row("weak", [rank(r, 2, weak=phase(communication_s=0.004))
                                            for r in range(2)])]  # fmt: skip
    (told,) = [line for line in doubts(result) if "exposed" in line]
    assert "10.0 ms of communication are exposed, but the all-reduces take 4.0" in told


def test_skew_is_of_steps_without_communication():
    ranks = [rank(0, 2, weak=phase(alone_s=0.05)), rank(1, 2, weak=phase(alone_s=0.06))]
    assert measured_row("weak", ranks)["skew"] == pytest.approx(1.2)


def test_peaks_are_the_rows_own_if_every_ranks_is():
    def since(*words):
        ranks = [rank(r, 2, weak=phase(peak_memory_since=word)) for r, word in enumerate(words)]
        return measured_row("weak", ranks)["peak_memory_since"]

    assert [since("phase", "phase"), since("phase", "start")] == ["phase", "start"]


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


def test_a_weak_step_with_the_strong_rows_batch_is_a_row_of_both_modes():
    # --gpus 1,2,4 --batch-size 16 --global-batch 64: of 4 ranks both are 16 images each
    parts = measured_parts(
        [[rank(r, n, weak=phase(), **({} if n == 4 else {"strong": phase(64 // n, 0.32 / n)}))
          for r in range(n)] for n in (1, 2, 4)], 64)  # fmt: skip
    strong = [row for row in parts["rows"] if row["mode"] == "strong"]
    assert [(row["world_size"], row["batch_per_rank"]) for row in strong] == [
        (1, 64), (2, 32), (4, 16)]  # fmt: skip
    assert strong[-1]["speedup"] == pytest.approx(4)
    assert strong[-1]["serial_fraction"] == pytest.approx(0, abs=1e-9)
    weak = [row for row in parts["rows"] if row["mode"] == "weak"]
    assert weak[-1]["speedup"] == pytest.approx(4) and weak[-1]["serial_fraction"] is None


def test_one_rank_whose_batch_is_the_whole_one_has_one_row():
    parts = measured_parts([[rank(0, 1, weak=phase())]], 16)
    assert [row["mode"] for row in parts["rows"]] == ["weak"]


def test_an_efficiency_is_between_the_far_ends_of_both_rows():
    windows = [0.69, 0.70, 0.70, 0.70, 0.71]
    parts = measured_parts(
        [[rank(0, 1, weak=phase(window_s=windows, alone_window_s=windows))],
         [rank(r, 2, weak=phase()) for r in range(2)]], 16)  # fmt: skip
    one, two = parts["rows"]
    assert one["efficiency_low"] == one["efficiency"] == one["efficiency_high"] == 1
    assert two["efficiency_low"] == pytest.approx(69 / 80)
    assert two["efficiency_high"] == pytest.approx(71 / 80)
    assert two["speedup_high"] == pytest.approx(2 * 71 / 80)


def test_without_one_rank_the_smallest_world_counts_as_ideal(result):
    rows = [measured_row("weak", [rank(r, n, weak=phase()) for r in range(n)]) for n in (2, 4)]
    add_speedups(rows, 16)
    assert [row["speedup"] for row in rows] == [2, 4]
    assert "weak: N = 1 was not measured; 2 processes count as ideal" in doubts(
        result | {"rows": rows}
    )


def test_a_serial_fraction_is_over_one_rank_only():
    rows = [measured_row("strong", [rank(r, n, strong=phase(16 // n)) for r in range(n)])
            for n in (2, 4)]  # fmt: skip
    add_speedups(rows, 16)
    assert [row["serial_fraction"] for row in rows] == [None, None]


@pytest.mark.parametrize("share", [0.7, 0.4])
def test_the_model_is_fitted_on_the_smallest_world_and_its_forward_pass(share):
    alone, forward_s = [{"batch": 8, "seconds": 0.04}], 0.065 * (1 - share)
    ranks = [rank(0, 1, weak=phase(alone_s=0.07, forward_s=forward_s)) | {"compute_alone": alone}]
    parts = measured_parts([ranks, [rank(r, 2, weak=phase()) for r in range(2)]], 16)
    assert parts["compute_alone"] == [{"batch": 16, "seconds": pytest.approx(0.065)}, *alone]
    assert parts["backward_share"] == pytest.approx(share)


def test_where_nothing_was_measured_nothing_stands_for_it():
    parts = measured_parts([[]], 16)
    assert {name for name, value in parts.items() if value is None} == {
        "parameters", "backward_share", "jitter"}  # fmt: skip


def test_a_world_with_a_missing_rank_or_phase_gives_what_all_ranks_have():
    lost = [rank(0, 2, weak=phase(), strong=phase(8))]
    half = [rank(0, 2, weak=phase(), strong=phase(8)), rank(1, 2, weak=phase())]
    assert measured_parts([lost], 16)["rows"] == []
    assert [row["mode"] for row in measured_parts([half], 16)["rows"]] == ["weak"]


def test_the_interval_of_a_median_holds_the_median_and_grows_with_the_spread():
    low, high = median_interval([9, 10, 10, 10, 11])
    assert 9 <= low <= 10 <= high <= 11
    assert median_interval([10] * 5) == (10, 10)


def test_the_interval_of_a_median_is_between_its_order_statistics():
    # 1 ... 30, the last an outlier: of 30 values the 10th to the 21st hold the median in 95.7 % of
    # runs (binomial); the bootstrap's ends are within one value of them. A mean would follow the
    # outlier, the least and the most be 1 and 10000, and one resample no interval.
    values = [*range(1, 30), 10_000]
    low, high = median_interval(values)
    assert 9 <= low <= 11 and 20 <= high <= 22
    low, high = median_interval([9.0, 9.5, 10.0, 10.5, 20.0])
    assert (low, high) == (9, 20)  # of 5 in effect the least and the most


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


def test_predicting_what_was_measured_gives_its_efficiency_within_the_residual(result):
    model, _ = make_model(result)
    for n, mode, row in ((1, "weak", result["rows"][0]), (2, "weak", result["rows"][1]),
                         (2, "strong", result["rows"][2])):  # fmt: skip
        predicted = next(r for r in predicted_rows(model, result, [n]) if r["mode"] == mode)
        off = abs(model.step(n, row["batch_per_rank"])["step_s"] * 1e3 / row["step_ms"] - 1)
        assert predicted["efficiency"] == pytest.approx(row["efficiency"], rel=off + 0.01), n
    assert predicted_rows(model, result, [1])[0]["efficiency"] == pytest.approx(1)


def test_an_efficiency_is_over_the_models_own_step_whatever_the_measured_one(result):
    model, _ = make_model(result)
    before = predicted_rows(model, result, [8])[0]
    result["rows"][0]["images_per_s"] *= 0.8  # the windows of one rank were disturbed
    result["rows"][0]["step_ms"] /= 0.8
    after = predicted_rows(model, result, [8])[0]
    assert after["efficiency"] == before["efficiency"]
    assert after["inputs"]["base_ranks"] == 1
    assert after["inputs"]["base_step_ms"] == pytest.approx(80, rel=0.02)


def test_the_parts_of_the_formula_are_as_measured(result):
    result["jitter"] = 0.2
    model, _ = make_model(result)
    alone_s, slowdown = model.compute_s(16), 80 / 75
    parts = model.step(2, 16)
    stragglers = 1 + 0.2 * 0.589  # the larger of two normal values: Blom's 0.589, exactly 0.564
    assert parts["compute_s"] == pytest.approx(alone_s * slowdown * stragglers, rel=0.01)
    # what the backward pass hides: all but the first bucket's share of 0.66 of computing
    all_s = parts["communication_s"]
    backward_s = 0.66 * parts["compute_s"]
    share = 2**20 / sum(result["bucket_bytes"])
    last_s = all_s * 3_400_000 / sum(result["bucket_bytes"])
    expected = max(last_s, all_s - (1 - share) * backward_s)
    assert parts["exposed_s"] == pytest.approx(expected, rel=0.05)


def test_a_share_of_the_backward_pass_that_is_little_hides_little(result):
    exposed = []
    for share in (0.0, 0.5):
        model, _ = make_model(result | {"backward_share": share, "bucket_bytes": [2**24] * 4})
        exposed.append(model.step(8, 16)["exposed_s"])
    assert exposed[0] > exposed[1] + 0.02


def as_gpus(result, name, n):
    result |= {"kind": "gpu", "backend": "nccl"}
    result["machine"] |= {"devices": [name] * n}
    return result


def test_a_fitted_link_predicts_what_was_measured_and_not_a_cheaper_tree(result):
    # Eight GPUs whose all-reduces are all latency: by a tree with the ring's alpha they would take
    # less than half, and still be said to fit without a residual.
    link, n = Link(alpha_s=1e-3, beta_bytes_per_s=100e9), 8
    sizes = (1024, *result["bucket_bytes"])
    seconds = {size: ring_seconds(size, n, link) for size in sizes}
    assert tree_seconds(1024, n, link) < 0.5 * seconds[1024]
    result["all_reduce"] = [{"world_size": n, "bytes": size, "seconds": seconds[size],
                             "bus_gbytes_per_s": 1.0} for size in sizes]  # fmt: skip
    as_gpus(result, "NVIDIA H200, 139 GiB", n)
    model, _ = make_model(result)
    measured_s = sum(seconds[size] for size in result["bucket_bytes"])
    assert model.step(n, 16)["communication_s"] == pytest.approx(measured_s)
    published, _ = make_model(result, INTERCONNECTS["h200-nvlink"])
    assert (model.algorithms, published.algorithms) == (("ring",), ("ring", "tree"))


def test_beyond_one_machine_a_link_is_no_faster_than_the_network(result):
    for row in result["all_reduce"]:  # 1 TB/s within
        row["seconds"] = 1e-5 + row["bytes"] / 1e12
    model, _ = make_model(as_gpus(result, "NVIDIA H200, 139 GiB", 2))
    assert model.link(8).beta_bytes_per_s == pytest.approx(1e12, rel=0.01)
    assert model.link(16).beta_bytes_per_s == 400e9
    assert any("joined by at most 400 GB/s" in line for line in model.assumed)
    unknown, _ = make_model(as_gpus(result, "A card", 2))
    assert unknown.link(16).beta_bytes_per_s == pytest.approx(1e12, rel=0.01)
    assert any("as fast as those within" in line for line in unknown.assumed)


def test_predictions_say_what_they_take_for_granted(result):
    said = " ".join(make_model(result)[0].assumed)
    assert "as if the machine of 2 cores grew with them" in said
    assert "as much slower than alone as among 2: 1.0" in said
    assert "every further GPU" in " ".join(make_model(as_gpus(result, "x", 2))[0].assumed)


def test_a_model_that_does_not_fit_is_told(predicted):
    assert not any("guesses" in line for line in doubts(predicted))
    predicted["model"]["fits"][0]["rms_residual"] = 0.25
    predicted["model"]["residuals"][1]["relative"] = -0.3
    told = [line for line in doubts(predicted) if "guesses" in line]
    assert "25 % (RMS)" in told[0] and "-30 % from the measured step of N = 2 (weak)" in told[1]


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


def test_one_measured_process_is_advised_what_the_command_takes(result):
    result |= {"rows": result["rows"][:1], "all_reduce": []}
    add_predictions(result, [8])
    (said,) = result["notes"]
    assert "no all-reduce was measured; measure at least 2 processes, as --gpus 1,2" in said
    assert "--interconnect" not in said  # which is refused beside --backend gloo
