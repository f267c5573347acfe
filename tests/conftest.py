"""What tests of several folders share: tiny trained runs, and how a command refuses."""

import os
from pathlib import Path

import pytest
import torch

# A net of 10 thousand parameters on the digits, 5 diffusion steps: a training run takes under 1 s.
TINY = (
    *("--base-channels", "8", "--channel-mults", "1,2", "--num-groups", "4"),
    *("--attention-resolutions", "1", "--time-emb-dim", "8", "--batch-size", "8"),
    *("--num-timesteps", "5", "--sample-steps", "5", "--sample-images", "4", "--device", "cpu"),
)


@pytest.fixture(scope="session")
def tiny():
    """Flags of a training run that is over at once."""
    return TINY


@pytest.fixture
def one_thread():
    """Tiny nets lose time to more threads; and sums are the same in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_tiny(folder: Path, *flags: str) -> Path:
    from ddpm_fast.train.__main__ import main

    run = folder / "run"
    assert main([*TINY, "--iterations", "4", "--log-every", "2", "--run-dir", str(run), *flags]) == 0
    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A finished run of an unconditional net; not to be written to."""
    return train_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_class_run(tmp_path_factory):
    """A finished run of a class-conditional net; not to be written to."""
    return train_tiny(tmp_path_factory.mktemp("tiny_classes"), "--use-labels")


@pytest.fixture
def refused(capsys):
    """refused(main, argv, code) -> the one line with which the command ended.

    Lines that a download or a decode shows before it fails are not counted.
    """

    def check(main, argv, code):
        capsys.readouterr()
        assert main([str(word) for word in argv]) == code
        lines = capsys.readouterr().err.splitlines()
        lines = [li for li in lines if not li.startswith(("downloading ", "decoding "))]
        assert len(lines) == 1, lines
        prog, error, message = lines[0].partition(": error: ")
        assert error and prog.startswith("python -m ddpm_fast.")
        return message

    return check


@pytest.fixture
def tree():
    """tree(folder) -> {relative path: bytes, or None for a folder}, to show that nothing changed."""

    def read(folder):
        paths = (Path(base) / name for base, dirs, files in os.walk(folder) for name in dirs + files)
        return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in paths}

    return read
