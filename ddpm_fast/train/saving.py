"""A run's checkpoints: when they are begun, how long they hold the steps, what a failed one costs.

A step waits for the copy to host memory, never for the disk: a checkpoint that is due while an
earlier one is still being written is put off to the first step after that. It is then of that step.
A write that fails costs that checkpoint alone: it is told, and the next one is begun all the same.
The run ends when two in a row fail, or when its last state cannot be saved at the second try.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ddpm_fast.checkpoints.own import CheckpointError, Tensors
from ddpm_fast.checkpoints.writer import CheckpointWriter

# The state's parts and the manifest's facts, as of checkpoint.save
State = Callable[[], tuple[Mapping[str, Tensors], Mapping[str, Any]]]


class Saving:
    """Saves the states of a run by `writer`.

    state  what to save
    say    told of what failed;  note  of what was written
    exact  let a step wait for the earlier write instead of putting its checkpoint off
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        state: State,
        say: Callable[[str], None],
        note: Callable[[str], None],
        *,
        exact: bool = False,
    ) -> None:
        self.writer, self._state, self._say, self._note = writer, state, say, note
        self._exact = exact
        self._put_off: int | None = None  # the step at which it was due
        self.saved_step: int | None = None  # begun, or read by a resume
        self._noted_step = writer.last_written_step
        self._failed_in_a_row, self._stall_s, self._told_slow = 0, 0.0, False

    def reserve(self) -> None:
        """Take the host memory of a checkpoint."""
        self.hear(wait=True)
        self.writer.reserve(self._state()[0])

    def save(self, step: int) -> None:
        """Begin to write the state after `step` steps, if that was not begun before, or put it off.

        raises  CheckpointError  the write before this one failed, and so did the one before that
        """
        start = time.perf_counter()
        if self.writer.busy and not self._exact:
            if self.saved_step != step:
                self._put_off = self._put_off or step
            return
        self.hear(wait=True)
        if self.saved_step == step:
            return
        waited_s = time.perf_counter() - start
        self.writer.save(step, *self._state())
        self.saved_step = step
        self._stall_s += time.perf_counter() - start
        if waited_s > max(1.0, self.writer.last_copy_s):
            self._tell_slow(f"step {step} waited {waited_s:.1f} s until the one before was written")
        if self._put_off is not None:
            self._tell_slow(
                f"the one due at step {self._put_off} is of step {step}, as the one before was "
                "still being written; --exact-checkpoints waits instead"
            )
            self._put_off = None

    def is_overdue(self) -> bool:
        """Whether a checkpoint was put off whose turn has come."""
        return self._put_off is not None and not self.writer.busy

    def _tell_slow(self, how: str) -> None:
        if not self._told_slow:
            self._told_slow = True
            self._say(f"warning: checkpoints take longer than --checkpoint-every: {how}")

    def hear(self, *, wait: bool = False) -> None:
        """Tell how the last write ended; `wait`: until it has.

        raises  CheckpointError  it failed, as the one before it did
        """
        try:
            self.writer.wait() if wait else self.writer.poll()
        except CheckpointError as error:
            self.saved_step = None
            self._failed_in_a_row += 1
            if self._failed_in_a_row > 1:
                raise
            self._say(f"warning: {error}; the run ends if the next one fails too")
        written = self.writer.last_written_step
        if written != self._noted_step:
            self._noted_step, self._failed_in_a_row = written, 0
            self._note(
                f"checkpoint of step {written} saved in {self.writer.last_write_s:.2f} s beside "
                "the training"
            )

    def finish(self, step: int) -> None:
        """Save the last state and wait for it; a failure is tried once more.

        raises  CheckpointError  that failed too
        """
        self._failed_in_a_row, self._put_off = 0, None
        if self.saved_step != step:
            self.hear(wait=True)  # of the one before, whose failure does not count here
            self._failed_in_a_row = 0
        for _ in range(2):
            self.save(step)
            self.hear(wait=True)

    def settle(self) -> None:
        """Wait for a write under way before the run ends for another reason."""
        self._failed_in_a_row = 0
        self.hear(wait=True)

    def take_stall_s(self) -> float:
        """Seconds that saves have held the steps since this was last asked."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s
