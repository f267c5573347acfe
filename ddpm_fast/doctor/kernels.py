"""What each kernel uses, as compiled without a GPU, and which path attention takes here."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from ddpm_fast.doctor.rows import Finding

SHOWN_ARCH = 90  # where there is no GPU to ask

# (tokens, head size) of the presets' attentions
ATTENTIONS = ((256, 256), (16, 256), (16, 64))


def check_resources(kernel: str) -> Finding:
    """The stored resource use of a kernel's launches on this GPU's architecture."""
    from ddpm_fast.kernels.tuning import offline

    triton_version, rows = offline.read(_table())
    mine = [row for row in rows if row.kernel == kernel]
    if not mine:
        return Finding("in the extension: C++ on CPU, CUDA on GPUs")
    archs = sorted({row.arch for row in mine})
    arch = min(archs, key=lambda known: abs(known - _arch()))
    shown = [row for row in mine if row.arch == arch]
    broken = [row.launch for row in shown if row.violations]
    if broken:
        return Finding(f"sm_{arch}: {len(broken)} launches break a rule: {broken[0]}", "slower")
    used = [row.resources for row in shown]
    return Finding(
        f"{len(used)} launches on sm_{arch} (Triton {triton_version}): "
        f"{_span([u.registers for u in used])} registers, no spills, "
        f"at most {max(u.shared_bytes for u in used) / 1024:.0f} KiB shared, "
        f"{_span([u.warps for u in used])} of 64 warps"
    )


def check_attention_path() -> Finding:
    """What "auto" runs for the presets' attentions, forward and with a backward pass."""
    import torch

    from ddpm_fast.kernels.attention.op import choose

    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = []
    for tokens, head_dim in ATTENTIONS:
        (forward, why), (training, why_training) = (
            choose(tokens, head_dim, backward, device) for backward in (False, True)
        )
        path = forward if forward == training else f"{forward}, {training} in training"
        reason = why if forward == training else why_training
        lines.append(f"{tokens} tokens x {head_dim}: {path} ({reason})")
    reasons = {line.partition("(")[2] for line in lines}
    if len(reasons) == 1 and len({line.split(": ")[1] for line in lines}) == 1:
        return Finding(lines[0].split(": ")[1])
    return Finding("; ".join(lines))


def refresh() -> int:
    """Compile every launch again for this GPU's architecture, with the Triton that is installed.

    returns  the compiler check's exit code; it prints its own table
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ddpm_fast.kernels.tuning.offline", "--archs", str(_arch())]
    return subprocess.run(command, env=environment).returncode


def _table() -> Path:
    return Path(str(files("ddpm_fast.kernels.tuning") / "resources.json"))


def _arch() -> int:
    import torch

    if not torch.cuda.is_available():
        return SHOWN_ARCH
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
