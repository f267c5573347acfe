"""What posterior_step's test files share: every rule's options, inputs, how near is near."""

import torch
from torch import Tensor

from ddpm_fast.kernels.posterior_step import op as kernel
from tests.kernels.diffusion_cases import ABAR, COUNTERS

PREDICTIONS = ("eps", "x_0", "v")
SHAPES = [(4, 3, 8, 8), (3, 3, 5, 7), (2, 1, 3, 1), (1, 1, 1, 1), (5, 2), (2, 3, 9), (2, 3, 97, 96)]
# 2e-6 of the drawn normals and a few fp32 roundings, each relative to the largest value.
TOLERANCE = 3e-6
DTYPE_TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit in the last place
NOISES = [
    {}, {"variance": "fixed_small"}, {"variance": "learned"}, {"variance": "learned_range"},
    {"eta": 0.0}, {"eta": 0.7}, {"eta": 1.0, "variance": "learned"},
    {"eta": 0.3, "recompute_eps": False},
]  # fmt: skip
CLIPS = [{}, {"clip": False}, {"dynamic_threshold": 0.9}, {"dynamic_threshold": 1.0}]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def output_like(x_t: Tensor, variance: str = "fixed_large", seed: int = 1) -> Tensor:
    """A net's output; the second half, if any, in [-1, 1]."""
    output = normal(*x_t.shape, seed=seed)
    if not variance.startswith("learned"):
        return output
    return torch.cat([output, normal(*x_t.shape, seed=seed + 1).clamp(-1, 1)], dim=1)


def inputs(*shape: int, **options) -> dict:
    x_t = normal(*shape)
    output = output_like(x_t, options.get("variance", "fixed_large"))
    given = {"x_t": x_t, "model_output": output, "alphas_cumprod": ABAR, "t": 400}
    return given | COUNTERS | options


def exact(arguments: dict) -> tuple[Tensor, ...]:
    """The reference in fp64."""
    return kernel.reference(
        **{
            k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()
            if k != "impl"
        }
    )


def assert_near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]):
    for y, wanted in zip(found, expected, strict=True):
        tolerance = TOLERANCE + DTYPE_TOLERANCE.get(y.dtype, 0)
        scale = wanted.double().abs().max().clamp(min=1) if wanted.numel() else 1
        assert ((y.double() - wanted.double()).abs() <= tolerance * scale).all()


def assert_near_exact(found: tuple[Tensor, ...], arguments: dict):
    """As assert_near, but x_0's scale is what it is before the clamp: the difference of two terms
    157 times as large as x_t and the output at t = 999."""
    expected = exact(arguments)
    unclipped = exact(arguments | {"clip": False, "dynamic_threshold": None})[1].abs()
    scale = unclipped.flatten(1).amax(1).clamp(min=1).view(-1, *[1] * (unclipped.dim() - 1))
    assert_near(found[:1] + found[2:], expected[:1] + expected[2:])
    assert ((found[1].double() - expected[1]).abs() <= TOLERANCE * scale).all()


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
