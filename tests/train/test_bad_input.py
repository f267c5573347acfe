"""Bad input ends the trainer with one line, exit code 2 or 1, and nothing written over."""

import http.server
import json
import os
import re
import shutil
import socket
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.data import ImageSet
from ddpm_fast.train import setup
from ddpm_fast.train.__main__ import main
from ddpm_fast.train.config import TrainConfig
from ddpm_fast.train.loop import Run
from ddpm_fast.train.run_folder import RunFolderError
from tests.conftest import TINY


@pytest.fixture
def refuses(tmp_path, tiny, refused, tree):
    """refuses(code, *flags) -> the line; shows that no run was begun and no file changed."""

    def check(code, *flags):
        before = tree(tmp_path)
        message = refused(main, [*tiny, "--run-dir", tmp_path / "run", *flags], code)
        assert tree(tmp_path) == before
        return message

    return check


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        ("--preset mnist", 2, "unknown preset 'mnist'; presets: digits, cifar10, seed-cifar10"),
        ("--preset digit", 2, "did you mean 'digits'?"),
        ("--batch_sise 4", 2, "unknown flag --batch_sise (did you mean '--batch-size'?)"),
        ("--batch-size 0", 2, "--batch-size 0 must be from 1 to"),
        ("--image-size 17", 2, "image_size=17; allowed: multiples of 8"),
        ("--image-size 24 --channel-mults 1,2,2,2,2", 2, "must be divisible by 16"),
        ("--data nowhere", 2, "no data called 'nowhere'; allowed: digits"),
        ("--data ~nobody-of-this-name/x", 2, "no data called"),
        ("--schedule linear", 2, "take more timesteps or another schedule"),  # at T = 5
        ("--schedule linear --schedule-high 0.9", 2, "must stay in (0, 1)"),
        ("--schedule-high nan", 2, "--schedule-high nan must be from"),
        ("--resume nowhere", 2, "no such run folder"),
    ],
)
def test_a_bad_value(refuses, flags, code, told):
    assert told in refuses(code, *flags.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_cuda_that_is_not_there(refuses, device):
    message = refuses(2, "--device", device)
    assert message.startswith(f"--device {device}: this machine has no CUDA device")
    assert message.endswith("allowed here: cpu")


def test_arrays_of_another_number_of_channels(refuses, tmp_path):
    np.save(tmp_path / "rgb.npy", np.zeros((4, 16, 16, 3), np.uint8))
    message = refuses(1, "--preset", "digits", "--data", tmp_path / "rgb.npy")
    assert "3 channels" in message and "channels=1 asked" in message
    assert "--img-channels 1" in message


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.full((4, 16, 16), 2, np.float32), "values from 2 to 2; allowed: uint8"),
        (np.full((4, 16, 16), np.nan), "float64 and holds NaN"),
        (np.zeros((4, 16, 16), np.int64), "the array is int64; allowed: uint8"),
        (np.zeros((0, 16, 16), np.uint8), "none of them 0"),
        (np.zeros((4, 15, 15), np.uint8), "must be divisible by 2"),
        (np.zeros((4, 16, 14), np.uint8), "must be square"),
    ],
)
def test_an_array_that_is_no_set_of_images(refuses, tmp_path, array, told):
    np.save(tmp_path / "a.npy", array)
    code = 2 if "must be" in told else 1
    assert told in refuses(code, "--data", tmp_path / "a.npy")


def test_a_cut_npy(refuses, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 16, 16), np.uint8))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-9])
    assert "not a readable .npy file" in refuses(1, "--data", tmp_path / "a.npy")


def test_an_empty_folder(refuses, tmp_path):
    (tmp_path / "pictures").mkdir()
    assert "no images" in refuses(1, "--data", tmp_path / "pictures")


@pytest.fixture
def pictures(tmp_path):
    """A folder of three good images and a cut one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (4, 16, 16), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])
    return folder


def test_a_corrupt_png_is_named(refused, tmp_path, tiny, pictures):
    flags = ("--data", pictures, "--data-root", tmp_path / "data", "--run-dir", tmp_path / "run")
    message = refused(main, [*tiny, *flags], 1)
    assert str(pictures) in message and "'2.png'" in message
    assert "--skip-bad-images" in message
    assert not (tmp_path / "run").exists()


def test_a_corrupt_png_is_skipped_when_asked(train, tmp_path, pictures, capsys):
    flags = ("--data", pictures, "--data-root", tmp_path / "data", "--iterations", 1)
    assert train(tmp_path / "run", *flags, "--skip-bad-images") == 0
    out = capsys.readouterr().out
    assert "2.png" in out and "on 3 images of" in out


@pytest.mark.parametrize("labelled", ["--use-labels"])
def test_labels_that_are_not_there(refuses, tmp_path, labelled):
    np.save(tmp_path / "a.npy", np.zeros((4, 16, 16), np.uint8))
    message = refuses(2, "--data", tmp_path / "a.npy", labelled)
    assert "has no labels" in message


def test_a_run_folder_below_a_file(refuses, tmp_path):
    (tmp_path / "file").write_text("mine")
    message = refuses(2, "--run-dir", tmp_path / "file" / "run")
    assert "cannot be written: Not a directory" in message


def test_a_run_folder_that_is_a_file(refuses, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "exists already" in refuses(2, "--run-dir", tmp_path / "file")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_folder_without_permission(refuses, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    assert "cannot be written" in refuses(1, "--run-dir", tmp_path / "shut" / "run")


def test_an_existing_run_without_resume(refused, tree, tiny_run, tiny):
    before = tree(tiny_run)
    message = refused(main, [*tiny, "--run-dir", tiny_run], 2)
    assert message.startswith(f"{tiny_run} exists already")
    assert f"--resume {tiny_run}" in message
    assert tree(tiny_run) == before


class LoginPage(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"please log in")

    def log_message(self, *_):
        pass


def test_a_download_with_the_wrong_checksum(refused, tmp_path, tiny, monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), LoginPage) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        url = f"http://127.0.0.1:{server.server_port}/x.tar.gz"
        monkeypatch.setenv("DDPM_FAST_CIFAR10_URL", url)
        flags = ("--data", "cifar10", "--data-root", tmp_path / "data")
        message = refused(main, [*tiny, *flags, "--run-dir", tmp_path / "run"], 1)
        server.shutdown()
    assert re.search(r"has MD5 \w+, expected c32a1d4ab5d03f1284b67883e8d83530", message)
    assert (tmp_path / "data" / "cifar-10-binary.tar.gz.bad").read_bytes() == b"please log in"
    assert not (tmp_path / "data" / "cifar-10-binary.tar.gz").exists()
    assert not (tmp_path / "run").exists()


def test_no_network(refused, tmp_path, tiny, monkeypatch):
    """A port that was free a moment ago refuses the connection."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("DDPM_FAST_CIFAR10_URL", f"http://127.0.0.1:{port}/x.tar.gz")
    flags = ("--data", "cifar10", "--data-root", tmp_path / "data")
    message = refused(main, [*tiny, *flags, "--run-dir", tmp_path / "run"], 1)
    assert "cannot download http://127.0.0.1" in message and "refused" in message
    assert "DDPM_FAST_CIFAR10_URL" in message
    assert not (tmp_path / "run").exists()


def test_resume_where_all_checkpoints_are_damaged(train, refused, tree, tmp_path):
    run = tmp_path / "run"
    assert train(run, "--iterations", 4, "--checkpoint-every", 2, "--sample-every", 0) == 0
    for saved in (run / "checkpoints").iterdir():
        (saved / "model.safetensors").write_bytes(b"cut")
    checkpoints = tree(run / "checkpoints")
    metrics = (run / "metrics.jsonl").read_bytes()
    message = refused(main, ["--resume", run], 1)
    assert "holds no checkpoint that can be loaded: all 2 are damaged" in message
    assert tree(run / "checkpoints") == checkpoints
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_resume_where_the_configuration_is_of_another_net(train, refused, tree, tmp_path):
    run = tmp_path / "run"
    assert train(run, "--iterations", 2, "--sample-every", 0) == 0
    config = run / "config.json"
    config.write_text(config.read_text().replace('"num_res_blocks": 1', '"num_res_blocks": 2'))
    before = tree(run / "checkpoints")
    message = refused(main, ["--resume", run, "--iterations", 4], 1)
    assert "step_00000002 is of another architecture" in message
    assert tree(run / "checkpoints") == before


def test_resume_where_the_checkpoints_are_gone(train, refused, tree, tmp_path):
    run = tmp_path / "run"
    flags = ("--iterations", 4, "--checkpoint-every", 2, "--sample-every", 0)
    assert train(run, *flags) == 0
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    before = tree(run)
    for argv in (["--resume", run], [*TINY, *flags, "--run-dir", run, "--auto-resume"]):
        message = refused(main, argv, 1)
        assert message.startswith(f"{run} has saved checkpoints, as log.txt says, and ")
        assert "start anew in another --run-dir" in message
    assert tree(run) == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"learning_rate": 0.5}, "the config's learning_rate was 0.002 and is 0.5"),
        ({"dropout": 0.25}, "the config's dropout was 0.0 and is 0.25; the net's dropout was"),
        ({"seed": 3}, "the config's seed was 0 and is 3"),
        ({"loss": "l1"}, "the config's loss was l2 and is l1; the diffusion's"),
    ],
)
def test_resume_where_the_configuration_was_edited(train, refused, tmp_path, change, told):
    run = tmp_path / "run"
    assert train(run, "--iterations", 2, "--sample-every", 0) == 0
    values = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(values | change))
    message = refused(main, ["--resume", run, "--iterations", 4], 1)
    assert f"step_00000002 cannot be resumed: it is of another run: {told}" in message


def test_resume_where_the_data_are_others(train, refused, resume, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16), np.uint8)
    np.save(tmp_path / "a.npy", images)
    flags = ("--data", tmp_path / "a.npy", "--sample-every", 0)
    assert train(tmp_path / "run", *flags, "--iterations", 2) == 0
    np.save(tmp_path / "a.npy", images ^ 1)
    argv = ["--resume", tmp_path / "run", "--iterations", 4]
    assert "it is of another run: the data's digest was " in refused(main, argv, 1)
    np.save(tmp_path / "a.npy", images[:39])
    assert "the data's shape was [40, 1, 16, 16] and is [39, " in refused(main, argv, 1)
    np.save(tmp_path / "a.npy", images)
    assert resume(tmp_path / "run", "--iterations", 4) == 0
    assert "--iterations was 2 and is 4: the cosine is that of the new" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "", '{"preset": "dig'])
def test_resume_where_the_configuration_is_damaged_takes_a_checkpoints_copy(
    train, tmp_path, capsys, text
):
    run = tmp_path / "run"
    flags = ("--iterations", 2, "--sample-every", 0, "--seed", 5)
    assert train(run, *flags) == 0
    saved = json.loads((run / "config.json").read_text())
    (run / "config.json").unlink()
    if text is not None:
        (run / "config.json").write_text(text)
    assert train(run, *flags, "--auto-resume") == 0
    out = capsys.readouterr().out
    assert f"warning: {run / 'config.json'} is damaged: its values are those in " in out
    assert "resumed after step 2" in out
    assert json.loads((run / "config.json").read_text()) == saved


def test_a_rank_that_does_not_see_the_run_folder_says_so():
    run = Run.__new__(Run)
    run.world = SimpleNamespace(
        rank=1, from_chief=lambda make: "/not/here/step_00000002", together=lambda run: run()
    )
    run.display = run.folder = SimpleNamespace(say=None)
    with pytest.raises(RunFolderError, match="rank 1 cannot see /not/here/step_00000002, which"):
        run.resume()


def test_a_rank_takes_the_set_that_rank_0_opened_or_opens_it_where_it_cannot(monkeypatch):
    opened = ImageSet(images=np.zeros((4, 1, 16, 16), np.uint8), name="a", photographs=False)
    monkeypatch.setattr(setup, "open_data", lambda config, say: opened)
    monkeypatch.setattr(setup, "taken_over", lambda known: known)
    for known, expected in (("taken", "taken"), (None, opened)):
        world = SimpleNamespace(
            is_chief=False, from_chief=lambda make, known=known: known, together=lambda run: run()
        )
        assert setup.open_data_once(TrainConfig(), world, print) is expected


def test_rank_0_puts_a_large_set_that_lies_in_memory_where_the_others_can_map_it(
    monkeypatch, tmp_path
):
    opened = ImageSet(images=np.zeros((4, 1, 16, 16), np.uint8), name="a", photographs=False)
    monkeypatch.setattr(setup, "open_data", lambda config, say: opened)
    config, handed = TrainConfig(data_root=str(tmp_path)), []
    world = SimpleNamespace(
        is_chief=True,
        size=2,
        from_chief=lambda make: handed.append(make()),
        together=lambda run: run(),
    )
    assert setup.open_data_once(config, world, print) is opened and handed == [None]
    monkeypatch.setattr(setup, "HELD_BY_EACH_BYTES", 0)
    assert isinstance(setup.open_data_once(config, world, print).images, np.memmap)
    assert handed[1]["images"] == (4, 1, 16, 16)
    world.size = 1
    assert setup.open_data_once(config, world, print) is opened


@pytest.mark.parametrize("text", ["", "{", "[]", '{"preset": "digits", "colour": 1}'])
def test_resume_where_the_configuration_is_damaged(tmp_path, refused, tree, text):
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in refused(main, ["--resume", tmp_path], 2)
    assert list(tree(tmp_path).values()) == [text.encode()]


def test_a_tracker_that_is_not_installed_leaves_a_folder_that_can_be_used(
    tmp_path, train, tiny, refused, monkeypatch
):
    from ddpm_fast.train import trackers

    def missing(*_):
        raise ImportError

    monkeypatch.setattr(trackers, "_wandb", missing)
    argv = [*tiny, "--run-dir", tmp_path / "run", "--wandb"]
    assert "--wandb needs the wandb package: pip install" in refused(main, argv, 2)
    assert train(tmp_path / "run", "--iterations", 1, "--sample-every", 0) == 0
