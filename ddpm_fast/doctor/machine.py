"""The machine and its tools: system, Python, packages, processor, disk, compilers."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from ddpm_fast.doctor.rows import PIP_NAMES, Finding, one_line, pip_install

NEEDED_PACKAGES = ("numpy", "safetensors.torch", "PIL.Image", "rich.table", "tyro")
LOGGING_PACKAGES = ("tensorboard", "wandb")
MIN_TORCH = (2, 11)
MIN_FREE_BYTES = 200 * 2**20  # the digits run leaves about 50 MB


def check_system() -> Finding:
    name = platform.system()
    if name == "Linux":
        with contextlib.suppress(OSError, KeyError):
            name = platform.freedesktop_os_release()["PRETTY_NAME"]
    elif name == "Darwin":
        name = f"macOS {platform.mac_ver()[0]}"
    return Finding(f"{name}, {platform.release()}, {platform.machine()}")


def check_python() -> Finding:
    kind = platform.python_implementation()
    return Finding(f"{platform.python_version()} ({kind})")


def check_packages() -> Finding:
    """What training imports besides torch; really imported."""
    versions, missing, broken = [], [], []
    for module in NEEDED_PACKAGES:
        root = module.partition(".")[0]
        try:
            importlib.import_module(module)
            versions.append(f"{PIP_NAMES.get(root, root)} {_version_of(root)}")
        except ModuleNotFoundError as error:
            missing.append((error.name or root).partition(".")[0])
        except Exception as error:  # a package whose own libraries do not fit
            broken.append((root, one_line(error)))
    if missing or broken:
        texts = [f"{name} is not installed" for name in missing]
        texts += [f"{name} does not load ({why})" for name, why in broken]
        mend = pip_install(missing + [name for name, _ in broken])
        if broken:
            mend = mend.replace("install", "install --force-reinstall", 1)
        return Finding("; ".join(texts), "fails", mend)
    return Finding(", ".join(versions))


def check_logging_packages() -> Finding:
    """For --tensorboard and --wandb; not imported, as that takes seconds."""
    missing = [name for name in LOGGING_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return Finding(f"not installed: {', '.join(missing)}", "optional", pip_install(missing))
    return Finding(", ".join(f"{name} {_version_of(name)}" for name in LOGGING_PACKAGES))


def check_torch() -> Finding:
    import torch

    from ddpm_fast.doctor import gpu

    version = torch.__version__
    runtime = torch.version.cuda or torch.version.hip
    kind = "CPU" if runtime is None else "CUDA" if torch.version.cuda else "ROCm"
    found = f"{version}, {kind} build"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and tuple(map(int, numbers.groups())) < MIN_TORCH:
        least = ".".join(map(str, MIN_TORCH))
        return Finding(f"{found}; must be at least {least}", "fails",
                       f"pip install --upgrade 'torch>={least}'")  # fmt: skip
    if runtime is None and gpu.nvml_gpus():
        mend = "pip install --force-reinstall torch"
        if platform.system() != "Linux":
            mend = "the command for CUDA on pytorch.org/get-started"
        return Finding(f"{found}, but this machine has an NVIDIA GPU", "slower", mend)
    return Finding(found)


def check_threads() -> Finding:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    used = torch.get_num_threads()
    found = f"torch uses {used} of {cores} cores"
    # By default it is one thread for each physical core: half, where a core runs two threads.
    if cores and used < cores // 2:
        limits = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
        return Finding(found, "slower", f"unset {' '.join(limits)}" if limits else "")
    return Finding(found)


def check_disk() -> Finding:
    """Where runs/ goes unless --run-dir says otherwise."""
    free = shutil.disk_usage(".").free
    found = f"{free / 2**30:.1f} GiB free here"
    elsewhere = "python -m ddpm_fast.train --run-dir DIR, on another disk"
    if not os.access(".", os.W_OK):
        return Finding(f"{found}, but this folder is not writable", "fails", elsewhere)
    if free < MIN_FREE_BYTES:
        least = f"{MIN_FREE_BYTES / 2**30:.1f} GiB"
        return Finding(f"{found}; must be at least {least}", "fails", elsewhere)
    return Finding(found)


def check_nvcc() -> Finding:
    """Needed only where the extension's CUDA part is built."""
    path = find_nvcc()
    if path is None:
        return Finding(
            "not found; only building the CUDA part needs it", "optional",
            "DDPM_FAST_CUDA=1 pip install -e .  # after installing NVIDIA's CUDA toolkit",
        )  # fmt: skip
    release = re.search(r"release (\d+\.\d+)", _output(path, "--version"))
    return Finding(f"{release[1] if release else 'of unknown version'}, {path}")


def find_nvcc() -> str | None:
    """setup.py's order: CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda; a test compares."""
    name = "nvcc.exe" if os.name == "nt" else "nvcc"
    if explicit := os.environ.get("CUDACXX"):
        found = shutil.which(explicit)
        if found is None:
            raise ValueError(f"CUDACXX={explicit} is not an executable file")
        return found
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    for home in homes:
        if found := shutil.which(name, path=str(Path(home, "bin"))):
            return found
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def check_cxx() -> Finding:
    """Needed where the extension is built, and by Triton on the first run of a kernel."""
    names = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else []
    for command in names or [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            lines = _output(*command, "--version").splitlines() or ["of unknown version"]
            return Finding(f"{shlex.join(command)}: {lines[0]}")
    if names:
        return Finding(f"CXX={os.environ['CXX']} is not there", "optional", "unset CXX")
    return Finding("none; only building the extension needs it", "optional", _install_cxx())


def _install_cxx() -> str:
    return {
        "Darwin": "xcode-select --install",
        "Windows": "install Visual Studio Build Tools with the C++ workload",
    }.get(platform.system(), "apt install g++")


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10)
    if done.returncode != 0:
        why = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise RuntimeError(f"`{shlex.join(command)}` failed: {why}")
    return done.stdout


def _version_of(module: str) -> str:
    try:
        return importlib.metadata.version(PIP_NAMES.get(module, module))
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"
