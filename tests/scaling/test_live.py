"""What is shown while measuring, and that the measured step is a data-parallel one."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ddpm_fast.monitoring.monitor import Sample
from ddpm_fast.scaling.live import LiveView


def show(*, terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80, highlight=False)
    with LiveView(console, word="GPU", windows=5) as view:
        view.world(2)
        view.event({"what": "weak", "window": 1, "images_per_s": 812.3})
        view.refresh([Sample(0.0, "GPU 0", 97, 12.0, 650, 61, 1980, 3201), Sample(0.0, "GPU 1")])
    return console.file.getvalue()


def test_a_terminal_sees_progress_rate_and_every_gpu():
    shown = show(terminal=True)
    for word in ("2 GPUs, weak: 812 img/s", "97 %", "12.0 GiB", "650 W", "61 C", "1980 MHz",
                 "3201 MHz"):  # fmt: skip
        assert word in shown


def test_a_pipe_gets_plain_lines():
    console = Console(file=io.StringIO(), width=80, highlight=False)
    LiveView(console, word="GPU", windows=5).event({"what": "warming up and compiling"})
    assert console.file.getvalue().endswith(", warming up and compiling\n")
    assert show(terminal=False) == "2 GPUs: starting\n2 GPUs, weak: 812 img/s (window 1)\n"


@pytest.mark.slow
def test_synced_gradients_are_the_ranks_mean_also_after_steps_without_communication():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr",
               "127.0.0.1", "--nproc-per-node", "2", "ddp_gradients.py"]  # fmt: skip
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
