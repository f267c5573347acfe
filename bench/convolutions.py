"""The CIFAR-10 net's convolutions whose cost on a GPU is unknown, as parts to time.

Upsampling at its three sizes, plain or transposed; 3x3 at five shapes; the first convolution and
the last, of 3 channels or padded to 8. cuDNN tries ten algorithms for each by default;
`algorithms(0)` has it try all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.part import Part, dtype_of, forward_and_backward, random_leaf

LIMITS = {"10 algorithms": 10, "all algorithms": 0}  # cuDNN's benchmark_limit; 10 is torch's
UPSAMPLED = ((256, 16), (256, 8), (256, 4))  # channels, side
SHAPES = ((128, 128, 32), (256, 256, 16), (256, 256, 8), (256, 256, 4), (384, 128, 32))
OUTER = (128, 32)
PADDED = 8  # channels that tensor cores take in bf16


@contextmanager
def algorithms(limit: int) -> Iterator[None]:
    """cuDNN's benchmark_limit for shapes that are new within; those it has met keep their choice.

    So a shape that was timed under another limit needs another batch, or another process.
    """
    cudnn = torch.backends.cudnn
    if not cudnn.is_available():
        yield
        return
    before = cudnn.benchmark_limit
    cudnn.benchmark_limit = limit
    try:
        yield
    finally:
        cudnn.benchmark_limit = before


def convolutions(
    device: torch.device, images: int, tiny: bool
) -> dict[str, Callable[[], list[Part]]]:
    """Name -> what makes its forward and its backward pass. tiny: few channels and pixels"""
    outer = (8, 8) if tiny else OUTER
    makers = {
        f"upsample {side}": partial(upsample, device, images, channels, side)
        for channels, side in ([(8, 4)] if tiny else UPSAMPLED)
    }
    makers["first conv"] = partial(first_conv, device, images, *outer)
    makers["last conv"] = partial(last_conv, device, images, *outer)
    for shape in [(8, 8, 8)] if tiny else SHAPES:
        makers[f"3x3 {shape}"] = partial(conv_3x3, device, images, *shape)
    return makers


def upsample(device: torch.device, n: int, channels: int, side: int) -> list[Part]:
    """Nearest-neighbour upsampling and a 3x3 convolution: two ops, or one transposed 4x4 one."""
    dtype, tolerance = dtype_of(device)
    x = random_leaf((n, channels, side, side), device, dtype)
    weight = random_leaf((channels, channels, 3, 3), device, dtype)
    # The taps of a 4x4 kernel at stride 2 that are sums of the 3x3's
    taps = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], device=device).float()

    def plain() -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)

    def transposed() -> Tensor:
        kernel = torch.einsum("ka,oiab,lb->iokl", taps, weight.float(), taps).to(dtype)
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(x, kernel, stride=2, padding=1)

    name = f"upsample {n}x{channels}x{side}x{side}"
    ways = {"plain": plain, "transposed": transposed}
    return forward_and_backward(name, ways, (x, weight), tolerance)


def first_conv(device: torch.device, n: int, channels: int, side: int) -> list[Part]:
    """The net's first convolution, of 3 channels or of PADDED: the images padded in the step, the
    weight too, so that the parameter stays as it is."""
    dtype, tolerance = dtype_of(device)
    x = random_leaf((n, 3, side, side), device, dtype).detach()  # images need no gradient
    weight = random_leaf((channels, 3, 3, 3), device, dtype)
    ways = {
        "plain": lambda: F.conv2d(x, weight, padding=1),
        f"padded to {PADDED} channels": lambda: F.conv2d(
            _padded(x, 1), _padded(weight, 1), padding=1
        ),
    }
    return forward_and_backward(f"first conv {n}x3x{side}x{side}", ways, (weight,), tolerance)


def last_conv(device: torch.device, n: int, channels: int, side: int) -> list[Part]:
    """The net's last convolution, with 3 outputs or with PADDED, of which 3 are kept."""
    dtype, tolerance = dtype_of(device)
    x = random_leaf((n, channels, side, side), device, dtype)
    weight = random_leaf((3, channels, 3, 3), device, dtype)
    ways = {
        "plain": lambda: F.conv2d(x, weight, padding=1),
        f"padded to {PADDED} outputs": lambda: F.conv2d(x, _padded(weight, 0), padding=1)[:, :3],
    }
    name = f"last conv {n}x{channels}x{side}x{side}"
    return forward_and_backward(name, ways, (x, weight), tolerance)


def conv_3x3(device: torch.device, n: int, c_in: int, c_out: int, side: int) -> list[Part]:
    """A 3x3 convolution by cuDNN, in one way only."""
    dtype, tolerance = dtype_of(device)
    x = random_leaf((n, c_in, side, side), device, dtype)
    weight = random_leaf((c_out, c_in, 3, 3), device, dtype)
    ways = {"cuDNN": lambda: F.conv2d(x, weight, padding=1)}
    name = f"3x3 {n}x{c_in}x{side}x{side} to {c_out}"
    return forward_and_backward(name, ways, (x, weight), tolerance)


def _padded(x: Tensor, dim: int) -> Tensor:
    """Pad dimension 0 or 1 with zeros to PADDED; channels_last."""
    more = PADDED - x.shape[dim]
    pad = (0, 0, 0, 0, 0, more) if dim == 1 else (0, 0, 0, 0, 0, 0, 0, more)
    return F.pad(x, pad).contiguous(memory_format=torch.channels_last)
