"""python -m ddpm_fast.train with a fault in it: FAULT, from FAULT_STEP, in FAULT_RANK or any.

It strikes in torchrun's first attempt only, but for those of EACH_ATTEMPT.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.diffusion.process import Diffusion
from ddpm_fast.train import loop, setup
from ddpm_fast.train.__main__ import main
from ddpm_fast.train.step import TrainStep
from tests.faults.stages import WRITER_STAGES

FAULT = os.environ["FAULT"]
STEP = int(os.environ.get("FAULT_STEP", "13"))
ATTEMPT = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
CHECKPOINTS = Path(sys.argv[sys.argv.index("--run-dir") + 1]) / "checkpoints"


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_the_node():
    os.kill(os.getppid(), signal.SIGKILL)
    kill_self()


def signal_all(number):
    """Torchrun and its ranks at once, as scancel does."""
    with open(f"/proc/{os.getppid()}/task/{os.getppid()}/children") as file:
        for pid in (*map(int, file.read().split()), os.getppid()):
            os.kill(pid, number)


def wait_alone():
    """Until a signal comes, in a world of one."""
    if os.environ["WORLD_SIZE"] == "1":
        signal.pause()


def before_step(action, *, every=False):
    """Call action() before step STEP, or before each from there on."""
    original = TrainStep.__call__

    def call(self, step):
        if step == STEP or (every and step > STEP):
            action()
        original(self, step)

    TrainStep.__call__ = call


def kill_the_writer_at_each_stage():
    """An attempt each, in the second checkpoint that it writes."""
    if len(WRITER_STAGES) == ATTEMPT:
        return
    before, (event, pattern) = checkpoint.steps_in(CHECKPOINTS), WRITER_STAGES[ATTEMPT]

    def hook(name, arguments):
        if name == event and isinstance(arguments[0], (str, Path)):
            path = Path(arguments[0])
            ours = path.is_relative_to(CHECKPOINTS) and path.match(pattern)
            if ours and checkpoint.steps_in(CHECKPOINTS) != before:
                print("killed before", event, pattern, flush=True)
                kill_self()

    sys.addaudithook(hook)


def kill_after_each_checkpoint():
    """As soon as this attempt has written one."""
    before = checkpoint.steps_in(CHECKPOINTS)

    def action():
        if ATTEMPT < 10 and checkpoint.steps_in(CHECKPOINTS) != before:
            kill_self()

    before_step(action, every=True)


def freeze_in_a_graph():
    """Rank 1 freezes; rank 0 waits in what no time-out reaches: a collective in a graph."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    threading.Event().wait()


def be_long():
    """Rank 0 opens the data and draws a grid for longer than --timeout."""

    def slowly(function):
        def call(*args, **options):
            time.sleep(3)
            return function(*args, **options)

        return call

    setup.open_data, loop.sample_images = slowly(setup.open_data), slowly(loop.sample_images)


def spoil_the_loss():
    original = Diffusion.loss
    spoiled = []

    def loss(self, *args, step, **options):
        value = original(self, *args, step=step, **options)
        if int(step) == STEP and not spoiled:
            spoiled.append(True)
            return value * float("inf")
        return value

    Diffusion.loss = loss


def slow_down():
    """Ten times what the forward pass itself takes."""
    original = Diffusion.loss

    def loss(*args, **options):
        start = time.perf_counter()
        value = original(*args, **options)
        time.sleep(9 * (time.perf_counter() - start))
        return value

    Diffusion.loss = loss


def fill_the_disk():
    """A limit a file stands for the disk: the kernel refuses the bytes past it."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, hard))


def take_the_folder():
    """A file where the checkpoints were: not even root can write into it."""
    CHECKPOINTS.rename(CHECKPOINTS.with_name("taken"))
    CHECKPOINTS.touch()


ARRANGE = {
    "kill": lambda: before_step(kill_self),
    "kill-each-time": kill_after_each_checkpoint,
    "kill-writer-each-time": kill_the_writer_at_each_stage,
    "kill-node": lambda: before_step(kill_the_node),
    "sigterm": lambda: before_step(lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "sigterm-agent": lambda: before_step(lambda: os.kill(os.getppid(), signal.SIGTERM)),
    "sigterm-all": lambda: before_step(lambda: signal_all(signal.SIGTERM)),
    "sighup-agent": lambda: before_step(lambda: os.kill(os.getppid(), signal.SIGHUP)),
    "sigint-agent": lambda: before_step(lambda: os.kill(os.getppid(), signal.SIGINT)),
    "freeze": lambda: before_step(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "freeze-in-a-graph": lambda: before_step(freeze_in_a_graph),
    "long": be_long,
    "wait": lambda: before_step(lambda: time.sleep(60)),
    "wait-alone": lambda: before_step(wait_alone),
    "inf": spoil_the_loss,
    "slow": slow_down,
    "fill-disk": lambda: before_step(fill_the_disk),
    "take-folder": lambda: before_step(take_the_folder),
}
EACH_ATTEMPT = ("kill-each-time", "kill-writer-each-time", "wait-alone")

if __name__ == "__main__":
    due = ATTEMPT == 0 or FAULT in EACH_ATTEMPT
    if due and os.environ["FAULT_RANK"] in (os.environ["RANK"], "any"):
        ARRANGE[FAULT]()
    sys.exit(main())
