"""The CPU part of csrc/ under AddressSanitizer, UBSan and ThreadSanitizer; no GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.csrc.builds import ROOT, build_program, claims_of, load_setup, run_claim, run_python
from tests.test_packaging import build_in_place, copy_sources

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are preloaded, as on Linux"),
]

DRIVER = Path(__file__).with_name("sanitizer_driver.py")
SANITIZE = "-fsanitize=address,undefined,float-cast-overflow"
# Level 1 with the vectoriser: the loops are vectorised as in a release, in half the time.
FLAGS = f"-O1 -ftree-vectorize -g1 -Werror {SANITIZE} -fno-sanitize-recover=all"
KERNEL_TESTS = ["test_philox.py", "test_dropout.py", "test_q_sample.py", "test_posterior_step.py"]
# What runs torch alone, or its compiler.
NOT_OF_THE_EXTENSION = "not compile and not opcheck and not gradient and not reference]"

# Beside the kernel tests, to show that they run on this build.
TEST_OF_THE_BUILD = f"""
from ddpm_fast.kernels.calling import extension


def test_the_extension_is_the_sanitized_one():
    assert "{SANITIZE}" in extension.module().build_info()["flags"]
"""


def library(name: str) -> str | None:
    """The path of a runtime library of GCC's, or None: of another compiler, or not installed."""
    gcc = shutil.which("gcc")
    found = gcc and subprocess.run(
        [gcc, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return found.stdout.strip() if found and os.path.isabs(found.stdout.strip()) else None


@pytest.fixture(scope="module")
def under_asan() -> dict[str, str]:
    """The environment in which an ordinary Python loads a sanitized extension."""
    asan, runtime = library("libasan.so"), library("libstdc++.so")
    if asan is None or runtime is None or "clang" in load_setup().find_cxx():
        pytest.skip("needs GCC and its libasan")
    return {
        "LD_PRELOAD": f"{asan} {runtime}",  # the latter: ASan looks up the throwing of exceptions
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # so that each object has its own bounds
    }


@pytest.fixture(scope="module")
def checkout(under_asan, tmp_path_factory) -> Path:
    """A copy of the sources with the extension built for the sanitizers, and of the tests."""
    source = copy_sources(tmp_path_factory.mktemp("sanitized") / "source")
    flags = {"CXXFLAGS": FLAGS, "LDFLAGS": SANITIZE}
    done = build_in_place(source, DDPM_FAST_CUDA="0", **flags)
    assert done.returncode == 0, done.stdout + done.stderr
    ignore = shutil.ignore_patterns("__pycache__", "golden")
    shutil.copytree(ROOT / "tests", source / "tests", ignore=ignore)
    (source / "tests" / "golden").symlink_to(ROOT / "tests" / "golden")
    (source / "tests" / "test_build.py").write_text(TEST_OF_THE_BUILD)
    return source


@pytest.fixture(scope="module")
def extension(checkout) -> Path:
    return next((checkout / "ddpm_fast").glob("_C.*.so"))


def test_every_function_keeps_within_its_buffers_and_gives_the_same_bits(under_asan, extension):
    done = run_python(DRIVER, extension, **under_asan)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.startswith("all checks passed: baseline")


def test_a_buffer_that_is_one_float_short_is_found(under_asan, extension):
    done = run_python(DRIVER, extension, "overrun", **under_asan)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_the_kernels_own_tests_pass(under_asan, checkout):
    files = [checkout / "tests" / "kernels" / name for name in KERNEL_TESTS]
    done = run_python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu",
        "-k", NOT_OF_THE_EXTENSION, checkout / "tests" / "test_build.py",
        *[file for file in files if file.exists()], cwd=checkout, **under_asan,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.fixture(scope="module")
def threaded(tmp_path_factory):
    if library("libtsan.so") is None or "clang" in load_setup().find_cxx():
        pytest.skip("needs GCC and its libtsan")
    out = tmp_path_factory.mktemp("threads") / "check"
    flags = ("-O1", "-fsanitize=thread")
    return build_program("thread_check.cpp", out, *flags, parts=("cpu.cpp", "cpu_loops.cpp"))


@pytest.mark.parametrize("claim", claims_of("thread_check.cpp"))
def test_threads_have_no_race_and_give_the_bits_of_one(threaded, claim):
    run_claim(threaded, claim)
