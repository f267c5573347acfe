"""Launches as the launch code binds them, under a driver that is not there: launched_kernels.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def launched(folder, jobs):
    """A process of its own: TRITON_INTERPRET=1 in the tests' environment replaces the compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("launched_kernels.py"), folder / "out"]
    done = subprocess.run(
        [*map(str, command), str(jobs)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "out").read_text())


@pytest.fixture(scope="module")
def bound(tmp_path_factory):
    return launched(tmp_path_factory.mktemp("bound"), jobs=0)


def test_offline_compiles_what_launch_code_binds(bound):
    assert bound["unbound"] == []


def test_every_launch_says_its_stages_and_prefetches_for_matrix_products_only(bound):
    stages = {module: set(found) for module, found in bound["num_stages"].items()}
    assert stages.pop("attention.forward_triton") <= {1, 2}
    assert len(stages) >= 3 and set(map(tuple, stages.values())) == {(1,)}


@pytest.mark.slow
def test_every_launch_of_the_gpu_tests_and_the_suite_compiles_without_spills(tmp_path):
    compiled = launched(tmp_path, jobs=os.cpu_count())
    assert compiled["kernels"] > 400 and compiled["violations"] == {}
