"""What tests of several folders share: tiny trained runs, and how a command refuses."""

import importlib
import os
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from ddpm_fast.train.__main__ import main
from tests.checkpoint_states import Gate

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before the first import of Triton, which is now
    with suppress(ImportError):
        importlib.import_module("triton.language")

# A net of 10 thousand parameters on the digits, 5 diffusion steps: a training run takes under 1 s.
# Its steps are shorter than the write of a checkpoint, and tests name the steps that are saved.
TINY = (
    *("--base-channels", "8", "--channel-mults", "1,2", "--num-groups", "4"),
    *("--attention-resolutions", "1", "--time-emb-dim", "8", "--batch-size", "8"),
    *("--num-timesteps", "5", "--sample-steps", "5", "--sample-images", "4", "--device", "cpu"),
    "--exact-checkpoints",
)


# 4 steps large enough for the classes and the dropout to show in the images.
QUICK = ("--iterations", 4, "--learning-rate", 0.05, "--warmup-steps", 0, "--ema-decay", 0.5)

PROGRESS = ("downloading ", "hashing ", "decoding ")


@pytest.fixture(scope="session")
def tiny():
    """Flags of a training run that is over at once."""
    return TINY


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """Tiny nets lose time to more threads, and another number sums in another order."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def train_tiny(tmp_path_factory):
    """train_tiny(*flags, num_threads=1) -> the folder of a finished run."""

    def train(*flags, num_threads=1):
        run = tmp_path_factory.mktemp("tiny") / "run"
        with threads(num_threads):
            assert main([*TINY, *map(str, flags), "--run-dir", str(run)]) == 0
        return run

    return train


@pytest.fixture(scope="session")
def tiny_run(train_tiny):
    """A finished run of an unconditional net; not to be written to."""
    return train_tiny(*QUICK)


@pytest.fixture(scope="session")
def tiny_class_run(train_tiny):
    """A finished run of a class-conditional net; not to be written to."""
    return train_tiny(*QUICK, "--use-labels")


@pytest.fixture
def refused(capsys):
    """refused(main, argv, code) -> the one line with which the command ended.

    The lines by which data tell their progress before they fail are not counted.
    """

    def check(main, argv, code):
        capsys.readouterr()
        assert main([str(word) for word in argv]) == code
        lines = capsys.readouterr().err.splitlines()
        lines = [li for li in lines if not li.startswith(PROGRESS)]
        assert len(lines) == 1, lines
        prog, error, message = lines[0].partition(": error: ")
        assert error and prog.startswith("python -m ddpm_fast.")
        return message

    return check


@pytest.fixture(scope="session")
def tiny_dropout_run(train_tiny):
    """A finished run of a net with dropout; not to be written to."""
    return train_tiny(*QUICK, "--dropout", 0.5)


@pytest.fixture
def tree():
    """tree(folder) -> {relative path: bytes, None for a folder}, to show that nothing changed."""

    def read(folder):
        paths = (
            Path(base) / name for base, dirs, files in os.walk(folder) for name in dirs + files
        )
        return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in paths}

    return read


@pytest.fixture
def gate(monkeypatch):
    """A Gate at which checkpoints wait; open at the latest when the test ends."""
    gate = Gate(monkeypatch)
    yield gate
    gate.open()
