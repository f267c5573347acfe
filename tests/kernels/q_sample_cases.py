"""What q_sample's test files share: images, times, how near is near."""

import torch
from torch import Tensor

from ddpm_fast import ops
from tests.kernels.diffusion_cases import IMPLS

TARGETS = ("eps", "x_0", "v")
# Whole quads of elements, none, rows of 1 and of 7, one element, more than a thread's share.
SHAPES = [(4, 3, 8, 8), (3, 3, 5, 7), (2, 1, 3, 1), (1, 1, 1, 1), (5, 2, 1, 9), (2, 3, 96, 97)]
NOISE_ATOL = 2e-6  # of the drawn normals; the formula adds roundings of values below 8
# One rounding of a value below 8 to 16 bits, to either side.
ATOL = {torch.float32: NOISE_ATOL, torch.bfloat16: 2**-5, torch.float16: 2**-8}


def pixels(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def both(*arguments, **options) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    fused, reference = (ops.q_sample(*arguments, **options, impl=impl) for impl in IMPLS)
    assert [(y.dtype, y.shape, y.stride()) for y in fused] == [
        (y.dtype, y.shape, y.stride()) for y in reference
    ]
    return fused, reference


def assert_near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]):
    for y, wanted in zip(found, expected, strict=True):
        atol = ATOL.get(wanted.dtype, 0)
        torch.testing.assert_close(y.double(), wanted.double(), rtol=0, atol=atol)
