"""The doctor: a row for every piece, the mending command for a broken one, and no crash."""

import ast
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.diffusion.process import Diffusion
from ddpm_fast.doctor import checks, gpu, machine, pieces
from ddpm_fast.doctor.__main__ import main
from ddpm_fast.doctor.rows import Check, Finding, Row, run_check
from ddpm_fast.doctor.table import show
from ddpm_fast.kernels.calling import extension

ROOT = Path(__file__).resolve().parent.parent
PIECES = [check.name for check in checks.CHECKS]


@pytest.fixture(scope="module")
def report() -> subprocess.CompletedProcess:
    """The command as a user runs it, its output not a terminal."""
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "DDPM_FAST_IMPL")}
    command = [sys.executable, "-m", "ddpm_fast.doctor"]
    return subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=60)


def only(monkeypatch, *names: str) -> None:
    chosen = tuple(check for check in checks.CHECKS if check.name in names)
    assert len(chosen) == len(names)
    monkeypatch.setattr(checks, "CHECKS", chosen)


def row_of(name: str) -> Row:
    return run_check(next(check for check in checks.CHECKS if check.name == name))


def test_this_machine_can_train_and_every_piece_has_its_row(report):
    assert report.returncode == 0, report.stdout + report.stderr
    rows = report.stdout.splitlines()
    assert [name for name in PIECES if not any(line.startswith(f" {name} ") for line in rows)] == []
    assert "Training can run on this machine: python -m ddpm_fast.train --compile" in rows
    assert report.stderr == ""


def test_the_table_fits_80_columns_and_has_no_colour_in_a_file(report):
    assert max(map(len, report.stdout.splitlines())) <= 80
    assert "\x1b" not in report.stdout


def test_output_that_cannot_hold_every_character_is_no_fault():
    code = (
        "from ddpm_fast.doctor.rows import Row; from ddpm_fast.doctor.table import show;"
        "show([Row('Disk', '/gr\\u00fc\\u00df [red]', 'fails', 'cd /gr\\u00fc\\u00df')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[red]" in done.stdout


def test_json_holds_the_same_rows(monkeypatch, capsys):
    only(monkeypatch, "OS", "Disk", "Philox")
    assert main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["OS", "Disk", "Philox"]
    assert all(set(row) == {"name", "found", "status", "mend"} for row in rows)


def test_a_check_that_raises_becomes_a_row_and_the_others_run(monkeypatch, capsys):
    def burst() -> Finding:
        raise KeyError("two\nlines")

    strange = (Check("Strange", burst), Check("OS", machine.check_system))
    monkeypatch.setattr(checks, "CHECKS", strange)
    assert main([]) == 1
    shown = capsys.readouterr().out
    assert r"KeyError: 'two\nlines'" in shown
    assert " OS " in shown
    assert "DDPM_FAST_TRACEBACK=1 python -m ddpm_fast.doctor" in shown


def test_a_check_that_is_not_needed_may_raise(monkeypatch):
    def leave() -> Finding:
        sys.exit("no")

    assert run_check(Check("Extra", leave, needed=False)).status == "optional"


def test_a_missing_module_is_mended_by_installing_what_pip_calls_it():
    def need() -> Finding:
        raise ModuleNotFoundError("No module named 'PIL.Image'", name="PIL.Image")

    assert run_check(Check("Images", need)).mend == "pip install pillow"


def test_without_torch_rich_and_tyro_it_still_reports(tmp_path):
    code = (
        "import sys; [sys.modules.__setitem__(m, None) for m in ('torch', 'rich', 'tyro')];"
        "from ddpm_fast.doctor.__main__ import main; sys.exit(main([]))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == ""
    assert [name for name in PIECES if name not in done.stdout] == []
    assert "\n    pip install torch\n" in done.stdout


def test_a_long_command_stays_on_one_line(capsys):
    command = "pip install " + " ".join(f"package{i}" for i in range(20))
    show([Row("Packages", "none", "fails", command), Row("U-Net", "none", "fails", command)])
    lines = capsys.readouterr().out.splitlines()
    assert lines.count(f"    {command}") == 1
    assert "To mend Packages, U-Net:" in lines


@pytest.mark.parametrize("argument", ["--jsn", "now"])
def test_a_bad_argument_is_one_line_and_exit_code_2(capsys, argument):
    assert main([argument]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flags", [("--minutes", "2"), ("--kills", "3")])
def test_a_flag_of_chaos_without_it_is_refused(capsys, flags):
    assert main([*flags]) == 2
    assert f"{flags[0]} " in (told := capsys.readouterr().err) and "--chaos" in told


def test_wrong_random_words_fail_and_name_the_reinstallation(monkeypatch, capsys):
    only(monkeypatch, "Philox")
    words = ops.philox_words
    monkeypatch.setattr(ops, "philox_words", lambda *a, **k: words(*a, **k) + 1)
    assert main([]) == 1
    shown = capsys.readouterr().out
    assert "wrong words 6627e8d6" in shown
    assert pieces.REINSTALL in shown
    assert "Training cannot run on this machine. What fails: Philox" in shown


def test_without_the_extension_training_is_slower_but_can_run(monkeypatch, capsys):
    monkeypatch.setattr(extension, "_WHY_MISSING", "it is not there (why); from here: pip ...")
    only(monkeypatch, "Extension", "Kernels", "Philox", "U-Net")
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert "\n    pip install -e .\n" in shown
    assert "published vector met: reference" in shown
    monkeypatch.setenv("DDPM_FAST_IMPL", "fused")
    assert row_of("Kernels").status == "fails"


def test_fused_kernels_that_this_machine_cannot_run_are_mended_by_unsetting_them(monkeypatch):
    monkeypatch.setenv("DDPM_FAST_IMPL", "fused")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    row = row_of("Kernels")
    assert (row.status, row.mend) == ("fails", "unset DDPM_FAST_IMPL")
    assert "on cpu only with TRITON_INTERPRET=1" in row.found


def test_an_unknown_impl_names_the_allowed(monkeypatch):
    monkeypatch.setenv("DDPM_FAST_IMPL", "quick")
    row = row_of("Kernels")
    assert (row.status, row.mend) == ("fails", "unset DDPM_FAST_IMPL")
    assert "'quick' must be one of auto, fused, reference" in row.found
    assert row_of("Training step").status == "fails"


def test_a_noising_that_is_off_its_formula_fails(monkeypatch):
    q_sample = Diffusion.q_sample

    def wrong(*arguments, **named):
        x_t, eps = q_sample(*arguments, **named)
        return x_t * 1.001, eps

    monkeypatch.setattr(Diffusion, "q_sample", wrong)
    assert row_of("Noising").status == "fails"


def test_a_net_that_gives_nan_fails(monkeypatch):
    from ddpm_fast.nn.unet import UNet

    forward = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda *a, **k: forward(*a, **k) * float("nan"))
    for name in ("U-Net", "Training step"):
        row = row_of(name)
        assert (row.status, row.mend) == ("fails", pieces.REINSTALL)


def test_a_checkpoint_that_cannot_be_written_names_the_temporary_folder(monkeypatch):
    def full(*arguments, **named):
        raise checkpoint.CheckpointError("not written: disk full")

    monkeypatch.setattr(checkpoint, "save", full)
    row = row_of("Checkpoint")
    assert row.status == "fails"
    assert row.mend.startswith("export TMPDIR=")


def test_a_full_disk_fails(monkeypatch):
    usage = types.SimpleNamespace(free=10 * 2**20)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    row = row_of("Disk")
    assert row.status == "fails"
    assert "--run-dir" in row.mend


def test_missing_packages_are_named_as_pip_does(monkeypatch):
    for name in ("PIL", "PIL.Image", "safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    row = row_of("Packages")
    assert (row.status, row.mend) == ("fails", "pip install safetensors pillow")


def test_an_old_torch_fails(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.3.1+cu121")
    row = row_of("PyTorch")
    assert (row.status, row.mend) == ("fails", "pip install --upgrade 'torch>=2.11'")


def test_a_limited_thread_count_is_slower(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    row = row_of("CPU threads")
    assert (row.status, row.mend) == ("slower", "unset OMP_NUM_THREADS")


class NVMLError(Exception):
    pass


class NVMLError_LibraryNotFound(NVMLError):  # noqa: N801, the name that nvidia-ml-py gives it
    pass


def fake_driver(monkeypatch, version: str = "580.65.06", gpus: int = 2) -> None:
    """nvidia-ml-py on a machine with this driver and so many H200."""
    nvml = types.ModuleType("pynvml")
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    nvml.nvmlSystemGetDriverVersion = lambda: version
    nvml.nvmlSystemGetCudaDriverVersion = lambda: 13010
    nvml.nvmlDeviceGetCount = lambda: gpus
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index
    nvml.nvmlDeviceGetName = lambda handle: "NVIDIA H200"
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(total=141 * 2**30)
    nvml.nvmlDeviceGetCudaComputeCapability = lambda handle: (9, 0)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


def fail_to_start(monkeypatch, error: Exception) -> None:
    def init():
        raise error

    fake_driver(monkeypatch)
    sys.modules["pynvml"].nvmlInit = init


def test_a_driver_that_is_new_enough_is_ok(monkeypatch):
    fake_driver(monkeypatch)
    monkeypatch.setattr(gpu, "_extension_cuda", lambda: "13.0")
    row = row_of("Driver")
    assert (row.status, row.found) == ("ok", "580.65.06, up to CUDA 13.1")


def test_a_driver_too_old_for_the_static_cuda_13_runtime_is_named(monkeypatch):
    fake_driver(monkeypatch, "535.183.01")
    monkeypatch.setattr(gpu, "_extension_cuda", lambda: "13.0")
    row = row_of("Driver")
    assert row.status == "slower"
    assert "580 or newer" in row.found
    assert "nvidia-driver-580" in row.mend


def test_no_driver_is_optional(monkeypatch):
    fail_to_start(monkeypatch, NVMLError_LibraryNotFound("NVML Shared Library Not Found"))
    row = row_of("Driver")
    assert row.status == "optional"
    assert "no NVIDIA driver" in row.found


def test_a_driver_that_does_not_answer_is_reported_with_its_message(monkeypatch):
    fail_to_start(monkeypatch, NVMLError("Driver/library version mismatch"))
    row = row_of("Driver")
    assert "version mismatch" in row.found
    assert "reboot" in row.mend


def test_no_nvidia_ml_py_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    row = row_of("Driver")
    assert (row.status, row.mend) == ("optional", "pip install nvidia-ml-py")


def test_gpus_that_torch_cannot_use_are_listed_with_the_reason(monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old")

    fake_driver(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    row = row_of("GPU")
    assert row.status == "slower"
    assert row.found.startswith("2 x NVIDIA H200, 141 GiB, compute capability 9.0; torch cannot")
    assert "driver on your system is too old" in row.found


def test_a_cpu_build_of_torch_beside_a_gpu_is_slower(monkeypatch):
    fake_driver(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    row = row_of("PyTorch")
    assert row.status == "slower"
    assert row.mend


@pytest.mark.parametrize(("usable", "status"), [(True, "fails"), (False, "optional")])
def test_cuda_on_linux_without_triton_is_mended_by_installing_it(monkeypatch, usable, status):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    row = row_of("Triton")
    assert (row.status, row.mend) == (status, "pip install triton")


def test_an_extension_without_cuda_beside_a_gpu_is_slower(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extension, "_WITH_CUDA", False)
    monkeypatch.setattr(extension, "_WHY_MISSING", None)
    row = row_of("CUDA kernels")
    assert (row.status, row.mend) == ("slower", extension.CUDA_BUILD_COMMAND)


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_cuda_kernels_that_do_not_work_name_the_gpus_architecture(monkeypatch, fault):
    def run() -> list[str]:
        if fault == "raises":
            raise RuntimeError("no kernel image is available")
        return ["dropout"]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(extension, "why_missing", lambda kind="cpu": None)
    monkeypatch.setattr(gpu, "_wrong_cuda_kernels", run)
    row = row_of("CUDA kernels")
    assert row.status == "fails"
    assert row.mend.startswith("DDPM_FAST_CUDA_ARCHS=75 ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpus_rows_are_ok_on_a_machine_that_has_one():
    for name in ("PyTorch", "Driver", "GPU", "Triton", "Training step"):
        row = row_of(name)
        assert row.status == "ok", row
    assert row_of("CUDA kernels").status in ("ok", "slower")


def setups_find_nvcc():
    """find_nvcc of setup.py, which cannot be imported without building."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    function = next(
        n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "find_nvcc"
    )
    code = compile(ast.Module([function], []), "setup.py", "exec")
    names = {"os": os, "shutil": machine.shutil, "Path": Path, "SetupError": ValueError,
             "_without_cuda": str}  # fmt: skip
    exec(code, names)
    return names["find_nvcc"]


@pytest.mark.parametrize("variable", [None, "CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH"])
def test_nvcc_is_sought_as_setup_py_seeks_it(monkeypatch, tmp_path, variable):
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    nvcc = tmp_path / "bin" / ("nvcc.exe" if os.name == "nt" else "nvcc")
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.48\n")
    nvcc.chmod(0o755)
    places = {"CUDACXX": nvcc, "PATH": nvcc.parent}
    if variable:
        monkeypatch.setenv(variable, str(places.get(variable, tmp_path)))
    assert machine.find_nvcc() == setups_find_nvcc()()
    if variable:
        assert machine.find_nvcc() == str(nvcc)
    if variable and os.name == "posix":
        monkeypatch.setenv("PATH", os.defpath if variable != "PATH" else str(nvcc.parent))
        assert row_of("nvcc").found == f"13.0, {nvcc}"


def test_cudacxx_that_is_not_there_is_a_row_and_no_failure(monkeypatch):
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    row = row_of("nvcc")
    assert row.status == "optional"
    assert "CUDACXX=/nowhere/nvcc is not an executable file" in row.found


def test_no_compiler_is_optional(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda *names, **places: None)
    row = row_of("C++ compiler")
    assert row.status == "optional"
    assert row.mend
