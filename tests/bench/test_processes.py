"""Processes with a limit: what outlives it is ended with all that it has begun."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench import processes

# Starts a process of its own, says its number, and waits.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def ended(pid, within_s=20.0):
    """Whether a process is gone, or only waits for its parent to take note."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


def python(code):
    return [sys.executable, "-c", code]


def test_lines_and_exit_code_are_the_processs_own(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    lines = []
    code = "import os; print(os.environ.get('TRITON_INTERPRET'), os.environ['X']); exit(7)"
    assert processes.run_limited(python(code), 30.0, lines.append, {"X": "y"}) == 7
    assert lines == ["None y\n"]


def test_a_process_over_its_limit_is_ended_with_its_children():
    lines = []
    assert processes.run_limited(python(PARENT), 3.0, lines.append) is None
    assert ended(int(lines[0]))


def test_end_all_ends_those_of_other_threads():
    lines, codes = [], []
    thread = threading.Thread(
        target=lambda: codes.append(processes.run_limited(python(PARENT), 60.0, lines.append))
    )
    thread.start()
    while not lines:
        time.sleep(0.05)
    processes.end_all()
    thread.join(30)
    assert codes == [-signal.SIGTERM] and ended(int(lines[0]))


def test_a_process_ends_with_its_parent_and_so_do_its_children():
    code = f"from bench.processes import end_with_parent\nend_with_parent()\n{PARENT}"
    starts = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {code!r}], start_new_session=True)\n"
        "print(child.pid, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen(
        python(starts), cwd=processes.environment.ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        time.sleep(1.5)
        assert all(not ended(pid, 0.0) for pid in pids)
        os.kill(parent.pid, signal.SIGKILL)
        assert all(ended(pid) for pid in pids)
