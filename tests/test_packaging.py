"""Building the extension: without torch, incrementally, with or without CUDA, one-line errors."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "csrc", "ddpm_fast"]
TEST_COMMAND = "pip install -e '.[test]' && pytest"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ninja builds are for Linux")


def copy_sources(to: Path) -> Path:
    """What a clean checkout holds, without compiled files; a probe of each kind of package data."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    to.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, to / name)
    (to / "ddpm_fast" / "data").mkdir(exist_ok=True)
    for name in ("data/probe.npz", "data/probe.txt", "py.typed"):
        (to / "ddpm_fast" / name).touch()
    return to


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DDPM_FAST_", "CUDA"))}
    return subprocess.run(
        command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=300
    )


def build_in_place(source: Path, **environment: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, **environment)


def object_times(source: Path) -> dict[str, int]:
    build = source / "build"
    return {path.name: path.stat().st_mtime_ns for path in build.glob("ninja-*/*.o")}


def rebuilt(source: Path, **environment: str) -> set[str]:
    """The object files that a further build writes anew."""
    before = object_times(source)
    done = build_in_place(source, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name for name, time in object_times(source).items() if before.get(name) != time}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the source distribution from pip's isolated environment, which has no torch."""
    work = tmp_path_factory.mktemp("wheel")
    source = copy_sources(work / "source")
    hook = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    done = run(sys.executable, "-c", hook, cwd=source)
    assert done.returncode == 0, done.stderr
    sdist = next(work.glob("*.tar.gz"))
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", "wheels", str(sdist))
    done = run(*pip, cwd=work, DDPM_FAST_CUDA="0")
    if "Could not find a version that satisfies the requirement" in done.stderr:
        pytest.skip("no package index reachable for pip's isolated environment")
    assert done.returncode == 0, done.stdout + done.stderr
    return next((work / "wheels").glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_the_extension_and_the_package_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("ddpm_fast/_C.") for name in names)
    wanted = {"data/probe.npz", "data/probe.txt", "py.typed", "ops.py", "kernels/dropout/op.py"}
    assert {f"ddpm_fast/{name}" for name in wanted} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "build/"))]


USE_WHEEL = """
import importlib.metadata, ddpm_fast.ops as ops
from ddpm_fast.kernels.calling import extension
info = extension.module().build_info()
assert not info["cuda"] and info["archs"] == []
assert info["version"] == importlib.metadata.version("ddpm-fast")
scripts = importlib.metadata.distribution("ddpm-fast").entry_points
print(extension.module().__file__, scripts["ddpm-fast"].value)
print(ops.philox_normal((2, 4), seed=0, impl="fused").tolist())
"""


@pytest.mark.slow
def test_wheel_works_installed_elsewhere(wheel, tmp_path):
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel))
    done = run(*pip, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run(sys.executable, "-c", USE_WHEEL, cwd=elsewhere, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    where, script = done.stdout.splitlines()[0].split()
    assert Path(where).is_relative_to(site)
    assert script == "ddpm_fast.cli.verbs:main"


@pytest.mark.slow
def test_builds_are_incremental_and_follow_headers(tmp_path):
    source = copy_sources(tmp_path / "source")
    environment = {"DDPM_FAST_CUDA": "0", "CXXFLAGS": "-O0 -Werror"}
    everything = rebuilt(source, **environment)
    assert {"module.o", "cpu.o", "cpu_loops_baseline.o"} <= everything
    assert rebuilt(source, **environment) == set()
    (source / "csrc" / "simd.h").touch()
    loops = {name for name in everything if name.startswith("cpu_loops_")}
    assert rebuilt(source, **environment) == loops
    (source / "csrc" / "kernels.h").touch()
    assert rebuilt(source, **environment) == {"module.o", "cpu.o"}


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_cuda_part_builds_without_warnings_and_imports_without_a_driver(tmp_path):
    source = copy_sources(tmp_path / "source")
    done = build_in_place(
        source,
        DDPM_FAST_CUDA="1",
        DDPM_FAST_CUDA_ARCHS="90",
        CXXFLAGS="-O0 -Werror",
        NVCC_APPEND_FLAGS="-Werror all-warnings",
        CUDACXX=NVCC,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    extension = next((source / "ddpm_fast").glob("_C.*.so"))
    needed = run("readelf", "-d", str(extension), cwd=tmp_path).stdout
    assert "libstdc++" in needed
    assert "libcuda" not in needed  # neither the driver nor the shared runtime
    load = (
        "import importlib.util as u, sys;"
        "s = u.spec_from_file_location('_C', sys.argv[1]); m = u.module_from_spec(s);"
        "s.loader.exec_module(m); i = m.build_info(); print(i['cuda'], *i['archs'])"
    )
    done = run(sys.executable, "-c", load, str(extension), cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.stdout.split() == ["True", "90"], done.stderr


FAKE_NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.48" ;;
  --list-gpu-arch) printf 'compute_80\\ncompute_90\\n' ;;
  *) echo "cuda.cu: no such luck" >&2; exit 1 ;;
esac
"""


@pytest.fixture(scope="module")
def fake_nvcc(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("nvcc") / "nvcc"
    path.write_text(FAKE_NVCC)
    path.chmod(0o755)
    return path


def error_of_build(tmp_path: Path, **environment: str) -> tuple[str, str]:
    """The last line of a build that must fail without a traceback, and all of its output."""
    source = copy_sources(tmp_path / "source")
    setup = source / "setup.py"
    setup.write_text(setup.read_text().replace("/usr/local/cuda/bin", "/nowhere"))
    done = build_in_place(source, CXXFLAGS="-O0", **environment)
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "Traceback" not in output
    return done.stderr.strip().splitlines()[-1], output


def test_an_unknown_arch_is_named_with_the_allowed_ones(tmp_path, fake_nvcc):
    error, _ = error_of_build(tmp_path, CUDACXX=str(fake_nvcc), DDPM_FAST_CUDA_ARCHS="80;61")
    assert error == (
        "error: DDPM_FAST_CUDA_ARCHS=80;61: nvcc 13.0 does not know arch 61; it allows 80, 90"
    )


def test_a_bad_value_of_ddpm_fast_cuda_is_one_line(tmp_path):
    error, _ = error_of_build(tmp_path, DDPM_FAST_CUDA="yes")
    assert error == "error: DDPM_FAST_CUDA='yes' must be 0, 1 or auto"


def test_cuda_asked_for_and_no_nvcc_says_where_it_was_sought(tmp_path):
    error, _ = error_of_build(tmp_path, DDPM_FAST_CUDA="1", PATH=str(tmp_path))
    assert error.startswith("error: DDPM_FAST_CUDA=1 but nvcc is not in CUDACXX, CUDA_HOME")


def test_cudacxx_that_is_not_there_is_named(tmp_path):
    error, _ = error_of_build(tmp_path, CUDACXX="/nowhere/nvcc")
    assert error.startswith("error: CUDACXX=/nowhere/nvcc is not an executable file")


@pytest.mark.slow
def test_a_failed_cuda_build_names_the_command_and_the_way_round_it(tmp_path, fake_nvcc):
    error, output = error_of_build(tmp_path, CUDACXX=str(fake_nvcc))  # auto: found, so an error
    assert error.startswith(f"error: building ddpm_fast._C failed at `{fake_nvcc} -MD -MF cuda.o.d")
    assert error.endswith("To build without CUDA: DDPM_FAST_CUDA=0 pip install -e .")
    assert "no such luck" in output


def test_readme_and_ci_run_the_same_test_command():
    assert TEST_COMMAND in (ROOT / "README.md").read_text()
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert ci[-1] == TEST_COMMAND
