"""Commands under torchrun, on gloo ranks of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ddpm_fast

REPOSITORY = Path(ddpm_fast.__path__[0]).parent


@pytest.fixture
def start_ranks(tmp_path):
    """start_ranks(count, *argv, options=()) -> the torchrun process, ended with the test."""
    processes = []

    def start(count, *argv, options=(), **environment):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count]
        command += [*options, *argv]
        process = subprocess.Popen(
            [str(word) for word in command],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
                 **environment},
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, 9)
        process.communicate()


@pytest.fixture
def run_ranks(start_ranks):
    """run_ranks(count, *argv, code=0, **) -> output of torchrun, which must end with that code."""

    def run(count, *argv, code=0, timeout=400, **options):
        process = start_ranks(count, *argv, **options)
        output, _ = process.communicate(timeout=timeout)
        assert process.returncode == code, output
        return output

    return run
