"""What the tests of csrc/ share: setup.py's flags, and check programs made of claims."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent.parent
CSRC = ROOT / "csrc"


def load_setup() -> SimpleNamespace:
    """What setup.py defines, without running its setup()."""
    with mock.patch("setuptools.setup"):
        return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def claims_of(source: str) -> list[str]:
    """The names of the claims (claims.h) in a check program of this folder."""
    return re.findall(r"^CLAIM\((\w+)\)", Path(__file__).with_name(source).read_text(), re.M)


# 64 bits into 32: an index that is cut off where it is stored, passed or returned.
NARROWING = ("-Wconversion", "-Wno-sign-conversion", "-Wno-float-conversion")
NARROWING_OF_CLANG = ("-Wshorten-64-to-32",)


def build_program(source: str, out: Path, *flags: str, parts: tuple[str, ...] = ()) -> Path:
    """Compiles a check program of this folder with parts of csrc/, warnings being errors."""
    setup = load_setup()
    here = Path(__file__).parent
    sources = [here / source, *(CSRC / part for part in parts)]
    cxx = setup.find_cxx()
    narrowing = NARROWING_OF_CLANG if "clang" in cxx else NARROWING
    command = [*shlex.split(cxx), *setup.CXX_FLAGS, *narrowing, "-g1", "-Werror", *flags]
    command += [f"-I{CSRC}", f"-I{here}", *map(str, sources), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


def run_claim(program: Path, name: str) -> None:
    done = subprocess.run([program, name], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def run_python(*arguments: object, cwd: Path = ROOT, **environment: str):
    """A Python process with these variables added."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=os.environ | environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
