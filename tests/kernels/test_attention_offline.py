"""What the compiler makes of attention's launches: no spills, tensor cores, 16-byte accesses.

Registers are checked where Triton 3.6 is: python -m ddpm_fast.kernels.offline --budget.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# A process of its own, because TRITON_INTERPRET=1 in the tests' environment replaces the compiler.
COMPILE = """
import sys
from ddpm_fast.kernels import attention_triton, offline

arch = int(sys.argv[1])
for launch in attention_triton.launches(arch):
    row = offline.compile_and_check("attention", launch, arch, with_budget=False)
    for violation in row.violations:
        print(f"{launch.name} sm_{arch}: {violation}")
"""

SPILL = """
import dataclasses
from ddpm_fast.kernels import attention_triton, offline

launches = {launch.name: launch for launch in attention_triton.launches(90)}
launch = launches["kv.backward t256 d128"]
wide = dataclasses.replace(launch, constexprs={**launch.constexprs, "HEAD_DIM": 256})
print("stack" if offline.compile_launch(wide, 90).stack_bytes else "no stack")
"""


def compiled(code: str, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "arch",
    [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)],
)
def test_every_launch_of_the_presets_compiles_without_spills_to_tensor_cores(arch):
    assert compiled(COMPILE, str(arch)) == ""


def test_the_backward_pass_that_is_left_to_sdpa_does_spill():
    assert compiled(SPILL) == "stack"
