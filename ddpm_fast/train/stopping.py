"""Being asked to stop: Ctrl-C, SIGTERM and what batch systems send end a run after its step.

They may come several times, as scancel, systemd or Kubernetes signal torchrun and its ranks, and
torchrun sends its own to the ranks after that. Only Ctrl-C again ends a run at once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

# SIGUSR1: sbatch --signal=USR1@300; Windows has neither that nor SIGHUP
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
SAME_CTRL_C_S = 1.0  # the terminal's and torchrun's come together


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """A list that gets the name of each signal that asks to stop."""
    received: list[str] = []
    first_ctrl_c: list[float] = []

    def note(number: int, _frame) -> None:
        received.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
        if number != signal.SIGINT:
            return
        first_ctrl_c.append(time.monotonic())
        if first_ctrl_c[-1] - first_ctrl_c[0] >= SAME_CTRL_C_S:
            signal.signal(number, previous[number])
            signal.raise_signal(number)

    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
