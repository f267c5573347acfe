"""What is read of ranks that died, and that a time limit ends what it started."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ddpm_fast.scaling import launch

KILLED = """
Root Cause (first observed failure):
[0]:
  time      : 2026-11-23_20:00:00
  host      : here
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 77)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 77
"""


def test_a_killed_rank_is_named_with_its_signal(tmp_path):
    (tmp_path / "torchrun.log").write_text(KILLED)
    (tmp_path / "rank-0.error").write_text("RuntimeError: connection closed by peer")
    assert launch.failures(tmp_path, 2) == [
        {"world_size": 2, "rank": 1, "message": "was killed by SIGKILL"}
    ]


def test_the_first_rank_that_raised_comes_first(tmp_path):
    (tmp_path / "torchrun.log").write_text("exitcode  : 1")
    for rank, message, at in ((0, "RuntimeError: the other left", 20), (1, "ValueError: x", 10)):
        path = tmp_path / f"rank-{rank}.error"
        path.write_text(message)
        os.utime(path, (at, at))
    assert [failure["rank"] for failure in launch.failures(tmp_path, 2)] == [1, 0]


def test_a_torchrun_that_fails_by_itself_shows_its_last_line(tmp_path):
    (tmp_path / "torchrun.log").write_text("...\nValueError: no port\n")
    (failure,) = launch.failures(tmp_path, 2)
    assert failure["rank"] is None and failure["message"].endswith("ValueError: no port")


def test_ranks_that_wrote_nothing_are_left_out(tmp_path):
    (tmp_path / "rank-1.json").write_text(json.dumps({"rank": 1}))
    assert launch.read_ranks(tmp_path, 4) == [{"rank": 1}]


def test_a_torchrun_that_was_killed_is_said_to_be(tmp_path):
    (tmp_path / "torchrun.log").write_text("")
    (failure,) = launch.failures(tmp_path, 2, -signal.SIGKILL)
    assert failure["message"] == "torchrun was killed by SIGKILL"


# An agent with a worker in a session of its own, as torchrun's are: argv is the worker's pid file,
# and what becomes of the agent.
AGENT = """
import os, signal, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                          start_new_session=True)
with open(sys.argv[1] + ".part", "w") as file:
    file.write(str(worker.pid))
os.rename(sys.argv[1] + ".part", sys.argv[1])
if sys.argv[2] == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "ends":
    sys.exit(1)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # torchrun ends by itself
time.sleep(60)
"""


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"  # one that nobody waited for
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    ("fate", "message"),
    [("is killed", "torchrun was killed by SIGKILL"), ("ends", "torchrun failed: nothing in its"),
     ("hangs", "took longer than --time-limit 1 s")],
)  # fmt: skip
def test_no_worker_outlives_its_agent(tmp_path, monkeypatch, fate, message):
    popen, folder = subprocess.Popen, tmp_path / "world"

    def start(command, **options):
        agent = [sys.executable, "-c", AGENT, str(folder / "rank-0.pid"), fate]
        return popen(agent, **options)

    monkeypatch.setattr(launch.subprocess, "Popen", start)
    monkeypatch.setattr(launch, "POLL_S", 0.02)
    begun = time.monotonic()
    limit = 1.0 if fate == "hangs" else 30.0
    (failure,) = launch.run_world(folder, {"backend": "gloo"}, 2, time_limit=limit)
    assert failure["message"].startswith(message)
    pid = int((folder / "rank-0.pid").read_text())
    while is_running(pid) and time.monotonic() < begun + 20:
        time.sleep(0.02)
    assert not is_running(pid) and time.monotonic() < begun + 20


@pytest.mark.parametrize("tail", ["", '{"what": "hal'])
def test_progress_is_read_by_whole_lines(tmp_path, tail):
    path = tmp_path / "progress.jsonl"
    path.write_text('{"what": "a"}\n{"what": "b"}\n' + tail)
    events, seen = launch._new_events(tmp_path, 1)
    assert [event["what"] for event in events] == ["b"] and seen == 2
