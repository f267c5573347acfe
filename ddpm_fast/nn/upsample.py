"""Nearest-neighbour doubling and a 3x3 conv, as one transposed conv of stride 2.

Each output phase sees only 2x2 distinct inputs, so the 3x3 taps that read the same input add up:
w4 = M w M^T, exact algebra at 4/9 of the multiplications and with no upsampled tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.kernels.calling.autocast import autocast_dtype
from ddpm_fast.nn.plain import is_plain, is_plain_conv


class _Held(NamedTuple):
    """A phase weight with its inputs."""

    phases: Tensor  # (C_in, C_out, 4, 4)
    weight: Tensor
    by_additions: bool


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 conv.

    mode  "transposed" (one transposed conv), "plain" (the two steps as written), or "auto": plain
          where so few pixels come in that summing the taps costs more than it saves. A conv that
          was replaced, hooked or parametrised is called as it is, in every mode
    """

    # On a CPU pixels of the whole batch. 2 cores, 256 channels, forward + backward, against plain:
    # 64 pixels 2.1x slower, 256 equal, 1024 1.6x faster.
    MIN_PIXELS = 512
    # Elsewhere, and in an exported graph, of one image: no image then depends on its batch's size.
    MIN_IMAGE_PIXELS = 16  # not yet measured

    def __init__(self, channels: int, mode: str = "auto") -> None:
        super().__init__()
        self.mode = mode
        self.upsample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self._held: _Held | None = None
        self._holders = 0

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 2 H, 2 W)."""
        if not (self._transposes(x) and self._readable()):
            return self.upsample(x)
        conv = self.upsample[1]
        return F.conv_transpose2d(x, self._phases(conv.weight), conv.bias, stride=2, padding=1)

    @contextmanager
    def held_weights(self) -> Iterator[Tensor | None]:
        """Forward passes without gradients take the phase weight of the weight as it is on entry.

        It is given, and the same tensor at every entry with the same layout and autocast, so that
        a captured CUDA graph may read it. Contexts may be nested; the weight must not change
        within one.
        """
        held = self.mode != "plain" and self._readable()
        if held:
            self._hold(self.upsample[1].weight)
        self._holders += 1
        try:
            yield self._held.phases if held else None
        finally:
            self._holders -= 1

    def __getstate__(self) -> dict[str, Any]:
        """Copy without the held phase weight."""
        return {**self.__dict__, "_held": None, "_holders": 0}

    def _transposes(self, x: Tensor) -> bool:
        if self.mode != "auto":
            return self.mode == "transposed"
        n, _, h, w = x.shape
        if x.device.type == "cpu" and not torch.compiler.is_exporting():
            return n * h * w >= self.MIN_PIXELS
        return h * w >= self.MIN_IMAGE_PIXELS

    def _readable(self) -> bool:
        """Return whether the conv and its container may be read instead of called."""
        if not (is_plain(self.upsample, nn.Sequential) and len(self.upsample) == 2):
            return False
        doubling, conv = self.upsample
        return is_plain(doubling, nn.Upsample) and is_plain_conv(conv, 3)

    def _hold(self, weight: Tensor) -> None:
        by_additions = _adds(weight)
        with torch.inference_mode(False), torch.no_grad():  # the tensor outlives this pass
            phases = phase_weight(weight)
            held = self._held
            if held is None or not _alike(held.phases, phases):
                held = _Held(phases, weight, by_additions)
            else:
                held.phases.copy_(phases)
        self._held = held._replace(weight=weight, by_additions=by_additions)

    def _phases(self, weight: Tensor) -> Tensor:
        held = self._held
        if not self._holders or held is None or torch.is_grad_enabled():
            return phase_weight(weight)
        current = held.weight is weight and held.by_additions == _adds(weight)
        return held.phases if current else phase_weight(weight)


def phase_weight(weight: Tensor) -> Tensor:
    """(C_out, C_in, 3, 3) -> M w M^T as (C_in, C_out, 4, 4)."""
    if _adds(weight):
        low = weight.dtype in (torch.float16, torch.bfloat16)  # whose sums double the error
        return _added_taps(weight.float() if low else weight).to(weight.dtype)
    c_out, c_in = weight.shape[:2]
    # M[i, j] = 1 where output tap i holds input tap j: i + j is 2 or 3. Made here and no buffer,
    # which a net that was made on the meta device would lack.
    four, three = (torch.arange(size, device=weight.device) for size in (4, 3))
    m = ((four[:, None] + three) // 2 == 1).to(weight.dtype)
    taps = weight.permute(2, 3, 1, 0).reshape(9, c_in * c_out)
    sums = torch.kron(m, m) @ taps  # (16, C_in * C_out)
    return sums.view(4, 4, c_in, c_out).permute(2, 3, 0, 1)


def _adds(weight: Tensor) -> bool:
    """Whether the taps are summed by additions, in fp32."""
    low = weight.dtype in (torch.float16, torch.bfloat16)
    return low or autocast_dtype(weight.device.type) is not None


def _added_taps(weight: Tensor) -> Tensor:
    """M w M^T by additions, which autocast leaves in fp32; channels_last.

    On 2 CPU cores 1.2x slower for the whole layer than the product above. Not that product with
    autocast switched off: torch caches no compiled graph that does so between runs.
    """
    taps = weight.permute(1, 2, 3, 0)  # (C_in, 3, 3, C_out)
    for dim in (1, 2):
        a, b, c = taps.unbind(dim)
        taps = torch.stack((c, b + c, a + b, a), dim)
    return taps.permute(0, 3, 1, 2)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
