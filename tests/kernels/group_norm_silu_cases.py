"""What group_norm_silu's test files share: cases, results and gradients, how near is near."""

import torch

from ddpm_fast.kernels.group_norm_silu import op as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEC = kernel.SPEC
SMALL = [case for case in SPEC.cases if case.small]
# Large enough for the statistics to be cut up, for a concat seam inside a group, and odd.
EVERYTHING = dict(
    n=2, c1=20, c2=4, hw=49, groups=2, scale=True, shift=True, add=True, residual=True, dropout=0.3
)

GRAPHS = [EVERYTHING, {**EVERYTHING, "n": 1, "hw": 1024}]
ANY_NUMBER = [
    dict(n=n, c1=c1, c2=c2, hw=hw, groups=8, add=True)
    for n in (1, 2, 3, 16, 17, 512)
    for hw, c1, c2 in ((1, 32, 0), (16, 256, 256), (49, 24, 24), (1024, 128, 0))
]


def few_images(case):
    """A case's values; fp64 references of 256 images would not be quick."""
    return {**case.values, "n": min(case.values["n"], 16)}


# Values and dtypes of the tests on the device
ON_DEVICE = [
    *((few_images(case), dtype) for case in SPEC.cases for dtype in SPEC.tolerance),
    *((values, torch.bfloat16) for values in ANY_NUMBER),
    *((values, torch.float32) for values in GRAPHS),
    ({**EVERYTHING, "n": 64, "hw": 1024}, torch.bfloat16),
]


def doubled(inputs):
    """The same inputs as fp64 leaves."""
    return {
        name: v.detach().double().requires_grad_() if is_leaf(v) else v
        for name, v in inputs.items()
    }


def is_leaf(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def results(function, inputs, seed=0):
    """Outputs and gradients, by name, for random output gradients."""
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    loss = 0
    for y in outputs:
        dy = torch.randn(y.shape, generator=generator, device=DEVICE).to(inputs["x"].dtype)
        loss = loss + (y.double() * dy.double()).sum()
    loss.backward()
    found = dict(zip(("y", "sum"), outputs, strict=False))
    found |= {f"d{name}": v.grad for name, v in inputs.items() if is_leaf(v)}
    return {name: value.detach() for name, value in found.items()}


def distances(inputs):
    """Relative L2 distance of each output and gradient of our kernel to the fp64 reference."""
    expected = results(SPEC.reference, doubled(inputs))
    found = results(SPEC.fused, inputs)
    assert found.keys() == expected.keys()
    return {
        name: ((found[name].double() - e).norm() / e.norm().clamp_min(1e-30)).item()
        for name, e in expected.items()
    }


def check(values, dtype, seed=0, tolerance=None):
    inputs = SPEC.make_inputs(values, dtype, DEVICE, seed)
    far = distances(inputs)
    tolerance = tolerance or SPEC.tolerance[dtype]
    assert max(far.values()) < tolerance, far
