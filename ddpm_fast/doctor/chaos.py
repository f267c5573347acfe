"""A small training under random kills must end with the weights of one that nothing disturbed.

torchrun and two gloo ranks on this machine, in a temporary folder. Kills strike while the run
starts and while it trains, at torchrun, its ranks, or both. What ends is started again with
--auto-resume. The run goes on until all kills were made; then it gets its last step, and the other
one, which nothing disturbs, as many steps.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ddpm_fast.errors import Failure

ENDLESS, MORE_STEPS = 10**7, 20  # until the kills are done, and after them
RESTART_LIMIT_S = 120  # from a kill to the first step; the promise is 20 on an idle machine
NET = (
    *("--base-channels", "8", "--channel-mults", "1,2", "--num-groups", "4"),
    *("--attention-resolutions", "1", "--time-emb-dim", "8", "--batch-size", "8"),
    *("--num-timesteps", "5", "--sample-steps", "5", "--sample-every", "0", "--dropout", "0.1"),
    *("--lr-schedule", "constant", "--warmup-steps", "20"),  # whatever the last step will be
    *("--checkpoint-every", "10", "--log-every", "1", "--device", "cpu", "--timeout", "60"),
)


class ChaosError(Failure):
    """The training did not come back after a kill."""


# name -> signal, and who gets it: torchrun, one rank, or it and all ranks
KILLS = {
    "SIGKILL of torchrun and all ranks": (signal.SIGKILL, "all"),
    "SIGKILL of torchrun alone": (signal.SIGKILL, "torchrun"),
    "SIGKILL of one rank": (signal.SIGKILL, "rank"),
    "SIGTERM to torchrun and all ranks": (signal.SIGTERM, "all"),
    "SIGTERM to torchrun": (signal.SIGTERM, "torchrun"),
    "SIGTERM to one rank": (signal.SIGTERM, "rank"),
}


class Training:
    """torchrun --nproc-per-node 2 -m ddpm_fast.train --auto-resume, started once or more often."""

    def __init__(self, folder: Path, iterations: int) -> None:
        folder.mkdir()
        self.run, self.iterations, self.starts = folder / "run", iterations, 0
        self.max_restarts = 0
        self._output = folder / "output.txt"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--local-addr", "127.0.0.1", "--nproc-per-node", "2",
                   "--max-restarts", str(self.max_restarts), "-m", "ddpm_fast.train", *NET,
                   "--iterations", str(self.iterations), "--run-dir", str(self.run),
                   "--auto-resume"]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with open(self._output, "a") as output:
            self._process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self.starts += 1

    @property
    def weights_folder(self) -> Path:
        """Of the last step."""
        return self.run / "checkpoints" / f"step_{self.iterations:08d}"

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def is_over(self) -> bool:
        """Whether the last step's checkpoint stands and torchrun has ended."""
        return not self.is_running and (self.weights_folder / "manifest.json").exists()

    @property
    def steps_logged(self) -> int:
        """Steps in log.txt, which only grows: those taken twice count twice."""
        return len(self._logged())

    @property
    def saved_step(self) -> int:
        found = (self.run / "checkpoints").glob("step_*/manifest.json")
        return max((int(path.parent.name.removeprefix("step_")) for path in found), default=0)

    @property
    def newest_step(self) -> int:
        return int((self._logged() or ["0"])[-1])

    def _logged(self) -> list[str]:
        log = self.run / "log.txt"
        return re.findall(r"  step (\d+)/", log.read_text()) if log.exists() else []

    def send(self, number: int, whom: str) -> None:
        """A signal to "torchrun", to one "rank", the last that it started, or to "all" of them.

        Returns when those that got it have ended.
        """
        torchrun = self._process.pid
        if whom == "torchrun":
            os.kill(torchrun, number)
            self.wait()
            return
        os.kill(torchrun, signal.SIGSTOP)  # it starts and ends no rank meanwhile
        ranks = _children(torchrun) if whom == "all" else _children(torchrun)[-1:]
        for pid in ranks:
            os.kill(pid, number)
        if whom == "all":
            os.kill(torchrun, number)
            os.kill(torchrun, signal.SIGCONT)
            self.wait()
            return
        os.kill(torchrun, signal.SIGCONT)
        deadline = time.monotonic() + RESTART_LIMIT_S
        while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
            time.sleep(0.02)

    def wait(self, limit_s: float = RESTART_LIMIT_S) -> None:
        self._process.wait(limit_s)

    def end(self) -> None:
        if self.is_running:
            self.send(signal.SIGKILL, "all")

    def last_lines(self) -> str:
        lines = self._output.read_text(errors="replace").splitlines()
        return " | ".join([line for line in lines if ": error: " in line][-2:] or lines[-3:])


def chaos(
    minutes: float, seed: int, kills: int | None = None, say: Callable[[str], None] = print
) -> int:
    """Run it; exit code 0 when nothing was lost, 1 when the weights differ or kills are missing.

    minutes  in which there are kills: the undisturbed run comes on top
    seed     of which kills there are, and when
    kills    how many; None: as many as the time allows, one at least
    raises   ChaosError  the training did not go on
    """
    if not Path("/proc/self/task").is_dir():
        raise ChaosError("--chaos finds the ranks in /proc: it needs Linux")
    with tempfile.TemporaryDirectory(prefix="ddpm_fast_chaos_") as name:
        killed = Training(Path(name) / "killed", ENDLESS)
        whole = Training(Path(name) / "whole", ENDLESS)
        try:
            number = f"{kills} random kills in up to" if kills else "random kills for"
            say(f"2 gloo ranks under {number} {minutes:g} min, seed {seed}")
            made, restarts_s = _disturb(killed, minutes, kills, random.Random(seed), say)
            killed.end()
            whole.iterations = killed.iterations = killed.saved_step + MORE_STEPS
            _finish(killed)
            say(f"the same run of {whole.iterations} steps, undisturbed")
            _finish(whole)
        finally:
            whole.end()
            killed.end()
        differ = _differing(whole.weights_folder, killed.weights_folder)
    slowest = f"{max(restarts_s):.1f} s" if restarts_s else "not measured"
    median = f"{statistics.median(restarts_s):.1f} s" if restarts_s else "not measured"
    say(
        f"{made} kills, {killed.starts} starts of torchrun; from a kill to the first step "
        f"{median} (median), {slowest} (slowest)"
    )
    if differ:
        say(f"differs from the undisturbed run after {made} kills: {', '.join(differ)}")
        return 1
    if made < (kills or 1):
        say(f"{made} kills in {minutes:g} minutes, {kills or 1} wanted: give more --minutes")
        return 1
    say(f"ok: after {made} kills the weights are those of the undisturbed run, bit for bit")
    return 0


def _disturb(
    training: Training,
    minutes: float,
    wanted: int | None,
    rng: random.Random,
    say: Callable[[str], None],
) -> tuple[int, list[float]]:
    """Kill until time is up or enough were made: how often, and seconds from each to the next step.

    Every fourth kill or so strikes while the run still starts: the one before has no such time.
    """
    training.start()
    _await_step(training)  # a start that fails is not tried again without end
    training.max_restarts = 1000
    deadline, restarts_s = time.monotonic() + 60 * minutes, []
    for kills in itertools.count(1):
        kind, pause_s = rng.choice(list(KILLS)), rng.random()
        in_training = rng.random() < 0.75
        time.sleep(pause_s)
        if time.monotonic() > deadline or kills - 1 == wanted:
            return kills - 1, restarts_s
        if not training.is_running:  # the kill before had all save and leave
            _await_step(training)
        number, whom = KILLS[kind]
        say(f"kill {kills}: {kind} after step {training.newest_step}")
        killed_at = time.monotonic()
        training.send(number, whom)
        if whom != "rank":
            training.start()
        if in_training or kills == wanted or not training.is_running:
            _await_step(training)
            restarts_s.append(time.monotonic() - killed_at)
            say(f"  first step after {restarts_s[-1]:.1f} s")
        else:
            time.sleep(2 * rng.random())  # Python, torch and the rendezvous take about so long


def _await_step(training: Training) -> None:
    """Until a further step is logged, or the run is over; started again where it has ended."""
    deadline, logged = time.monotonic() + RESTART_LIMIT_S, training.steps_logged
    starts = 0
    while training.steps_logged == logged and not training.is_over:
        if not training.is_running:
            starts += 1
            training.start()
        if starts > 2 or time.monotonic() > deadline:
            raise ChaosError(f"the training does not go on: {training.last_lines()}")
        time.sleep(0.02)


def _finish(training: Training) -> None:
    while not training.is_over:
        _await_step(training)
        with contextlib.suppress(subprocess.TimeoutExpired):
            training.wait(RESTART_LIMIT_S)


def _differing(expected: Path, found: Path) -> list[str]:
    names = sorted(path.name for path in expected.glob("*.safetensors"))
    return [n for n in names if (expected / n).read_bytes() != (found / n).read_bytes()]


def _children(pid: int) -> list[int]:
    """Processes that this one has started, the last one last."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
