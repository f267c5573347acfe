"""What one rank gets wrong, all ranks hear of: a loss that is not finite, a pass that is slow."""

import pytest

pytestmark = pytest.mark.faults


def test_inf_on_one_rank_stops_all_and_spares_the_last_healthy_checkpoint(
    train, resume, same_end, steps, weights, tmp_path, undisturbed
):
    output = train(fault="inf", step=13, code=1)
    assert output.count("training diverged; the checkpoint of step 10 is untouched") == 1
    assert steps() == [10]
    assert weights(tmp_path / "run", 10) == weights(undisturbed, 10)
    resume()
    same_end()


def test_inf_on_one_rank_is_left_out_by_all_and_changes_no_weight(train, weights, rows, tmp_path):
    flags = ("--on-nan", "skip", "--iterations", 16, "--checkpoint-every", 1)
    output = train(*flags, "--keep-checkpoints", 20, fault="inf", step=13)
    assert "warning: 1 steps up to 16 were not finite and left out" in output
    models = [weights(tmp_path / "run", step)["model.safetensors"] for step in range(12, 17)]
    same = [before == after for before, after in zip(models, models[1:], strict=False)]
    assert same == [False, True, False, False]  # the step from 13 to 14 was spoiled
    assert all(row["loss"] < float("inf") for row in rows(tmp_path / "run"))


def test_a_rank_ten_times_slower_is_named_and_its_skew_logged(train, rows, tmp_path):
    output = train(fault="slow", rank=1)
    assert "warning: rank 1 is slow: its forward pass and wait for data at step " in output
    assert output.count("warning: rank 1 is slow") == 1
    skews = [row["skew"] for row in rows(tmp_path / "run")]
    assert sorted(skews)[len(skews) // 2] > 1.5  # of 2 ranks the median is their mean: at most 2
