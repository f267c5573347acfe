"""The files of a run folder: names, contents, and who may write them."""

import errno
import hashlib
import json
import math
import os
import threading
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.train import run_folder
from ddpm_fast.train.__main__ import main
from ddpm_fast.train.command import parse_command
from ddpm_fast.train.config import TrainConfig
from ddpm_fast.train.run_folder import RunFolder, RunFolderError, default_run_dir


@contextmanager
def file_size_limit(num_bytes):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def run(train_tiny):
    """8 steps: a checkpoint every 2, the last 3 kept; a grid every 4; a row every 3."""
    text = "--iterations 8 --checkpoint-every 2 --keep-checkpoints 3 --sample-every 4 --seed 11"
    return train_tiny(*text.split(), "--log-every", 3)


def test_it_holds_the_files_of_the_contract_and_no_others(run, tree):
    expected = {"config.json", "metrics.jsonl", "log.txt", "lock", "samples", "checkpoints"}
    expected |= {f"samples/step_{step:08d}.png" for step in (4, 8)}
    for step in (4, 6, 8):
        saved = f"checkpoints/step_{step:08d}"
        expected |= {saved, f"{saved}/manifest.json"}
        expected |= {f"{saved}/{name}.safetensors" for name in ("model", "ema", "optimizer")}
    assert {path.as_posix() for path in tree(run)} == expected


def test_a_folder_whose_name_is_no_utf_8_is_trained_in_resumed_and_sampled_from(
    tmp_path, tiny, capsys
):
    from ddpm_fast.sample import main as sample

    photos, run, out = (tmp_path / os.fsdecode(name) for name in (b"photo\xff", b"r\xff", b"o\xff"))
    photos.mkdir()
    Image.new("L", (16, 16)).save(photos / os.fsdecode(b"1\xff.png"))
    flags = ["--data", photos, "--data-root", tmp_path / "data", "--sample-every", 0]
    argv = [*tiny, *flags, "--run-dir", run, "--iterations", 1]
    assert main([str(word) for word in argv]) == 0
    assert main(["--resume", str(run), "--iterations", "2"]) == 0
    assert "resumed after step 1" in (run / "log.txt").read_text()
    drawn = ["--checkpoint", run, "--out", out, "--num-images", 1, "--steps", 1, "--device", "cpu"]
    assert sample([str(word) for word in drawn]) == 0
    assert f"{tmp_path}/o\\udcff" in capsys.readouterr().out
    assert (out / "00000000.png").is_file()


def test_metrics_are_a_row_for_each_logged_step(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 3, 6, 8]  # the first and the last always
    for row in rows:
        assert {"step", "loss", "lr", "images_per_s", "grad_norm"} <= set(row)
        assert row["images_per_s"] > 0 and math.isfinite(row["loss"]) and row["grad_norm"] > 0
    config = TrainConfig()
    assert rows[0]["lr"] == pytest.approx(config.learning_rate / config.warmup_steps)


def test_loss_is_written_with_its_full_repr(run):
    """A float32's value needs 9 digits: what is read back is that float32 again."""
    for line in (run / "metrics.jsonl").read_text().splitlines():
        loss = json.loads(line)["loss"]
        assert torch.tensor(loss, dtype=torch.float32).item() == loss
        assert f'"loss": {loss!r}' in line


def test_config_json_holds_every_value_of_the_run(run):
    values = json.loads((run / "config.json").read_text())
    assert set(values) == set(TrainConfig.__dataclass_fields__)
    assert values["seed"] == 11 and values["channel_mults"] == [1, 2]


def test_config_json_restarts_the_run_and_flags_win(run, tmp_path, tree):
    config = str(run / "config.json")
    again = tmp_path / "again"
    assert main(["--config", config, "--run-dir", str(again)]) == 0
    for part in ("model", "ema", "optimizer"):
        path = f"checkpoints/step_00000008/{part}.safetensors"
        assert (again / path).read_bytes() == (run / path).read_bytes()
    other = parse_command(["--config", config, "--batch-size", "3"]).config
    assert other.batch_size == 3 and other.seed == 11 and other.run_dir is None


def test_log_txt_has_a_time_before_each_line(run):
    lines = (run / "log.txt").read_text().splitlines()
    assert all(line[:4].isdigit() and line[19:21] == "  " for line in lines)
    assert any("step 8/8" in line for line in lines)
    assert any("Frechet distance" in line for line in lines)


def test_sample_grids_are_2x2_digits_enlarged_4_times(run):
    for path in (run / "samples").glob("*.png"):
        with Image.open(path) as page:
            assert page.size == (2 * 64 + 3 * 2,) * 2 and page.mode == "L"


def test_the_manifest_says_what_the_checkpoint_is(run):
    folder = run / "checkpoints" / "step_00000008"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 8 and manifest["seed"] == 11 and manifest["ema_updates"] == 8
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["versions"]) == {"ddpm_fast", "torch", "python"}
    assert manifest["net"]["base_channels"] == 8 and manifest["net"]["image_size"] == 16
    assert manifest["diffusion"]["num_timesteps"] == 5
    assert set(manifest["files"]) == {f"{n}.safetensors" for n in ("model", "ema", "optimizer")}
    for name, recorded in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert recorded == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        shapes = manifest["shapes"][name.removesuffix(".safetensors")]
        assert shapes == {k: list(v.shape) for k, v in load_file(folder / name).items()}


def test_the_averaged_weights_are_not_the_trained_ones(run):
    saved = checkpoint.load(run / "checkpoints" / "step_00000008")
    name = "init_conv.weight"
    assert not torch.equal(saved.parts["model"][name], saved.parts["ema"][name])
    assert torch.isfinite(saved.parts["ema"][name]).all()


@pytest.mark.parametrize("inside", ["notes.txt", "samples/old.png", "config.json"])
def test_a_folder_with_anything_of_yours_in_it_is_left_alone(tmp_path, inside, tree):
    path = tmp_path / "run" / inside
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(RunFolderError, match="exists already; continue it with .* --resume"):
        RunFolder(tmp_path / "run", resume=False)
    assert tree(tmp_path) == before


def test_an_empty_or_unused_folder_may_become_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    RunFolder(tmp_path / "run", resume=False).close()
    # what a start leaves that failed before it wrote its configuration
    RunFolder(tmp_path / "run", resume=False).close()


def test_a_locked_folder_is_refused_and_free_again_after_close(tmp_path):
    first = RunFolder(tmp_path / "run", resume=False)
    with pytest.raises(RunFolderError, match="in use by another trainer"):
        RunFolder(tmp_path / "run", resume=True)
    first.close()
    RunFolder(tmp_path / "run", resume=True).close()


def test_a_restart_waits_for_a_trainer_that_is_about_to_leave(tmp_path, capsys):
    first = RunFolder(tmp_path / "run", resume=False)
    threading.Timer(0.2, first.close).start()
    RunFolder(tmp_path / "run", resume=True, wait_s=30).close()
    assert (
        capsys.readouterr().out == f"run folder {tmp_path / 'run'} is in use: waiting up to 30 s\n"
    )


def test_a_file_system_without_locks_is_not_taken_for_another_trainer(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder, "_lock", refuse)
    with pytest.raises(RunFolderError, match="No locks available; its file system has no locks"):
        RunFolder(tmp_path / "run", resume=False, wait_s=30)


def test_what_trackers_made_before_a_start_was_lost_does_not_refuse_the_next(tmp_path):
    (tmp_path / "run" / "wandb" / "offline-run").mkdir(parents=True)
    RunFolder(tmp_path / "run", resume=False).close()


def test_a_row_that_cannot_be_written_is_told_once_and_leaves_whole_rows(tmp_path, capsys):
    """A limit of 40 bytes a file stands for the full disk."""
    folder = RunFolder(tmp_path / "run", resume=False)
    with file_size_limit(40):
        folder.add_metrics({"step": 1, "loss": 0.5})
        for step in (2, 3):
            folder.add_metrics({"step": step, "loss": 0.5})
    folder.add_metrics({"step": 4, "loss": 0.5})
    folder.close()
    assert [json.loads(line)["step"] for line in folder.metrics_path.open()] == [1, 4]
    told = f"warning: {folder.metrics_path} not written: File too large; training goes on\n"
    assert capsys.readouterr().err == told


def test_default_run_folders_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20200102-030405")
    first = default_run_dir("digits")
    assert first.as_posix() == "runs/digits-20200102-030405"
    first.mkdir(parents=True)
    assert default_run_dir("digits").as_posix() == "runs/digits-20200102-030405-2"


def test_rows_past_the_checkpoint_are_forgotten_and_the_others_kept_as_they_are(tmp_path):
    folder = RunFolder(tmp_path, resume=True)
    kept = ['{"step": 1, "loss": 0.1}', '{"step":2,"loss":0.30000000000000004}']
    cut = ['{"step": 3, "loss": 1}', '{"loss": 1}', "[]", '{"st']
    folder.metrics_path.write_bytes("\n".join([*kept, *cut]).encode() + b"\xff\xfe")
    folder.forget_metrics_after(2)
    assert folder.metrics_path.read_text().splitlines() == kept
    folder.close()
