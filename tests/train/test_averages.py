"""Several averages of one run: trained, saved, resumed and loaded."""

import pytest
import torch

import ddpm_fast as df
from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.sample import main as sample

FLAGS = ("--extra-ema-decays", "0.5,0.9", "--ema-decay", 0.99, "--ema-warmup", "False",
         "--checkpoint-every", 2, "--sample-every", 0, "--learning-rate", 0.01,
         "--warmup-steps", 0, "--lr-schedule", "constant")  # fmt: skip
PARTS = ("ema", "ema_0.5", "ema_0.9")


def averages(run, step):
    parts = checkpoint.load(run / "checkpoints" / f"step_{step:08d}").parts
    return {name: parts[name]["init_conv.weight"] for name in ("model", *PARTS)}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-one-pass"])
def test_each_average_follows_its_own_decay_and_goes_on_after_a_resume(
    train, resume, tmp_path, optimizer
):
    run = tmp_path / "run"
    flags = (*FLAGS, "--optimizer", optimizer)
    assert train(run, *flags, "--iterations", 2) == 0
    assert resume(run, "--iterations", 3) == 0
    before, after = averages(run, 2), averages(run, 3)
    for part, decay in zip(PARTS, (0.99, 0.5, 0.9), strict=True):
        expected = decay * before[part] + (1 - decay) * after["model"]
        torch.testing.assert_close(after[part], expected, rtol=1e-5, atol=1e-7)


def test_one_of_them_is_loaded_and_sampled_from_by_its_decay(train, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, *FLAGS, "--iterations", 2) == 0
    saved = averages(run, 2)
    for given, part in ((True, "ema"), (False, "model"), (0.5, "ema_0.5"), (0.9, "ema_0.9")):
        assert torch.equal(df.load(run, ema=given).init_conv.weight, saved[part])
    with pytest.raises(ValueError, match="ema=0.7: .* holds those of 0.5, 0.9; True is the run's"):
        df.load(run, ema=0.7)
    argv = ["--checkpoint", str(run), "--num-images", "1", "--steps", "1", "--device", "cpu"]
    pictures = []
    for name, flags in (("a", ()), ("b", ("--ema-decay", "0.5"))):
        assert sample([*argv, "--out", str(tmp_path / name), *flags]) == 0
        pictures.append((tmp_path / name / "00000000.png").read_bytes())
    assert pictures[0] != pictures[1]
    capsys.readouterr()
    assert sample([*argv, "--out", str(tmp_path / "c"), "--ema-decay", "0.5", "--no-ema"]) == 2
    told = capsys.readouterr().err
    assert "--ema-decay 0.5 chooses" in told and "--no-ema" in told
