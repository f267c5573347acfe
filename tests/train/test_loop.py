"""What a run does beside its steps: it stops when it diverges, and says what it does not do."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.checkpoints.writer import CheckpointWriter
from ddpm_fast.diffusion.process import Diffusion
from ddpm_fast.runtime.ranks import ALONE
from ddpm_fast.train import loop, summary
from ddpm_fast.train.__main__ import main
from ddpm_fast.train.announcement import announcement
from ddpm_fast.train.config import TrainConfig
from ddpm_fast.train.step import TrainStep

FEW = ("--iterations", 3, "--sample-every", 0)
save_beside = CheckpointWriter.save


def save_at_once(self, *arguments):
    """As the writer's save, and until it is written."""
    save_beside(self, *arguments)
    self.wait()


def test_a_run_that_diverges_stops_and_spares_the_last_healthy_checkpoint(
    tmp_path, tiny, before_step, refused, monkeypatch
):
    """A weight becomes infinite at step 5, between the checkpoints of the steps 4 and 8."""
    captured = []
    original = TrainStep.__init__

    def remember(self, *arguments, **options):
        original(self, *arguments, **options)
        captured.append(self)

    monkeypatch.setattr(TrainStep, "__init__", remember)
    before_step(5, lambda: captured[0].parameters[0].data.fill_(float("inf")))
    flags = ("--iterations", 12, "--checkpoint-every", 4, "--log-every", 100, "--sample-every", 0)
    argv = [*tiny, *flags, "--run-dir", tmp_path / "run"]
    message = refused(main, argv, 1)
    assert "at step 6: training diverged; the checkpoint of step 4 is untouched" in message
    assert checkpoint.steps_in(tmp_path / "run" / "checkpoints") == [4]
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "step_00000004")
    assert all(torch.isfinite(t).all() for part in saved.parts.values() for t in part.values())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), OSError(28, "No space left")]
)
def test_a_sample_grid_that_fails_is_a_warning_and_costs_no_checkpoint(
    tmp_path, train, monkeypatch, capsys, error
):
    def fail(*_, **__):
        steps.append(checkpoint.steps_in(tmp_path / "run" / "checkpoints"))
        raise error

    steps = []
    monkeypatch.setattr(loop, "sample_images", fail)
    monkeypatch.setattr(CheckpointWriter, "save", save_at_once)
    flags = ("--iterations", 4, "--sample-every", 2, "--checkpoint-every", 2)
    monkeypatch.setattr(summary, "digits_distance", lambda *_: 0.0)
    assert train(tmp_path / "run", *flags) == 0
    assert steps == [[2], [2, 4]]  # saved before the grid of the same step
    out = capsys.readouterr().out
    assert "warning: no sample grid of step 2: " in out and "images at a time" not in out
    assert "finished 4 steps" in out


def test_a_checkpoints_stall_is_logged(tmp_path, train):
    assert train(tmp_path / "run", *FEW, "--checkpoint-every", 2, "--log-every", 1) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert ["checkpoint_stall_s" in row for row in rows] == [False, False, True]
    assert 0 < rows[-1]["checkpoint_stall_s"] < 1


def test_compile_on_cpu_is_declined_in_one_line(tmp_path, train, capsys):
    assert train(tmp_path / "run", *FEW, "--compile") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--compile")]
    assert lines == [
        "--compile: compiling does not pay on CPU; training eager (--force-compile compiles)"
    ]


def test_compile_changes_nothing_on_cpu(tmp_path, train, weights):
    assert train(tmp_path / "plain", *FEW) == 0
    assert train(tmp_path / "asked", *FEW, "--compile") == 0
    assert weights(tmp_path / "plain", 3) == weights(tmp_path / "asked", 3)


@pytest.mark.parametrize(
    "flags", [("--seed", 1), ("--dropout", 0.2), ("--flip", "on"), ("--precision", "bf16"),
              ("--use-labels",), ("--loss", "l1"), ("--grad-clip", 0.01), ("--norm", "none"),
              ("--activation", "relu"), ("--num-res-blocks", 2), ("--schedule", "sigmoid")]
)  # fmt: skip
def test_a_flag_is_not_ignored(tmp_path, train, whole_few, weights, flags):
    assert train(tmp_path / "run", *FEW, *flags) == 0
    assert weights(tmp_path / "run", 3)["model"] != weights(whole_few, 3)["model"]


@pytest.fixture(scope="module")
def whole_few(train_tiny):
    return train_tiny(*FEW)


@pytest.mark.parametrize("flags", [("--log-every", 1), ("--keep-checkpoints", 1),
                                   ("--checkpoint-every", 1), ("--sample-every", 1)])  # fmt: skip
def test_logging_sampling_and_saving_do_not_change_the_weights(
    tmp_path, train, whole_few, weights, flags
):
    assert train(tmp_path / "run", *FEW, *flags) == 0
    assert weights(tmp_path / "run", 3) == weights(whole_few, 3)


def test_the_global_generator_plays_no_part(tmp_path, train, whole_few, weights):
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    assert train(tmp_path / "run", *FEW, "--dropout", 0) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert weights(tmp_path / "run", 3) == weights(whole_few, 3)


def test_the_summary_says_loss_speed_distance_and_where_everything_is(tmp_path, train, capsys):
    run = tmp_path / "run"
    assert train(run, "--iterations", 3) == 0
    text = capsys.readouterr().out.split("finished 3 steps")[1]
    loss = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    assert f"final loss   {loss:.4f}" in text and "img/s" in text
    assert f"samples      {run / 'samples' / 'step_00000003.png'}" in text
    assert f"checkpoint   {run / 'checkpoints' / 'step_00000003'}" in text
    assert "python -m ddpm_fast.sample --checkpoint " + str(run) in text
    assert 20 < float(text.split("Frechet distance ")[1].split()[0]) < 50  # untrained: noise is 31


def test_samples_that_are_not_finite_are_not_judged(tmp_path, train, capsys):
    """A run may end with weights that overflow: its last words say so."""
    flags = ("--learning-rate", 1e6, "--warmup-steps", 0, "--on-nan", "skip", "--iterations", 8)
    assert train(tmp_path / "run", *flags, "--sample-every", 0) == 0
    assert "Frechet distance none: the samples are not finite" in capsys.readouterr().out


def test_images_that_are_not_the_digits_are_not_judged_as_digits(
    tmp_path, train, capsys, monkeypatch
):
    import numpy as np

    np.save(tmp_path / "a.npy", np.zeros((4, 16, 16), np.uint8))
    monkeypatch.setattr(summary, "digits_distance", None)
    assert train(tmp_path / "run", *FEW, "--data", tmp_path / "a.npy") == 0
    assert "Frechet" not in capsys.readouterr().out


def test_a_monitored_run_logs_what_the_machine_did(tmp_path, train, capsys):
    run = tmp_path / "run"
    assert train(run, *FEW, "--monitor", "--log-every", 1) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert any(row.get("monitor_memory_gib", 0) > 0 for row in rows)
    if not torch.cuda.is_available():
        assert "GPUs are not monitored: " in capsys.readouterr().out


def test_the_summary_leaves_out_the_first_interval_which_warms_up(
    tmp_path, train, before_step, capsys
):
    before_step(0, lambda: time.sleep(3))
    flags = ("--iterations", 30, "--log-every", 10, "--sample-every", 0)
    assert train(tmp_path / "run", *flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert rows[0]["images_per_s"] < 3  # 8 images in 3 s
    (speed,) = re.findall(r"speed +(\d+) img/s", capsys.readouterr().out)
    assert int(speed) > 0.5 * min(row["images_per_s"] for row in rows[1:])


@pytest.mark.parametrize(
    "autocast_dtype, tf32, told",
    [(torch.bfloat16, "off", "cuda, bf16"), (None, "off", "cuda, fp32, no TF32"),
     (None, "on", "cuda, fp32, convolutions and matrix products in TF32")],
)  # fmt: skip
def test_on_cuda_the_run_says_in_which_precision_it_multiplies(autocast_dtype, tf32, told):
    images = SimpleNamespace(
        images=[], name="digits", notes=(), labels=None, num_classes=0, class_names=()
    )
    step = SimpleNamespace(
        world=ALONE,
        config=TrainConfig(tf32=tf32),
        autocast_dtype=autocast_dtype,
        parameters=[],
        net=SimpleNamespace(image_size=16),
        batches=SimpleNamespace(images=images, device=torch.device("cuda")),
    )
    line, *_ = announcement(step, Path("run"))
    assert f"on {told}; run folder run" in line


def test_a_graph_that_must_be_cannot_be_on_the_cpu(tmp_path, tiny, refused):
    argv = [*tiny, "--cuda-graph", "on", "--run-dir", tmp_path / "run"]
    assert refused(main, argv, 2) == "--cuda-graph on is for CUDA; on cpu: auto or off"


def test_a_logged_step_that_was_skipped_is_null_in_the_metrics(tmp_path, train, monkeypatch):
    original = Diffusion.loss

    def loss(self, *arguments, step, **options):
        return original(self, *arguments, step=step, **options) / (0 if int(step) == 1 else 1)

    monkeypatch.setattr(Diffusion, "loss", loss)
    assert train(tmp_path / "run", *FEW, "--on-nan", "skip", "--log-every", 1) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()

    def no_such(word):
        raise AssertionError(word)

    losses = [json.loads(line, parse_constant=no_such)["loss"] for line in lines]
    assert losses[1] is None and losses[0] > 0 and losses[2] > 0


def test_a_net_that_does_not_fit_is_one_line(tmp_path, tiny, refused, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(loop, "make_step", fail)
    message = refused(main, [*tiny, *FEW, "--run-dir", tmp_path / "run"], 1)
    assert message.startswith("out of memory before the first step: the net, its averages")


def test_a_sample_grid_that_is_not_finite_is_a_warning_and_not_written(tmp_path, train, capsys):
    """Black pictures would say that the net has learnt black."""
    flags = ("--learning-rate", 1e6, "--warmup-steps", 0, "--on-nan", "skip", "--iterations", 8)
    assert train(tmp_path / "run", *flags, "--sample-every", 8) == 0
    told = [li for li in capsys.readouterr().out.splitlines() if "no sample grid of step 8" in li]
    assert len(told) == 1 and "not finite" in told[0]
    assert not list((tmp_path / "run" / "samples").glob("*.png"))
