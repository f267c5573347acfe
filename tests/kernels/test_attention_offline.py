"""Why one of attention's backward passes is not ours; test_budgets compiles those that are."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# A process of its own, because TRITON_INTERPRET=1 in the tests' environment replaces the compiler.
SPILL = """
import dataclasses
from ddpm_fast.kernels.attention import forward_triton as attention_triton
from ddpm_fast.kernels.tuning import offline

launches = {launch.name: launch for launch in attention_triton.launches(90)}
launch = launches["kv.backward t256 d128"]
wide = dataclasses.replace(launch, constexprs={**launch.constexprs, "HEAD_DIM": 256})
print("stack" if offline.compile_launch(wide, 90).stack_bytes else "no stack")
"""


def test_the_backward_pass_that_is_left_to_sdpa_does_spill():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SPILL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "stack"
