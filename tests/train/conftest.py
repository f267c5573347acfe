"""Training in this process and in another one, and being stopped at a chosen step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ddpm_fast
from ddpm_fast.train.__main__ import main
from ddpm_fast.train.step import TrainStep

SHORT = ("--iterations", 12, "--checkpoint-every", 4, "--log-every", 3, "--sample-every", 0)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture
def train(tiny):
    """train(folder, *flags): run the trainer here on the tiny net; its exit code."""

    def run(folder, *flags):
        return main([*tiny, "--run-dir", str(folder), *map(str, flags)])

    return run


@pytest.fixture
def resume():
    """resume(folder, *flags): continue a run here; its exit code."""

    def run(folder, *flags):
        return main(["--resume", str(folder), *map(str, flags)])

    return run


@pytest.fixture
def start_command(tmp_path):
    """start_command(*argv): python -m ddpm_fast.train in another process, ended with the test."""
    processes = []

    def start(*argv, num_threads=1, **options):
        process = subprocess.Popen(
            [sys.executable, "-m", "ddpm_fast.train", *map(str, argv)],
            env={
                **os.environ,
                "PYTHONPATH": str(Path(ddpm_fast.__path__[0]).parent),
                "OMP_NUM_THREADS": str(num_threads),
            },
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def before_step(monkeypatch):
    """before_step(number, action): have the trainer in this process call action() at that step."""

    def arrange(number, action):
        original = TrainStep.__call__

        def call(self, step):
            if step == number:
                action()
            original(self, step)

        monkeypatch.setattr(TrainStep, "__call__", call)
        return lambda: monkeypatch.setattr(TrainStep, "__call__", original)

    return arrange


class Killed(BaseException):
    """Ends a run in this process as a kill would: nothing is saved on the way out."""


@pytest.fixture
def train_until_killed(train, before_step):
    """train_until_killed(step, folder, *flags): the process is lost before that step."""

    def run(step, folder, *flags):
        def die():
            raise Killed

        undo = before_step(step, die)
        with pytest.raises(Killed):
            train(folder, *flags)
        undo()

    return run


@pytest.fixture
def weights():
    """weights(folder, step) -> {file name: bytes} of that step's checkpoint."""

    def read(folder, step):
        saved = folder / "checkpoints" / f"step_{step:08d}"
        return {
            name: (saved / f"{name}.safetensors").read_bytes()
            for name in ("model", "ema", "optimizer")
        }

    return read


@pytest.fixture
def rows():
    """rows(folder) -> the metrics that a resumed run must repeat; json keeps floats exactly."""

    def read(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        names = ("step", "loss", "lr", "grad_norm")
        return [tuple(repr(json.loads(line)[name]) for name in names) for line in lines]

    return read


@pytest.fixture(scope="session")
def whole(train_tiny):
    """The short run that nothing disturbed; not to be written to."""
    return train_tiny(*SHORT)
