"""Packages that the benchmarks import: which are missing, and one command that downloads them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# What to import, as "module" or "module:name", and what pip calls it.
IMPORTS = {
    "tyro": "tyro", "docstring_parser": "docstring_parser", "typeguard": "typeguard",
    "typing_extensions": "typing_extensions", "rich": "rich", "safetensors": "safetensors",
    "PIL": "pillow", "pynvml": "nvidia-ml-py", "triton": "triton",
    "diffusers:UNet2DModel": "diffusers", "diffusers:DDIMScheduler": "diffusers",
    "liger_kernel.ops.group_norm": "liger-kernel", "pytest": "pytest", "hypothesis": "hypothesis",
    "xdist": "pytest-xdist",
}  # fmt: skip
# For a machine without a network that has PyTorch, Triton and pytest; all of them pure Python.
# The build needs setuptools 77; until 82 pkg_resources is part of it.
WHEELS = (
    "tyro", "docstring_parser", "typeguard", "diffusers", "liger-kernel", "setuptools>=77,<82",
)  # fmt: skip
LEAST_SETUPTOOLS = 77
OPTIONAL = (
    "liger-kernel",
    "hypothesis",
    "pytest-xdist",
)  # without them a peer or tests are left out
FETCH = "python -m bench.gpu_suite --wheels DIR"
IMPORT_S = 90.0
# Imports each argument; a line for each that fails. The last line that starts with "at" names the
# import in which the process died.
_CODE = """
import importlib, sys
for what in sys.argv[1:]:
    print("at", what, flush=True)
    module, _, name = what.partition(":")
    try:
        found = importlib.import_module(module)
        if name:
            getattr(found, name)
    except BaseException as error:
        print("fails", what, type(error).__name__, " ".join(str(error).split())[:150], flush=True)
import setuptools
print("setuptools", setuptools.__version__)
print("done")
"""


def missing(imports: Sequence[str] = tuple(IMPORTS)) -> dict[str, str]:
    """Package -> why it is of no use here, found by importing it in another process."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CODE, *imports],
            text=True,
            capture_output=True,
            timeout=IMPORT_S,
        )
        said, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        said, code = (error.stdout or b"").decode(errors="replace"), None
    lines = [line.split(" ", 2) for line in said.splitlines()]
    found = {IMPORTS.get(line[1], line[1]): line[2] for line in lines if line[0] == "fails"}
    version = next((line[1] for line in lines if line[0] == "setuptools"), None)
    if version is not None and int(version.partition(".")[0]) < LEAST_SETUPTOOLS:
        found["setuptools"] = f"{version}, the build needs {LEAST_SETUPTOOLS}"
    if ["done"] not in lines:
        last = next((line[1] for line in reversed(lines) if line[0] == "at"), "setuptools")
        how = f"no end within {IMPORT_S:g} s" if code is None else f"exit code {code}"
        found.setdefault(IMPORTS.get(last, last), f"importing it ends the process: {how}")
    return found


def shown(found: dict[str, str]) -> str:
    """One line that names what is missing and the command that fetches it."""
    if not found:
        return "all there"
    named = "; ".join(f"{name} ({why})" for name, why in found.items())
    carried = {wheel.partition(">")[0] for wheel in WHEELS}
    others = [name for name in found if name not in carried]
    how = [f"{FETCH} downloads the wheels"] if len(others) < len(found) else []
    how += [f"pip install {' '.join(others)}"] if others else []
    return f"missing: {named}: {', '.join(how)}"


def fetch(folder: Path) -> int:
    """Download WHEELS into an empty folder by one pip command; returns its exit code, 2 for a
    folder that holds wheels: two versions of a package would stop their installation."""
    if any(folder.glob("*.whl")):
        print(f"--wheels {folder}: holds wheels already; allowed: an empty or new folder")
        return 2
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d"]
    code = subprocess.run([*command, str(folder), *WHEELS]).returncode
    found = sorted(path.name for path in folder.glob("*.whl"))
    print(f"{folder}: {', '.join(found) or 'no wheels'}")
    return code
