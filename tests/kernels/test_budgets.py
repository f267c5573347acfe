"""What the presets' launches become when compiled: in this Triton, and in the one budgets hold for.

No GPU is needed and none is used; each run is a process of its own, as the tests' own interprets.
"""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
BUDGETED = "3.6.0"  # what the measured GPU machines have; counts differ by version


def compile_launches(*flags, path=()):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "ddpm_fast.kernels.tuning.offline", *flags],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kernel, launches", [("group_norm_silu", 34), ("attention", 26)])
def test_every_launch_compiles_without_spills_and_as_wide_as_it_must_be(kernel, launches, arch):
    table = compile_launches("--kernels", kernel, "--archs", str(arch))
    assert f"{launches} launches, 0 with violations" in table


@pytest.fixture(scope="module")
def budgeted_triton(tmp_path_factory):
    """A folder that holds the Triton of the budgets, or () if it is the installed one."""
    if version("triton") == BUDGETED:
        return ()
    folder = tmp_path_factory.mktemp("triton")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    done = subprocess.run(
        [*map(str, command), f"triton=={BUDGETED}"], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"triton {BUDGETED} cannot be installed here: {done.stderr.strip()[-200:]}")
    return (folder,)


@pytest.mark.slow
def test_every_launch_on_sm_90_keeps_its_budget(budgeted_triton):
    table = compile_launches("--archs", "90", "--budget", path=budgeted_triton)
    assert " 0 with violations" in table
