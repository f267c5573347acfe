"""What is shown while measuring, and that the measured step is a data-parallel one."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ddpm_fast.runtime.monitor import Sample
from ddpm_fast.scaling.live import LiveView


def show(*, terminal, width=80):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False)
    with LiveView(console, word="GPU", windows=5) as view:
        view.world(2)
        view.event({"what": "weak", "window": 1, "images_per_s": 812.3})
        view.refresh([Sample(0.0, "GPU 0", 97, 12.0, 650, 61, 1980, 3201), Sample(0.0, "GPU 1")])
    return console.file.getvalue()


def test_a_terminal_sees_progress_rate_and_every_gpu(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown = show(terminal=True)
    for word in ("2 GPUs, weak: 812 img/s", "97 %", "12.0 GiB", "650 W", "61 C", "1980 MHz",
                 "3201 MHz"):  # fmt: skip
        assert word in shown


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    assert show(terminal=True) == "2 GPUs: starting\n2 GPUs, weak: 812 img/s (window 1)\n"


@pytest.mark.parametrize("width", [79, 60, 40, 24])
def test_a_narrow_terminal_sees_every_figure_of_every_gpu(monkeypatch, width):
    monkeypatch.setenv("TERM", "xterm")
    shown = show(terminal=True, width=width)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).splitlines()
    assert max(map(len, lines)) <= width and "…" not in shown
    words = " ".join(" ".join(lines).split())
    for word in ("2 GPUs, weak: 812 img/s, 1/5 windows",
                 "GPU 0: busy 97 %, memory 12.0 GiB, power 650 W, temperature 61 C, "
                 "clock 1980 MHz, memory clock 3201 MHz", "GPU 1: -"):  # fmt: skip
        assert word in words


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
