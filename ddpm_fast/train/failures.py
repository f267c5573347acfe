"""What ends a run other than its last step, or could: told in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ddpm_fast.errors import Failure, NotFinite
from ddpm_fast.runtime.device import is_out_of_memory
from ddpm_fast.runtime.ranks import told_if_rank_lost
from ddpm_fast.train.config import PROG
from ddpm_fast.train.memory import advice
from ddpm_fast.train.step import TrainStep

GO_ON = "torchrun --max-restarts N with --auto-resume goes on from the last checkpoint"


class TrainingError(Failure):
    """Training cannot go on: one line saying why and what is safe."""


@contextmanager
def told_if_it_cannot_go_on(
    train_step: TrainStep, when: Callable[[], str], *, resumed: bool
) -> Iterator[None]:
    """TrainingError for what does not fit, with what does; RankLost for a rank that was lost."""
    with told_if_rank_lost(PROG, when, GO_ON):
        try:
            yield
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # it holds the step's tensors
        raise TrainingError(advice(train_step, resumed=resumed))


@contextmanager
def told_if_the_net_does_not_fit() -> Iterator[None]:
    """TrainingError where the weights, their averages or the images do not."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            "out of memory before the first step: the net, its averages and the images do not fit; "
            "a smaller net, fewer --extra-ema-decays or another --device may"
        ) from None


@contextmanager
def told_if_only_a_grid_fails(step: int, say: Callable[[str], None]) -> Iterator[None]:
    """A sample grid that does not fit, is not finite or cannot be written is a warning, no more."""
    try:
        yield
    except OSError as error:
        say(f"warning: no sample grid of step {step}: {error.strerror or error}")
    except NotFinite as error:
        say(f"warning: no sample grid of step {step}: {error}")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        error.__traceback__ = None  # it holds the sampler's tensors
        say(
            f"warning: no sample grid of step {step}: out of memory; fewer --sample-images fit, "
            "--sample-every 0 draws none"
        )
