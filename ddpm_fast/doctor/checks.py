"""The checks, in the order of the table: a new one is a function and a line here."""

from __future__ import annotations

from functools import partial

from ddpm_fast.doctor import gpu, kernels, machine, pieces
from ddpm_fast.doctor.rows import Check
from ddpm_fast.kernels import MODULES

CHECKS = (
    Check("OS", machine.check_system, needed=False),
    Check("Python", machine.check_python, needed=False),
    Check("CPU threads", machine.check_threads, needed=False),
    Check("Disk", machine.check_disk),
    Check("Packages", machine.check_packages),
    Check("Logging", machine.check_logging_packages, needed=False),
    Check("PyTorch", machine.check_torch),
    Check("CUDA runtime", gpu.check_runtime, needed=False),
    Check("Driver", gpu.check_driver, needed=False),
    Check("GPU", gpu.check_gpus, needed=False),
    Check("nvcc", machine.check_nvcc, needed=False),
    Check("C++ compiler", machine.check_cxx, needed=False),
    Check("Triton", gpu.check_triton, needed=False),
    Check("Extension", pieces.check_extension),
    Check("Kernels", pieces.check_impl),
    Check("CUDA kernels", gpu.check_cuda_kernels),
    *(Check(name, partial(kernels.check_resources, name), needed=False) for name in MODULES),
    Check("attention runs", kernels.check_attention_path, needed=False),
    Check("Philox", pieces.check_philox),
    Check("Noising", pieces.check_noising),
    Check("U-Net", pieces.check_unet),
    Check("Digits data", pieces.check_digits),
    Check("Checkpoint", pieces.check_checkpoint),
    Check("Training step", pieces.check_training_step),
)
