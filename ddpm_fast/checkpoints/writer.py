"""Checkpoints written by a thread: a step waits for the copy to host memory, not for the disk.

The copy lies in blocks of host memory that every save reuses, page-locked where tensors come from
CUDA. That and blocks of 1 MiB for the hash are all it takes: the parts are streamed from the copy,
save for those that are not contiguous (channels_last), which are laid out anew a part at a time.
At most one write is under way, so the copy being written is never written to.
"""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.checkpoints.own import CheckpointError, Tensors

# Torch rounds page-locked memory up to a power of two: 1.8 times the state for a block per 3x3
# convolution, next to nothing for blocks of this size.
BLOCK_BYTES = 32 * 2**20
ALIGNMENT = 64


def _tell(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


class CheckpointWriter:
    """Writes checkpoints into `folder`, one at a time, in a thread.

    folder, keep, keep_every  as of :func:`ddpm_fast.checkpoints.own.save`
    warn                      told of a failed write when another exception is already under way,
                              and, in the thread, of an old checkpoint that cannot be removed

    A state that is not finite is not written. A write that failed raises its CheckpointError from
    the next save(), wait(), poll() or close(), and that save is not begun. As a context manager it
    waits for the write at the end, also on an exception; a second Ctrl-C ends the wait, and what
    was half written is no checkpoint.

    last_stall_s       the last save() held its caller so long: earlier write, then copy
    last_copy_s        of that, the copy
    last_write_s       the last finished write took so long, beside the training
    last_written_step  of the newest checkpoint that stands; None before the first
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_every: int = 0,
        warn: Callable[[str], None] = _tell,
    ) -> None:
        if keep < 1 or keep_every < 0:
            raise ValueError(f"keep={keep} must be 1 or more, keep_every={keep_every} 0 or more")
        self.folder, self.keep, self.keep_every, self._warn = folder, keep, keep_every, warn
        self.last_stall_s = self.last_copy_s = self.last_write_s = 0.0
        self.last_written_step: int | None = None
        self._host = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, parts: Mapping[str, Tensors], facts: Mapping[str, Any]) -> None:
        """Copy `parts` and begin to write them; they may be altered as soon as this returns.

        step, parts, facts  as of :func:`ddpm_fast.checkpoints.own.save`
        raises              CheckpointError  the write before this one failed
        """
        start = time.perf_counter()
        self.wait()
        copy_start = time.perf_counter()
        copied = self._host.take(parts)
        self.last_copy_s = time.perf_counter() - copy_start
        self._thread = threading.Thread(
            target=self._write,
            args=(step, copied, copy.deepcopy(dict(facts))),
            name=f"checkpoint of step {step}",
            daemon=True,  # a disk that hangs cannot keep the process
        )
        self._thread.start()
        self.last_stall_s = time.perf_counter() - start

    def reserve(self, parts: Mapping[str, Tensors]) -> None:
        """Take the host memory that `parts` need, so that the first save() only copies.

        On the CPU that save took 1.8 s for 572 MB, the following ones 0.06 s. Of use once the
        optimizer has its state; another layout is taken anew by the save() that brings it.
        """
        self.wait()
        self._host.take(parts)

    @property
    def busy(self) -> bool:
        """Whether a write is under way, for which save() would wait."""
        return self._thread is not None and self._thread.is_alive()

    def poll(self) -> None:
        """As wait(), but only where nothing is being written any more."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written; raises CheckpointError if that write failed."""
        if self._thread is not None and self._thread.ident is not None:  # None: never started
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """wait(), then give the host memory back."""
        try:
            self.wait()
        finally:
            self._host = HostCopy()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception as error:
            if kind is None:
                raise
            self._warn(str(error))

    def _write(self, step: int, parts: Mapping[str, Tensors], facts: Mapping[str, Any]) -> None:
        start = time.perf_counter()
        try:
            _check_finite(self.folder, step, parts)
            checkpoint.save(
                self.folder, step, parts, facts,
                keep=self.keep, keep_every=self.keep_every, warn=self._warn,
            )  # fmt: skip
            self.last_written_step, self.last_write_s = step, time.perf_counter() - start
        except BaseException as error:  # whatever it is, the caller must hear of it
            self._error = error


def _check_finite(folder: Path, step: int, parts: Mapping[str, Tensors]) -> None:
    """CheckpointError naming a tensor that is not finite; its extrema show that without a copy."""
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            if not tensor.numel() or not tensor.is_floating_point():
                continue
            if not all(torch.isfinite(value) for value in tensor.aminmax()):
                raise CheckpointError(
                    f"checkpoint {folder / f'step_{step:08d}'} not written: {name!r} of the {part} "
                    "is not finite; earlier checkpoints are untouched"
                )


class HostCopy:
    """A copy of a state in host memory, whose blocks serve again while the layout is the same."""

    def __init__(self) -> None:
        self._layout: list[tuple] | None = None
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @torch.no_grad()
    def take(self, parts: Mapping[str, Tensors]) -> dict[str, dict[str, Tensor]]:
        """Copy every tensor; returns when all are copied. The next take() overwrites the result."""
        self._fit(parts)
        pairs = [(self._parts[p][n], t) for p, tensors in parts.items() for n, t in tensors.items()]
        events = [
            self._start_copies([pair for pair in pairs if pair[1].device == device], device)
            for device in sorted({t.device for _, t in pairs if t.is_cuda}, key=str)
        ]
        for host, tensor in pairs:
            if not tensor.is_cuda:
                host.copy_(tensor)
        for event in events:
            event.synchronize()
        return self._parts

    def _start_copies(
        self, pairs: list[tuple[Tensor, Tensor]], device: torch.device
    ) -> torch.cuda.Event:
        """Copies behind all that this thread has launched; the event that they are done."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for host, tensor in pairs:
                host.copy_(tensor, non_blocking=True)
            return stream.record_event()

    def _fit(self, parts: Mapping[str, Tensors]) -> None:
        """Have self._parts be as `parts` are: names, shapes, strides, dtypes."""
        layout = [
            (part, name, t.shape, t.stride(), t.dtype, t.is_cuda)
            for part, tensors in parts.items()
            for name, t in tensors.items()
        ]
        if layout == self._layout and self._parts.keys() == parts.keys():
            return
        self._layout, self._parts = None, {}  # given back before more is taken
        tensors = [t for part in parts.values() for t in part.values()]
        places, block_bytes = places_in_blocks([t.numel() * t.element_size() for t in tensors])
        pinned = any(t.is_cuda for t in tensors)
        blocks = [torch.empty(n, dtype=torch.uint8, pin_memory=pinned) for n in block_bytes]
        views = iter(
            [_view(blocks[b], start, t) for (b, start), t in zip(places, tensors, strict=True)]
        )
        self._parts = {part: {n: next(views) for n in named} for part, named in parts.items()}
        self._layout = layout


def places_in_blocks(num_bytes: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """(block, first byte) of each tensor, and each block's bytes; filled one after another."""
    places, block_bytes = [], []
    for size in num_bytes:
        start = -(-block_bytes[-1] // ALIGNMENT) * ALIGNMENT if block_bytes else 0
        if not block_bytes or (start and start + size > BLOCK_BYTES):
            block_bytes.append(0)
            start = 0
        places.append((len(block_bytes) - 1, start))
        block_bytes[-1] = start + size
    return places, block_bytes


def _view(block: Tensor, start: int, like: Tensor) -> Tensor:
    """A tensor like `like` in the block's bytes from `start`, strided as it is where it is dense.

    Equal strides make the copy from the device one plain transfer.
    """
    flat = block[start : start + like.numel() * like.element_size()].view(like.dtype)
    return flat.as_strided(like.shape, torch.empty_like(like, device="meta").stride())
