"""The processes of a run: who this one is, and what they agree on by the host's own network.

PyTorch Distributed and torchrun are the engine. Beside the gradients' group (NCCL on CUDA) there is
a gloo group between the hosts, in which the ranks meet before each step: one that died is noticed
there at once, as its connection is closed. One that is frozen or cut off is noticed by
heartbeat.py, whatever the ranks wait for; so a meeting may take as long as the last one's work.
Only the gradients' group has a time-out of its own.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ddpm_fast.device import pick_device
from ddpm_fast.errors import Failure, UsageError
from ddpm_fast.heartbeat import Heartbeat, end_process, last_words

T = TypeVar("T")

MEETING = timedelta(days=30)  # rank 0 may download, decode or draw while the others wait


class RankLost(Failure):
    """Another rank died, froze or did not come: one line saying when, and how to go on."""


@dataclass(frozen=True)
class World:
    """This process among its peers; one process alone needs no process group.

    rank, size  0 <= rank < size;  local_rank  on this machine: its GPU's number
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_chief(self) -> bool:
        """Whether this is the one rank that writes files and talks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set: all ranks meet here and get the same answer.

        raises  RuntimeError  a rank died
        """
        if self.size == 1:
            return flag
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=_hosts())
        return bool(value.item())

    def any_on_node(self, flag: bool) -> bool:
        """Whether a flag is set of a rank on this one's node, as torchrun or Slurm counts nodes."""
        number = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or "0"
        node = float(number)
        flags, nodes = self.gather(float(flag)), self.gather(node)
        return any(flag and at == node for flag, at in zip(flags, nodes, strict=True))

    def gather(self, value: float) -> list[float]:
        """Every rank's value, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values = torch.zeros(self.size, dtype=torch.float64)
        values[self.rank] = value
        dist.all_reduce(values, group=_hosts())
        return values.tolist()

    def from_chief(self, make: Callable[[], T]) -> T:
        """make() of rank 0, on all ranks; a JSON-like value."""
        if self.size == 1:
            return make()
        values: list[Any] = [make() if self.is_chief else None]
        dist.broadcast_object_list(values, src=0, group=_hosts())
        return values[0]

    def chief_first(self, run: Callable[[], T]) -> T:
        """run() on all ranks, on rank 0 before the others: it downloads what they then find."""
        if self.size == 1:
            return run()
        if self.is_chief:
            result = run()
            self.any(False)
            return result
        self.any(False)
        return run()

    def leave(self) -> None:
        """Take the process groups down, after a run that ended well.

        It waits for the hosts' group's threads: one that lets go of the last collective's tensor
        while the interpreter ends aborts the process (1 of 60 on a busy machine). The other
        group's live on, as DDP is never freed; what it sends is held elsewhere too. A captured
        step has to be forgotten before: NCCL waits until no graph holds its collectives.
        """
        if self.size > 1:
            for heartbeat in _heartbeat:
                heartbeat.stop(left=True)
            _host_group.clear()
            dist.destroy_process_group()


ALONE = World()

_host_group: list[dist.ProcessGroup] = []
_heartbeat: list[Heartbeat] = []


def _hosts() -> dist.ProcessGroup:
    return _host_group[0]


def launched_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun, or something like it, has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank_device(name: str) -> torch.device:
    """pick_device(name), or this process's own GPU if torchrun started several.

    It becomes the current device, as Triton's kernels and new streams are the current device's.

    raises  UsageError  a device that is not there, or more processes than GPUs
    """
    device = pick_device(name)
    if device.type != "cuda":
        return device
    if not launched_by_torchrun():
        if device.index is not None:
            torch.cuda.set_device(device)
        return device
    local_rank, count = _world_of_environment().local_rank, torch.cuda.device_count()
    if local_rank >= count:
        raise UsageError(
            f"process {local_rank} of this machine, which has {count} GPUs; allowed: "
            "--nproc-per-node up to that, or --device cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone or too late."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


@contextmanager
def told_if_rank_lost(prog: str, when: Callable[[], str], then: str) -> Iterator[None]:
    """RankLost where another rank died or refused; the heartbeat's last words are the same.

    prog  the command;  when  "after step 3";  then  how to go on
    """

    def line(why: str) -> str:
        rank = os.environ.get("RANK", "0")
        return f"rank {rank} lost another one {when()}: {why}; {then}"

    try:
        with last_words(lambda why: f"{prog}: error: {line(why)}"):
            yield
    except RuntimeError as error:
        if not (launched_by_torchrun() and _is_lost_rank(error)):
            raise
        raise RankLost(line(str(error).strip().partition("\n")[0][:200])) from None


@contextmanager
def left_at_once_if_rank_lost(prog: str) -> Iterator[None]:
    """Around all that may raise RankLost: say it as `prog` does and end the process."""
    try:
        yield
    except RankLost as error:
        if os.environ.get("DDPM_FAST_TRACEBACK"):
            traceback.print_exc()
        end_process(f"{prog}: error: {error}")


def join(device: torch.device, *, timeout_s: float) -> World:
    """Meet the other processes that torchrun started; a World of one without it.

    device     cpu: gradients by gloo; cuda: by NCCL
    timeout_s  how long another rank may be silent, or keep a gradient waiting, before it is given
               up: this process then ends, with heartbeat.last_words
    raises     RuntimeError  the others do not come;  UsageError  torchrun's variables are missing
    """
    if not launched_by_torchrun():
        return World()
    _end_with_the_agent()
    world = _world_of_environment()
    timeout = timedelta(seconds=timeout_s)
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    name = _name_of_this_start(store, world, timeout_s)
    own_connection = store.clone()
    _heartbeat[:] = [
        Heartbeat(dist.PrefixStore(f"{name}_heartbeat", own_connection), world.rank, world.size,
                  timeout_s=timeout_s)
    ]  # fmt: skip
    atexit.register(_heartbeat[0].stop, left=False)  # before the interpreter takes threads down
    # NCCL's ranks would talk while they capture, to register buffers: one whose capture fails would
    # leave the others waiting where no heartbeat sees it.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(name, store),
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
    )
    _host_group[:] = [dist.new_group(backend="gloo", timeout=MEETING)]
    return world


def _world_of_environment() -> World:
    """From the variables that torchrun sets; Slurm's own number for a rank on its machine will do.

    raises  UsageError  one is missing
    """
    found = dict(os.environ)
    found.setdefault("LOCAL_RANK", found.get("SLURM_LOCALID", ""))
    try:
        return World(*(int(found[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    except (KeyError, ValueError):
        missing = [n for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if not found.get(n)]
        raise UsageError(
            f"WORLD_SIZE is {found['WORLD_SIZE']}, but {', '.join(missing) or 'a rank'} is not "
            "set: start with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
            "MASTER_PORT"
        ) from None


def _end_with_the_agent() -> None:
    """Have Linux kill this rank if torchrun dies: nobody else would end it, and it holds the lock.

    The ranks of other nodes then find this one lost, as with a lost node.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL))


def _name_of_this_start(store: dist.Store, world: World, timeout_s: float) -> str:
    """A name that these processes alone have, as the store is that of all starts before them.

    In it lie the addresses of processes that were killed. torchrun's own count of restarts tells
    starts apart on one node only: a node that comes later counts from 0. So rank 0 makes a name,
    and takes the others' until each has found its own among them, which no dead rank 0 can know.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout_s
    others = [f"rank_{rank}" for rank in range(1, world.size)]
    if not world.is_chief:
        store.set(f"rank_{world.rank}", own)
    while time.monotonic() < deadline:
        if world.is_chief and store.check(others):
            store.set("start", " ".join([own, *(store.get(key).decode() for key in others)]))
            if store.check([f"{own}_{key}" for key in others]):
                return own
        elif not world.is_chief and store.check(["start"]):
            chief, *names = store.get("start").decode().split()
            if len(names) == len(others) and names[world.rank - 1] == own:
                store.set(f"{chief}_rank_{world.rank}", "")
                return chief
        time.sleep(0.01)
    raise dist.DistStoreError(f"{world.size} processes did not meet within {timeout_s:g} s")
