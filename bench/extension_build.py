"""Build and install the C++ and CUDA extension for this machine's GPU, and look at the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from bench import environment


class BuildFailed(Exception):
    """pip failed, or the extension does not load."""


def build() -> str:
    """pip install -e . for this GPU's architecture; returns what pip said. BuildFailed."""
    major, minor = torch.cuda.get_device_capability()
    options = {"DDPM_FAST_CUDA": "1", "DDPM_FAST_CUDA_ARCHS": f"{major}{minor}"}
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e"]
    done = subprocess.run(
        [*pip, ".", "-v"],
        cwd=environment.ROOT,
        env=os.environ | options,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        print(done.stdout[-8000:])
        raise BuildFailed(f"pip install has exit code {done.returncode}: {done.stdout[-500:]}")
    return done.stdout


def built() -> str:
    """The CUDA version and architectures of the installed extension. BuildFailed."""
    # A fresh process: this one may have looked for the extension already.
    show = "from ddpm_fast import _C; import json; print(json.dumps(_C.build_info()))"
    done = subprocess.run(
        [sys.executable, "-c", show], cwd=environment.ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise BuildFailed(f"ddpm_fast._C does not load: {done.stderr.strip()[-500:]}")
    info = json.loads(done.stdout)
    return f"CUDA {info['cuda_version'] or 'none'} {info['archs']}"
