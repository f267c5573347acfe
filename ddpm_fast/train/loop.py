"""The run around the steps: resume, log, sample, checkpoint, stop when asked, sum up."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.checkpoints.writer import CheckpointWriter
from ddpm_fast.data import ImageSet
from ddpm_fast.diffusion.sampler import sample_images
from ddpm_fast.errors import UsageError
from ddpm_fast.files.images import grid, grid_scale, save_png, to_uint8
from ddpm_fast.kernels.calling.impl import runs_interpreted
from ddpm_fast.optim.optimizer import state_tensors
from ddpm_fast.runtime.gpus import gpus_in_use
from ddpm_fast.runtime.monitor import Monitor
from ddpm_fast.runtime.ranks import (
    World,
    join,
    left_at_once_if_rank_lost,
    rank_device,
    told_if_rank_lost,
)
from ddpm_fast.train.announcement import announcement
from ddpm_fast.train.command import Invocation
from ddpm_fast.train.config import PROG, TrainConfig
from ddpm_fast.train.estimate import length_estimate
from ddpm_fast.train.failures import (
    GO_ON,
    TrainingError,
    told_if_it_cannot_go_on,
    told_if_only_a_grid_fails,
    told_if_the_net_does_not_fit,
)
from ddpm_fast.train.mfu import mfu_of
from ddpm_fast.train.profile import StepProfile
from ddpm_fast.train.progress import Display, Measured, peak_gib
from ddpm_fast.train.resuming import (
    average_parts,
    facts,
    newest_checkpoint,
    news_of_rate,
    restore,
)
from ddpm_fast.train.run_folder import RunFolder, RunFolderError, default_run_dir
from ddpm_fast.train.saving import Saving
from ddpm_fast.train.setup import (
    choose_algorithms,
    compile_errors,
    compiled_graphs,
    for_ranks,
    make_step,
    open_data_once,
    wrap_net,
)
from ddpm_fast.train.skew import SkewWatch
from ddpm_fast.train.step import TrainStep
from ddpm_fast.train.stopping import stop_requests
from ddpm_fast.train.summary import summarise
from ddpm_fast.train.trackers import Track, open_trackers

ANOTHERS_SIGNAL = "a signal to another process"


def train(invocation: Invocation) -> None:
    """Run an invocation to its end or until it is told to stop.

    raises  UsageError, DataError, RunFolderError, CheckpointError, TrainingError, OSError
    """
    config = invocation.config
    device = rank_device(config.device)
    when = lambda: "before its first step or at the end"  # noqa: E731
    with left_at_once_if_rank_lost(PROG), told_if_rank_lost(PROG, when, GO_ON):
        world = join(device, timeout_s=config.timeout)
        invocation = world.from_chief(lambda: invocation)  # the others may not see the folder
        unfinished = _train(invocation, device, world)
        world.leave()
    if unfinished:
        raise TrainingError(unfinished)


def _train(invocation: Invocation, device: torch.device, world: World) -> str | None:
    """Train; returns why this process has not done its work, if it ends without being asked to.

    As on a node whose ranks leave because those of another one were told to: with exit code 0 its
    torchrun or batch system would take the run for done.
    """
    config = world.together(
        lambda: for_ranks(
            invocation.config, device, world, resumed=invocation.resume, restarted=invocation.waits
        )
    )
    choose_algorithms(
        device,
        deterministic=config.deterministic,
        algorithms=config.cudnn_algorithms,
        tf32=config.tf32 == "on",
    )
    images = open_data_once(config, world, print if world.is_chief else _quiet)
    train_step = world.together(lambda: _make_step(config, images, device, world))
    path = Path(world.from_chief(lambda: str(config.run_dir or default_run_dir(config.preset))))
    wait_s = config.timeout if invocation.waits else 0.0
    folder = world.together(
        lambda: RunFolder(path, resume=invocation.resume, writes=world.is_chief, wait_s=wait_s)
    )
    try:
        trackers = world.together(lambda: open_trackers(config, path) if world.is_chief else [])
        display = Display(folder, config.iterations, quiet=not world.is_chief)
        writer = CheckpointWriter(
            folder.checkpoints, keep=config.keep_checkpoints, keep_every=config.keep_every,
            warn=lambda text: display.say(f"warning: {text}"),
        )  # fmt: skip
        monitor = Monitor(gpus_in_use(device)) if config.monitor and world.is_chief else None
        with display, stop_requests() as stop, writer, monitor or nullcontext():
            for line in invocation.notes:
                display.say(line)
            per_gpu = invocation.config.batch_size_per_gpu
            if invocation.resume and per_gpu and per_gpu * world.size != config.batch_size:
                display.say(
                    f"--batch-size-per-gpu {per_gpu} is left out: on {world.size} processes the "
                    f"run keeps its {config.batch_size} images a step"
                )
            run = Run(train_step, folder, display, trackers, writer, monitor)
            if invocation.resume:
                run.resume()
            world.from_chief(lambda: folder.write_config(replace(config, run_dir=str(path))))
            run.announce()
            if invocation.fitted and not invocation.resume:
                with told_if_the_net_does_not_fit():
                    display.say(length_estimate(train_step))
            wrap_net(train_step, display.say, done=run.step)
            with told_if_it_cannot_go_on(
                run.train_step, lambda: f"after step {run.step}", resumed=invocation.resume
            ):
                run.steps(stop)
            train_step.forget_graphs()  # their collectives would keep the ranks from parting
            if run.step < config.iterations:
                told = (
                    f"stopped by {stop[0]} after step {run.step}; checkpoint saved; continue with: "
                    f"{PROG} --resume {path}"
                )
                display.say(told)
                return None if world.any_on_node(stop != [ANOTHERS_SIGNAL]) else told
        if world.is_chief:
            summarise(train_step, folder, images, run.last_measured, run.images_per_s, display)
        return None
    finally:
        folder.close()


def _make_step(
    config: TrainConfig, images: ImageSet, device: torch.device, world: World
) -> TrainStep:
    with told_if_the_net_does_not_fit():
        return make_step(config, images, device, world)


def _quiet(line: str) -> None:
    """What a rank other than 0 says."""


class Run:
    """A training run at `step` finished steps."""

    def __init__(
        self,
        train_step: TrainStep,
        folder: RunFolder,
        display: Display,
        trackers: list[Track],
        writer: CheckpointWriter,
        monitor: Monitor | None = None,
    ) -> None:
        self.train_step, self.config = train_step, train_step.config
        self.folder, self.display, self.trackers = folder, display, trackers
        self.saving = Saving(
            writer, self._state, display.say, folder.log, exact=self.config.exact_checkpoints
        )
        self.monitor, self._monitored_s = monitor, 0.0
        self.world = train_step.world
        self.profile: StepProfile | None = None
        if self.config.profile and self.world.is_chief:
            self.profile = StepProfile(
                train_step, self.config.profile, folder.path / "profile", display.say
            )
        self.device = train_step.batches.device
        self.step = 0
        self.last_measured: Measured | None = None
        self._trained_steps, self._trained_s = 0, 0.0  # warm, and maintenance left out
        self._warm: bool | None = None  # captured as the interval began; None: no step before it
        self._trained_any, self._told_skipped, self._told_graph = False, 0, False
        self._skew = SkewWatch(self.world, self.config.batch_size, display.say)
        self._compiled_graphs = 0
        self._start_interval()

    def announce(self) -> None:
        for line in announcement(self.train_step, self.folder.path):
            self.display.say(line)
        if self.monitor is not None and self.monitor.why_not:
            self.display.say(f"{self.monitor.why_not}; this machine's processors are")

    @property
    def images_per_s(self) -> float:
        """Mean over this process's logged intervals but those in which it was warming up."""
        if not self._trained_steps:
            return 0.0 if self.last_measured is None else self.last_measured.images_per_s
        return self._trained_steps * self.config.batch_size / self._trained_s

    def _train_one(self) -> None:
        train_one = self.profile or self.train_step
        if self._trained_any or not self.train_step.compiled:
            train_one(self.step)
        else:
            self._compile_and_train(train_one)
        if not self._trained_any and self.world.is_chief:
            with self._maintenance():  # the optimizer's state is there by now
                self.saving.reserve()
        if self.profile is not None and self.profile.profiling:
            self._warm = None  # nor does this interval count
        self._trained_any = True
        self.step += 1
        self.display.stepped(self.step)

    def _compile_and_train(self, train_one: Callable[[int], None]) -> None:
        """The first step of a compiled net; eager, with one line, if it cannot be compiled."""
        start = time.perf_counter()
        try:
            with self.display.busy("compiling"):
                train_one(self.step)
        except compile_errors() as error:
            path = self.folder.path / "compile_error.txt"
            with suppress(OSError):  # a rank on another machine may not see the folder
                path.write_text("".join(traceback.format_exception(error)))
            why = " ".join(str(error).split("\n")[:2])[:200]  # what failed, and its own error
            if self.config.force_compile:
                raise TrainingError(f"--force-compile: {why}; all of it in {path}") from None
            self.display.say(f"compiling failed, training eager: {why}; all of it in {path}")
            if self.world.size == 1:
                self.train_step.forward = self.train_step.net
            else:  # what shares the gradients calls the compiled net
                torch.compiler.set_stance("force_eager")
            train_one(self.step)
        else:
            seconds = time.perf_counter() - start
            self.display.say(f"compiled, with the first step, in {seconds:.0f} s")
            self._compiled_graphs = compiled_graphs()

    def steps(self, stop: list[str]) -> None:
        """Train until `stop` holds a reason or all steps are done, then save."""
        config = self.config
        self._start_interval()
        with closing(self.profile) if self.profile else nullcontext():
            while self.step < config.iterations and not self._is_told_to_stop(stop):
                self._train_one()
                if self.step == 1 or self.step % config.log_every == 0 or self._is_last():
                    self._measure()
                with self._maintenance():
                    if self.profile is not None:
                        self.profile.report_if_due()
                    if _due(self.step, config.checkpoint_every):
                        self.save_checkpoint()
                    elif self.saving.is_overdue() and self.train_step.healthy.item():
                        self.saving.save(self.step)
                    if self._samples_due():
                        with told_if_only_a_grid_fails(self.step, self.display.say):
                            self.save_samples()
        self._check_finite()
        if self.world.is_chief:
            self.saving.finish(self.step)

    def _is_told_to_stop(self, stop: list[str]) -> bool:
        """Whether any rank is; where a rank was lost, this is the first to notice."""
        told = self.world.any(bool(stop))
        if told and not stop:
            stop.append(ANOTHERS_SIGNAL)
        return told

    def save_checkpoint(self) -> None:
        """Begin to write this step's checkpoint, unless the weights are not finite."""
        self._check_finite()
        if self.world.is_chief:
            self.saving.save(self.step)

    def _state(self) -> tuple[dict[str, checkpoint.Tensors], dict[str, Any]]:
        """What a checkpoint holds, and what its manifest says of it."""
        parts = self.train_step
        return {
            "model": parts.net.state_dict(),
            **average_parts(parts),
            "optimizer": state_tensors(parts.optimizer, parts.net),
        }, facts(parts)

    def resume(self) -> None:
        """Go back to the newest healthy checkpoint; a run killed before its first starts anew."""
        say = self.display.say
        found = self.world.from_chief(lambda: newest_checkpoint(self.folder, say))
        if found is None:
            aside = self.folder.set_metrics_aside()
            kept = f"; the rows so far are in {aside.name}" if aside else ""
            say(f"no checkpoint yet: starting from step 0{kept}")
            return
        self.world.together(lambda: self._restore(Path(found)))

    def _restore(self, found: Path) -> None:
        """Go back to a checkpoint."""
        say = self.display.say
        if not found.is_dir():
            raise RunFolderError(
                f"rank {self.world.rank} cannot see {found}, which rank 0 resumes: all nodes must "
                "share the run folder"
            )
        saved = checkpoint.load(found)
        if saved.step > self.config.iterations:
            raise UsageError(
                f"--iterations {self.config.iterations}, but {self.folder.path} has done "
                f"{saved.step} steps; allowed: {saved.step} or more"
            )
        restore(self.train_step, saved)
        if self.world.is_chief:
            for path in checkpoint.set_damaged_aside(saved.path):
                say(f"the damaged checkpoint is now {path.name}")
        self.step = self.saving.saved_step = saved.step
        self.folder.forget_metrics_after(self.step)
        say(f"resumed after step {self.step} from {saved.path}")
        if news := news_of_rate(self.train_step, saved):
            say(news)

    def save_samples(self) -> None:
        """samples/step_XXXXXXXX.png from the averaged weights: the same starts at every step."""
        config, parts = self.config, self.train_step
        classes = parts.net.num_classes
        with parts.autocast():
            images = sample_images(
                parts.ema.net,
                parts.proc,
                config.sample_images,
                steps=min(config.sample_steps, config.num_timesteps),
                batch_size=min(config.sample_images, 256),
                y=None if classes is None else torch.arange(config.sample_images) % classes,
                seed=config.seed,
            )
        path = self.folder.samples / f"step_{self.step:08d}.png"
        columns = classes if classes and classes <= 20 else None
        save_png(path, grid(to_uint8(images), columns, grid_scale(images.shape[-1])))

    def _measure(self) -> None:
        """Read the step's values from the device and report them."""
        loss, norm = self.train_step.loss.item(), self.train_step.grad_norm.item()
        now = time.perf_counter()
        seconds = max(now - self._interval_start - self._maintenance_s, 1e-9)
        steps = self.step - self._interval_step
        self._count(steps, seconds)
        waits_s = self.train_step.batches.wait_s - self._waited_s
        images_per_s = steps * self.config.batch_size / seconds
        each = images_per_s / self.world.size
        measured = Measured(
            step=self.step,
            loss=loss,
            lr=self.train_step.learning_rate(self.step - 1),
            images_per_s=round(images_per_s, 2),
            grad_norm=norm,
            peak_gib=round(peak_gib(self.device), 3),
            data_wait=round(max(self.world.gather(waits_s)) / seconds, 4),
            skew=self._skew.measure(self.step, self.train_step.forward_s, waits_s / steps),
            images_per_s_each=round(each, 2) if self.world.size > 1 else None,
            mfu=mfu_of(self.train_step, each),
        )
        self._check_finite()
        self.last_measured = measured
        if not self.world.is_chief:
            self._start_interval()
            return
        self._tell_news()
        self.saving.hear()
        row = measured.row() | self._monitored()
        if stall_s := self.saving.take_stall_s():
            row["checkpoint_stall_s"] = round(stall_s, 4)
        self.folder.add_metrics(row)
        seconds_left = (self.config.iterations - self.step) * seconds / steps
        self.display.measured(measured, seconds_left)
        self._track({k: v for k, v in row.items() if k != "step" and v is not None})
        self._start_interval()

    def _count(self, steps: int, seconds: float) -> None:
        """An interval's share in images_per_s: none of the first, nor of one with the capture."""
        captured = self.train_step.captured
        if self._warm == captured:
            self._trained_steps += steps
            self._trained_s += seconds
        self._warm = captured

    def _track(self, values: dict[str, float]) -> None:
        """Hand a row to the trackers; one that cannot write is left out from then on."""
        for track in list(self.trackers):
            try:
                track(self.step, values)
            except OSError as error:
                self.trackers.remove(track)
                self.display.say(f"warning: a tracker failed and is left out: {error}")

    def _monitored(self) -> dict[str, float]:
        """Means since the last logged step, as monitor_utilisation and so on."""
        if self.monitor is None:
            return {}
        means = self.monitor.means_since(self._monitored_s)
        self._monitored_s = self.monitor.seconds
        return {f"monitor_{name}": round(value, 2) for name, value in means.items()}

    def _tell_news(self) -> None:
        """Steps that were left out, how the step runs: once each."""
        skipped = int(self.train_step.skipped)
        if skipped > self._told_skipped:
            self.display.say(
                f"warning: {skipped - self._told_skipped} steps up to {self.step} were not finite "
                "and left out; no weight changed in them"
            )
            self._told_skipped = skipped
        if self._compiled_graphs and compiled_graphs() > self._compiled_graphs:
            self._compiled_graphs = compiled_graphs()
            self.display.say(f"warning: compiled again, {self._compiled_graphs} graphs by now")
        if self.device.type == "cuda" and not self._told_graph and self.config.cuda_graph != "off":
            self._told_graph = self._tell_graph()

    def _tell_graph(self) -> bool:
        """How the step is launched; False while it warms up."""
        train_step, why_not = self.train_step, self.train_step.call.why_not
        if train_step.captured and train_step.halved:
            self.display.say(f"the step is two CUDA graphs around what the ranks send: {why_not}")
        elif train_step.captured:
            self.display.say("the step is one CUDA graph")
        elif self.config.cuda_graph == "on" and why_not is not None:
            raise TrainingError(f"--cuda-graph on: the step cannot be captured: {why_not}")
        elif why_not := train_step.why_no_graph:
            overlap = (
                "; --cuda-graph off sends gradients during the backward pass, which may be faster"
                if train_step.halved
                else ""
            )
            self.display.say(f"no CUDA graph, each step is launched anew: {why_not}{overlap}")
        else:
            return False
        return True

    def _check_finite(self) -> None:
        if not self.train_step.healthy.item():  # on all ranks alike
            self.world.together(self._refuse_what_diverged)

    def _refuse_what_diverged(self) -> None:
        before, loss, norm = self.train_step.failed.tolist()
        self.saving.settle()
        steps = checkpoint.steps_in(self.folder.checkpoints)
        kept = f"the checkpoint of step {steps[-1]} is untouched" if steps else "none was saved"
        raise TrainingError(
            f"loss {loss}, gradient norm {norm} at step {before + 1:.0f}: training diverged; "
            f"{kept}; try a smaller --learning-rate, --precision fp32 or --on-nan skip"
        )

    def _start_interval(self) -> None:
        self._interval_start, self._interval_step = time.perf_counter(), self.step
        self._maintenance_s, self._waited_s = 0.0, self.train_step.batches.wait_s

    @contextmanager
    def _maintenance(self) -> Iterator[None]:
        """Time that is not training: it does not count in images_per_s."""
        start = time.perf_counter()
        yield
        self._maintenance_s += time.perf_counter() - start

    def _samples_due(self) -> bool:
        every = self.config.sample_every
        if not self.world.is_chief or runs_interpreted(self.train_step.net.impl):
            return False  # a grid would take hours
        return _due(self.step, every) or (every > 0 and self._is_last())

    def _is_last(self) -> bool:
        return self.step == self.config.iterations


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
