"""python -m ddpm_fast.doctor --chaos, as a user runs it, for some seconds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_fast.doctor.__main__ import main

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="ranks are found in /proc"),
]


def test_after_two_random_kills_the_weights_are_bitwise_those_of_an_undisturbed_run(tmp_path):
    command = [sys.executable, "-m", "ddpm_fast.doctor", "--chaos", "--minutes", "2",
               "--kills", "2"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    kills = sum(line.startswith("kill ") for line in lines)
    assert kills == 2
    assert lines[-1].startswith("ok: after 2 kills the weights are those of the und")
    assert re.search(r"first step after [\d.]+ s", done.stdout)
    assert not any(Path(tmp_path).iterdir())


def test_weights_that_differ_are_named_with_exit_code_1(monkeypatch, capsys):
    from ddpm_fast.doctor import chaos

    monkeypatch.setattr(chaos.Training, "start", lambda self: None)
    monkeypatch.setattr(chaos, "_disturb", lambda *_: (1, [3.0]))

    def finish(training):
        training.weights_folder.mkdir(parents=True)
        (training.weights_folder / "ema.safetensors").write_bytes(training.run.parent.name.encode())
        (training.weights_folder / "model.safetensors").write_bytes(b"same")

    monkeypatch.setattr(chaos, "_finish", finish)
    assert main(["--chaos"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "differs from the undisturbed run after 1 kills: ema.safetensors"


def test_kills_that_the_minutes_did_not_suffice_for_are_told_with_exit_code_1(monkeypatch, capsys):
    from ddpm_fast.doctor import chaos

    monkeypatch.setattr(chaos.Training, "start", lambda self: None)
    monkeypatch.setattr(chaos, "_disturb", lambda *_: (0, []))
    monkeypatch.setattr(chaos, "_finish", lambda training: None)
    for flags, told in ((), "0 kills in 2 minutes, 1 wanted"), (("--kills", "3"), "3 wanted"):
        assert main(["--chaos", *flags]) == 1
        assert told in capsys.readouterr().out.splitlines()[-1]


def test_a_training_that_does_not_come_back_is_told_in_one_line(monkeypatch, refused):
    from ddpm_fast.doctor import chaos

    monkeypatch.setattr(chaos, "NET", (*chaos.NET, "--learning-rat", "1"))
    message = refused(main, ["--chaos", "--minutes", "0.1"], 1)
    assert message.startswith("the training does not go on: ")
    assert "unknown flag --learning-rat" in message
