"""A function of static buffers as one CUDA graph, with the eager function to fall back on."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP_CALLS = 3  # lazy initialisation, autotuning, compilation: none of it may be captured


class CapturedCall:
    """Calls `run`: the first times as it is, from then on as one graph launch.

    run     takes and returns nothing; reads and writes tensors whose addresses never change, and
            must not wait for the device
    device  a CUDA device; on any other `run` is called each time
    why_not a reason never to capture it
    warm_up_calls  so many calls come before the capture

    `why_not` says why there is no graph, or is None; `captured` whether there is one.
    """

    def __init__(
        self,
        run: Callable[[], None],
        device: torch.device,
        *,
        why_not: str | None = None,
        warm_up_calls: int = WARM_UP_CALLS,
    ) -> None:
        self._run, self._device, self._warm_up_calls = run, device, warm_up_calls
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0
        self.why_not = why_not
        if device.type != "cuda":
            self.why_not = f"CUDA graphs need a CUDA device, not {device.type}"

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif self.why_not is not None:
            self._run()
        elif self._calls < self._warm_up_calls:
            self._calls += 1
            self._on_side_stream()
        else:
            self._capture()
            self()

    def _on_side_stream(self) -> None:
        """Warm-up runs where the capture will: autograd remembers its stream."""
        current = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._run()
        current.wait_stream(side)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (checkpoints, pictures) may use the device meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
        except RuntimeError as error:
            torch.cuda.synchronize(self._device)
            self.why_not = str(error).strip().partition("\n")[0]
        else:
            self._graph = graph
