"""A function of static buffers as one CUDA graph, with the eager function to fall back on."""

from __future__ import annotations

import gc
import inspect
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

WARM_UP_CALLS = 3  # lazy initialisation, autotuning, compilation: none of it may be captured


def keep_cupti() -> None:
    """Before a profiler on CUDA: leave CUPTI up behind it. Taken down and started again, it breaks
    CUDA graphs (torch's note). What is set already stays."""
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")


class CapturedCall:
    """Calls `run`: the first times as it is, from then on as one graph launch.

    run     takes and returns nothing; reads and writes tensors whose addresses never change, and
            must not wait for the device. Of a method only a weak reference is kept: its object may
            own this call, and has to be freed, with the graph, when nobody needs it any more
    device  a CUDA device; on any other `run` is called each time
    why_not a reason never to capture it
    warm_up_calls  so many calls come before the capture
    agreed  given whether this process could capture it, says whether all have that must replay
            together

    `why_not` says why there is no graph, or is None; `captured` whether there is one.
    """

    def __init__(
        self,
        run: Callable[[], None],
        device: torch.device,
        *,
        why_not: str | None = None,
        warm_up_calls: int = WARM_UP_CALLS,
        agreed: Callable[[bool], bool] = bool,
    ) -> None:
        self._run = weakref.WeakMethod(run) if inspect.ismethod(run) else lambda: run
        self._device, self._warm_up_calls, self._agreed = device, warm_up_calls, agreed
        self._graph: torch.cuda.CUDAGraph | None = None
        self._failed_graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self._calls = 0
        self.why_not = why_not
        if device.type != "cuda":
            self.why_not = f"CUDA graphs need a CUDA device, not {device.type}"

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()  # on its own device, whichever is the current one
        elif self.why_not is not None:
            self._run()()
        elif self._calls < self._warm_up_calls:
            with self.side_stream():
                self._run()()
            self._calls += 1  # not of a call that failed: others may not have failed with it
        else:
            self._capture()
            self()

    def forget(self) -> None:
        """Give the graph back; the next call captures another."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = None

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """The stream of the warm-up calls and of the capture; the current one without a capture.

        Autograd and DDP remember the stream in which they first met a parameter. One stream for all
        calls: the allocator keeps memory apart by stream. One for each CapturedCall: what a
        library holds by stream goes with it, and must not be another graph's.
        """
        if self.why_not is not None:
            yield
            return
        current, side = torch.cuda.current_stream(self._device), self._own_stream()
        side.wait_stream(current)
        with torch.cuda.device(self._device), torch.cuda.stream(side):
            yield
        current.wait_stream(side)

    def _own_stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return self._stream

    def _capture(self) -> None:
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with _no_collection(), self.side_stream():
                torch.cuda.synchronize()
                _free_workspaces()
                torch.cuda.empty_cache()  # what the warm-up held serves the graph
                _record(graph, self._run(), pool)
        except Exception as error:  # Triton's and Inductor's are no RuntimeErrors
            self._failed_graph = graph  # the allocator may go on asking it about its stream
            torch.cuda.synchronize(self._device)
            self._give_back(graph, pool)
            self.why_not = str(error).strip().partition("\n")[0]
            if not isinstance(error, RuntimeError):
                self.why_not = f"{type(error).__name__}: {self.why_not}"
            self._agreed(False)
        else:
            if self._agreed(True):
                self._graph = graph
            else:
                graph.reset()
                self.why_not = "another process could not capture it"

    def _give_back(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
        """What a failed capture holds: the next try, or the eager call, may need the memory."""
        with suppress(RuntimeError):
            graph.reset()  # where the capture itself ended well: out of memory, a Python error
        # A capture that was invalidated has not ended for torch's allocator (pytorch #180395).
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index or 0, pool)
            torch._C._cuda_releasePool(self._device.index or 0, pool)
        torch.cuda.empty_cache()


def _record(graph: torch.cuda.CUDAGraph, run: Callable[[], None], pool: tuple[int, int]) -> None:
    """Capture run() in the current stream, its memory from `pool`; raises what it raises."""
    # Other threads (checkpoints, pictures) may use the device meanwhile.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        run()
    except BaseException:
        with suppress(RuntimeError):  # after an illegal call: of the capture, not the reason
            graph.capture_end()
        raise
    else:
        graph.capture_end()
    finally:
        _free_workspaces()  # calls that are not captured must not use the graph's


def _free_workspaces() -> None:
    """Have cuBLAS take others where it needs them next.

    It keeps one for each stream. In a capture it takes them from the graph's own memory then: those
    of the warm-up may be freed under the graph, as Inductor does with all before its own captures.
    """
    torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def _no_collection() -> Iterator[None]:
    """What the garbage collector frees, such as another graph, would invalidate the capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
