"""One world size as a torchrun in a subprocess: started, watched, ended, and read."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

POLL_S = 0.2
GRACE_S = 15  # torchrun ends its workers within this time after SIGTERM


def run_world(
    folder: Path,
    spec: dict[str, Any],
    world_size: int,
    *,
    time_limit: float,
    threads: int | None = None,
    on_poll: Callable[[list[dict[str, Any]]], None] = lambda events: None,
) -> list[dict[str, Any]]:
    """Run the workers of a world; their failures, none when all went well.

    folder      theirs, new: what the ranks measured is in it, also after a failure
    time_limit  seconds;  threads  of each rank; None: torchrun's default
    on_poll     is given rank 0's new events, several times a second
    """
    folder.mkdir(parents=True)
    spec_path = folder / "spec.json"
    spec_path.write_text(json.dumps({**spec, "folder": str(folder.absolute())}))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
        "--nproc-per-node", str(world_size), "-m", "ddpm_fast.scaling.worker", str(spec_path),
    ]  # fmt: skip
    environment = dict(os.environ)
    environment.pop("DDPM_FAST_CHECK", None)  # it makes the host wait in every step
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    if spec["backend"] == "gloo" and sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine, whatever its host name
    deadline, seen = time.monotonic() + time_limit, 0
    with _started(command, environment, folder) as process:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
            events, seen = _new_events(folder, seen)
            on_poll(events)
        late = process.poll() is None
    on_poll(_new_events(folder, seen)[0])
    if late:
        return [_failure(world_size, None, f"took longer than --time-limit {time_limit:.0f} s")]
    return failures(folder, world_size, process.returncode) if process.returncode else []


def read_ranks(folder: Path, world_size: int) -> list[dict[str, Any]]:
    """What the ranks have written so far, by rank; those that wrote nothing are left out."""
    paths = [folder / f"rank-{rank}.json" for rank in range(world_size)]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def failures(folder: Path, world_size: int, returncode: int = 1) -> list[dict[str, Any]]:
    """Who died and why, after torchrun has failed; the first to die first where that is known.

    A rank that raised has left a message; of one that was killed torchrun's log has the number.
    """
    log = (folder / "torchrun.log").read_text(errors="replace")
    killed = {
        int(rank): int(code)
        for rank, code in re.findall(r"rank\s*: (\d+) \(local_rank.*\n\s*exitcode\s*: (-\d+)", log)
        if int(code) != -signal.SIGTERM  # torchrun's own, to end the others
    }
    if killed:
        return [
            _failure(world_size, rank, f"was killed by {signal.Signals(-code).name}")
            for rank, code in killed.items()
        ]
    found = []
    for rank in range(world_size):
        path = folder / f"rank-{rank}.error"
        if path.exists():
            found.append((path.stat().st_mtime, _failure(world_size, rank, path.read_text())))
    if found:
        return [failure for _, failure in sorted(found, key=lambda pair: pair[0])]
    if returncode < 0:
        name = signal.Signals(-returncode).name
        return [_failure(world_size, None, f"torchrun was killed by {name}")]
    lines = log.strip().splitlines() or ["nothing in its log"]
    return [_failure(world_size, None, f"torchrun failed: {lines[-1]}")]


def _failure(world_size: int, rank: int | None, message: str) -> dict[str, Any]:
    return {"world_size": world_size, "rank": rank, "message": message}


@contextmanager
def _started(
    command: list[str], environment: dict[str, str], folder: Path
) -> Iterator[subprocess.Popen]:
    """The process in a session of its own; at the end of the context none of it is left."""
    with (folder / "torchrun.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(GRACE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            if process.returncode:
                _kill_workers(folder)  # each in a session of its own, they outlive torchrun


def _kill_workers(folder: Path) -> None:
    """By the numbers that they wrote down when they started."""
    for path in folder.glob("rank-*.pid"):
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(path.read_text()), signal.SIGKILL)


def _new_events(folder: Path, seen: int) -> tuple[list[dict[str, Any]], int]:
    """Whole lines of rank 0's progress from the seen-th on."""
    try:
        text = (folder / "progress.jsonl").read_text()
    except OSError:
        return [], seen
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [json.loads(line) for line in lines[seen:]], len(lines)
