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
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ddpm_fast.cli.arguments import report
from ddpm_fast.errors import (
    FORESEEN,
    Failure,
    MachineRefusal,
    SaidElsewhere,
    UsageError,
    exit_code,
)
from ddpm_fast.kernels.calling.impl import chosen_impl
from ddpm_fast.kernels.calling.target import why_not_fused
from ddpm_fast.runtime.device import pick_device
from ddpm_fast.runtime.heartbeat import Heartbeat, end_process, last_words

T = TypeVar("T")

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
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
        """make() of rank 0, on all ranks; a JSON-like value. Where it refuses, all ranks end."""
        if self.size == 1:
            return make()
        values: list[Any] = [self.together(lambda: make() if self.is_chief else None)]
        dist.broadcast_object_list(values, src=0, group=_hosts())
        return values[0]

    def together(self, run: Callable[[], T]) -> T:
        """run() on all ranks, which meet in nothing in it; where one refuses, all end.

        raises  its own foreseen error on the first rank that has one, SaidElsewhere on the others
        """
        if self.size == 1:
            return run()
        result, error = None, None
        try:
            result = run()
        except FORESEEN as caught:
            error = caught
        codes = self.gather(0 if error is None else exit_code(error))
        refusing = [rank for rank, code in enumerate(codes) if code]
        if not refusing:
            return result
        if refusing[0] == self.rank:
            raise error
        raise SaidElsewhere(int(codes[refusing[0]]))

    def chief_first(self, run: Callable[[], T]) -> T:
        """run() on all ranks, on rank 0 before the others: it downloads what they then find."""
        if self.size == 1:
            return run()
        own = self.together(lambda: run() if self.is_chief else None)
        others = self.together(lambda: None if self.is_chief else run())
        return own if self.is_chief else others

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
    """Whether this process is one of several that torchrun, or something like it, has started.

    raises  UsageError  WORLD_SIZE is no number of processes
    """
    return _from_environment("WORLD_SIZE", "1", least=1) > 1


def _from_environment(name: str, default: str | None = None, *, least: int, most=2**20) -> int:
    """A whole number that torchrun sets; UsageError for what is none, or out of range."""
    value = os.environ.get(name) or default
    if value is not None and value.isdecimal() and least <= int(value) <= most:
        return int(value)
    given = "is not set" if value is None else f"is {value!r}"
    raise UsageError(
        f"{name} {given}, must be a whole number from {least} to {most}: start with torchrun, or "
        f"set {', '.join(LAUNCH_VARIABLES)}; without WORLD_SIZE there is one process"
    )


def rank_device(name: str) -> torch.device:
    """pick_device(name), or this process's own GPU if torchrun started several.

    It becomes the current device, as Triton's kernels and new streams are the current device's.

    raises  UsageError  a device that is not there, more processes than GPUs, or one for which
                        DDPM_FAST_IMPL asks for kernels that it cannot run
    """
    try:
        device = pick_device(name)
        check_impl(device.type)
    except UsageError as error:
        raise MachineRefusal(str(error)) from None
    if device.type != "cuda":
        return device
    if not launched_by_torchrun():
        if device.index is not None:
            torch.cuda.set_device(device)
        return device
    local_rank, count = _world_of_environment().local_rank, torch.cuda.device_count()
    if local_rank >= count:
        raise MachineRefusal(
            f"process {local_rank} of this machine, which has {count} GPUs; allowed: "
            "--nproc-per-node up to that, or --device cpu",
            speaks=local_rank == count,
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def check_impl(device_type: str) -> None:
    """UsageError where DDPM_FAST_IMPL=fused means kernels that such a device cannot run."""
    if chosen_impl("auto") == "fused" and (why_not := why_not_fused(device_type)):
        raise UsageError(
            f"DDPM_FAST_IMPL=fused: {why_not}; allowed on {device_type}: DDPM_FAST_IMPL=auto or "
            "reference"
        )


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
    """Around all in which ranks meet: say what ends this one as `prog` does, and leave at once.

    A rank that leaves the word to another waits until that one has ended: torchrun ends all ranks
    when the first has ended.
    """
    try:
        yield
    except SaidElsewhere as elsewhere:
        with suppress(RuntimeError):
            dist.barrier(group=_hosts())
        end_process(code=elsewhere.code)
    except FORESEEN as error:
        if not _host_group and not isinstance(error, RankLost):
            raise
        end_process(code=report(prog, error))


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
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    except ValueError as error:  # MASTER_ADDR or MASTER_PORT is missing, or no port
        missing = [name for name in LAUNCH_VARIABLES if not os.environ.get(name)]
        raise UsageError(
            f"{', '.join(missing) or 'MASTER_PORT'} must be set for {world.size} processes to "
            f"meet: start with torchrun, or set {', '.join(LAUNCH_VARIABLES)} ({error})"
        ) from None
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

    raises  UsageError  one is missing, or no number that fits
    """
    size = _from_environment("WORLD_SIZE", least=1)
    slurms = os.environ.get("SLURM_LOCALID")
    return World(
        _from_environment("RANK", least=0, most=size - 1),
        size,
        _from_environment("LOCAL_RANK", slurms, least=0, most=size - 1),
    )


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
