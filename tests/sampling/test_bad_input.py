"""What `python -m ddpm_fast.sample` refuses, in one line."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from ddpm_fast.sample import main

GOLDEN = Path(__file__).parents[1] / "golden"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def refuses(tmp_path, refused, tiny_run):
    """refuses(code, *flags) -> the line; shows that no image and no folder was made."""

    def check(code, *flags, checkpoint=tiny_run):
        argv = ["--checkpoint", checkpoint, "--out", tmp_path / "out", *flags]
        message = refused(main, argv, code)
        assert not (tmp_path / "out").exists()
        return message

    return check


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--steps 6", "--steps 6 must be at most the net's 5 timesteps"),
        ("--steps 0", "--steps 0 must be at least 1"),
        ("--num-images 0", "--num-images 0 must be at least 1"),
        ("--num-images 4294967297", "must be at most"),
        ("--batch-size 0", "--batch-size 0 must be at least 1"),
        ("--seed -1", "--seed -1 must be from 0"),
        ("--eta 1.5", "--eta 1.5 must be from 0 to 1"),
        ("--eta nan", "--eta nan must be from 0 to 1"),
        ("--eta 0.5 --sampler ddpm", "--eta 0.5 is for --sampler ddim"),
        ("--variance fixed_small", "--variance fixed_small is for --sampler ddpm"),
        ("--batch-size 1000000000000", "--batch-size 1000000000000 must be at most num_images"),
        ("--compile maybe", "('auto', 'on', 'off')"),
        ("--classes 3", "--classes"),
        ("--sampler plms", "('ddim', 'ddpm')"),
        ("--num-image 3", "did you mean '--num-images'?"),
        ("--device tpu", "--device tpu: must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_bad_value(refuses, flags, told):
    assert told in refuses(2, *flags.split())


@pytest.mark.parametrize("classes", ["10", "3,-1", "0,11", "9" * 5000])
def test_classes_out_of_range(refuses, tiny_class_run, classes):
    message = refuses(2, "--classes", classes, checkpoint=tiny_class_run)
    assert re.fullmatch(r"--classes holds (10|-1|11|9+), must be from 0 to 9", message)


@pytest.mark.parametrize("classes", ["cat", "1.5"])
def test_words_that_are_no_classes(refuses, tiny_class_run, classes):
    message = refuses(2, "--classes", classes, checkpoint=tiny_class_run)
    assert f"--classes holds {classes}, must be from 0 to 9" in message and "0, 1, 2" in message


def test_classes_for_a_net_without(refuses):
    assert "has no classes" in refuses(2, "--classes", "1,2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_that_is_not_there(refuses):
    assert "this machine has no CUDA device" in refuses(2, "--device", "cuda")


def test_a_checkpoint_is_needed(refused):
    assert "--checkpoint" in refused(main, ["--num-images", "2"], 2)


def test_a_checkpoint_that_is_not_there(refuses, tmp_path):
    assert "nowhere does not exist; give" in refuses(2, checkpoint=tmp_path / "nowhere")
    assert "is none of" in refuses(2, checkpoint=tmp_path)
    assert "nowhere.pth: No such file" in refuses(
        2, "--preset", "digits", checkpoint=tmp_path / "nowhere.pth"
    )


def test_a_pth_without_a_preset_or_with_an_unknown_one(refuses):
    path = GOLDEN / "seed_uncond.pth"
    assert "give preset, of digits, cifar10" in refuses(2, checkpoint=path)
    assert "unknown preset 'cifar'" in refuses(2, "--preset", "cifar", checkpoint=path)


def test_a_pth_of_another_architecture(refuses):
    path = GOLDEN / "seed_uncond.pth"
    message = refuses(1, "--preset", "seed-cifar10", checkpoint=path)
    assert f"{path} is of another architecture" in message


def test_a_cut_pth(refuses, tmp_path):
    path = tmp_path / "cut.pth"
    path.write_bytes((GOLDEN / "seed_uncond.pth").read_bytes()[:5000])
    message = refuses(1, "--preset", "seed-cifar10", checkpoint=path)
    assert "cut.pth cannot be read as a file of weights only" in message


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_run_whose_only_checkpoint_is_damaged(tiny_run, tmp_path, damage, capsys):
    """Two lines: a warning for the checkpoint, naming the file, and the error."""
    shutil.copytree(tiny_run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step_00000004" / "ema.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data[:-3] if damage == "cut" else data)
    out = tmp_path / "out"
    assert main(["--checkpoint", str(tmp_path / "run"), "--out", str(out)]) == 1
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: skipped a damaged checkpoint: {path} ")
    assert "holds no checkpoint that can be loaded: all 1 are damaged" in error
    assert not out.exists()


def test_an_out_below_a_file(refused, tmp_path, tiny_run):
    (tmp_path / "file").write_text("mine")
    argv = ["--checkpoint", tiny_run, "--out", tmp_path / "file" / "out", "--steps", 2]
    assert "Not a directory" in refused(main, argv, 1)
    argv[3] = tmp_path / "file"
    assert "exists" in refused(main, argv, 1)
    assert (tmp_path / "file").read_text() == "mine"
