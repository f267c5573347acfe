"""Processes with a time limit, each in a group of its own that ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from bench import environment

GRACE_S = 5.0  # between asking a process to stop and killing it
WATCH_S = 1.0  # between two looks at whether the parent lives
_running: set[subprocess.Popen] = set()


def run_limited(
    command: Sequence[str],
    seconds: float,
    on_line: Callable[[str], None],
    environ: Mapping[str, str] | None = None,
) -> int | None:
    """Run a command from the checkout's root; returns its exit code, None if it had to be ended.

    on_line  called with each line of its output and errors, in another thread
    environ  added to this process's environment, without TRITON_INTERPRET
    """
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        command,
        cwd=environment.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**kept, "PYTHONUNBUFFERED": "1", **(environ or {})},
    )
    _running.add(process)
    reader = threading.Thread(target=_read, args=(process, on_line), daemon=True)
    reader.start()
    try:
        code = process.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _end(process)  # and what it left running
        _running.discard(process)
    reader.join(GRACE_S)
    return code


def end_all() -> None:
    """End the groups of all processes that run_limited is waiting for in other threads."""
    for process in list(_running):
        _end(process)


def end_with_parent() -> None:
    """End this process's group once its parent is gone: its load would be measured too."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def stop_on_sigterm() -> None:
    """Have SIGTERM raise SystemExit, so that child processes are ended as well."""

    def stop(signal_number: int, frame: object) -> None:
        raise SystemExit(128 + signal_number)

    signal.signal(signal.SIGTERM, stop)


def _read(process: subprocess.Popen, on_line: Callable[[str], None]) -> None:
    for line in process.stdout:
        on_line(line)


def _end(process: subprocess.Popen) -> None:
    """End the process group, as far as it still runs."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
