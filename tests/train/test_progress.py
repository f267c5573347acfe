import io
import json
import re
import time

import pytest
from rich.console import Console

from ddpm_fast.train.progress import Display, Measured
from ddpm_fast.train.run_folder import RunFolder


def test_a_reader_that_leaves_does_not_stop_the_run(tiny, start_command, tmp_path):
    run = tmp_path / "run"
    process = start_command(*tiny, "--iterations", 30, "--log-every", 1, "--run-dir", run)
    process.stdout.readline()
    process.stdout.close()  # as `train | head -1` does
    assert process.wait(timeout=120) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert (run / "checkpoints" / "step_00000030" / "manifest.json").exists()
    assert "finished 30 steps" in (run / "log.txt").read_text()


@pytest.fixture
def terminal(tmp_path):
    """A display on a terminal of 100 columns, and what that was sent since the last look."""
    sent = io.StringIO()
    folder = RunFolder(tmp_path / "run", resume=False)

    def look():
        text = sent.getvalue()
        sent.seek(0)
        sent.truncate()
        return text

    console = Console(file=sent, force_terminal=True, width=100)
    with Display(folder, 10, console) as display:
        yield display, look
    folder.close()


def test_while_it_compiles_a_spinner_tells_the_time_elapsed(terminal):
    display, look = terminal
    with display.busy("compiling"):
        time.sleep(1.2)
        during = look()
    assert re.search(r"compiling.*0:00:0[01]", during)
    display.measured(Measured(3, 0.5, 1e-3, 20.0, 1.0, 0.1), seconds_left=9)
    time.sleep(0.3)
    assert "loss 0.5000" in look()


def test_the_bar_goes_on_after_a_compilation_that_failed(terminal):
    display, look = terminal
    with pytest.raises(RuntimeError), display.busy("compiling"):
        raise RuntimeError
    look()
    display.measured(Measured(3, 0.5, 1e-3, 20.0, 1.0, 0.1), seconds_left=9)
    time.sleep(0.3)
    assert "loss 0.5000" in look()
