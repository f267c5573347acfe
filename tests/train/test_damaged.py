"""Checkpoints that were cut or altered: the run goes on from an older one and keeps that safe."""

import pytest

from tests.train.conftest import SHORT


@pytest.mark.faults
def test_resume_goes_back_past_a_damaged_checkpoint_and_still_ends_bitwise(
    tmp_path, whole, train, train_until_killed, resume, weights, capsys
):
    train_until_killed(10, tmp_path / "cut", *SHORT)
    damaged = tmp_path / "cut" / "checkpoints" / "step_00000008" / "ema.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    assert resume(tmp_path / "cut") == 0
    out = capsys.readouterr().out
    assert f"skipped a damaged checkpoint: {damaged} was altered" in out
    assert "resumed after step 4" in out
    assert "the damaged checkpoint is now damaged_step_00000008\n" in out
    assert (damaged.parents[1] / "damaged_step_00000008" / "ema.safetensors").read_bytes() == data
    assert weights(tmp_path / "cut", 12) == weights(whole, 12)


@pytest.mark.faults
def test_damaged_checkpoints_do_not_push_healthy_ones_out(tmp_path, train, resume, tree):
    """Of steps that the resumed run does not meet again, as after a stop or a slow write."""
    run = tmp_path / "run"
    assert train(run, *SHORT, "--iterations", 5) == 0  # 4 and 5
    for _ in range(2):
        for path in (run / "checkpoints" / "step_00000005").iterdir():
            path.write_bytes(path.read_bytes()[:10])
        assert resume(run) == 0
    assert resume(run, "--iterations", 12, "--keep-checkpoints", 3) == 0
    left = {path.name for path in (run / "checkpoints").iterdir()}
    damaged = {"damaged_step_00000005", "damaged_step_00000005.1"}
    assert left == {"step_00000005", "step_00000008", "step_00000012"} | damaged


def test_a_checkpoint_that_another_version_wrote_keeps_its_name_and_so_does_one_that_goes_on(
    tmp_path, train, resume, capsys
):
    run = tmp_path / "run"
    assert train(run, *SHORT, "--iterations", 5) == 0
    newer = run / "checkpoints" / "step_00000005" / "manifest.json"
    newer.write_text(newer.read_text().replace('"format": 1', '"format": 2'))
    (run / "checkpoints" / "step_00000004").rename(run / "checkpoints" / "step_00000003")
    assert resume(run, "--checkpoint-every", 0, "--keep-checkpoints", 9) == 0
    assert "resumed after step 4" in capsys.readouterr().out
    assert not list(run.rglob("damaged_*"))
