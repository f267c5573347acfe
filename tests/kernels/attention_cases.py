"""What attention's test files share: inputs, gradients by name, memory layouts."""

import torch

from ddpm_fast.kernels.attention import op as kernel
from ddpm_fast.kernels.attention.op import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEC = kernel.SPEC
DTYPES = kernel.DTYPES
BF16 = torch.bfloat16

# C, height and width, heads of the tests on the device
SIZES = [
    (64, 4, 1),
    (256, 4, 1),
    (128, 7, 2),
    (256, 8, 4),
    (128, 16, 4),
    (256, 16, 4),
    (256, 16, 2),
]
ON_DEVICE = [
    *(
        (dict(n=3, c=c, h=side, w=side, heads=heads), dtype)
        for c, side, heads in SIZES
        for dtype in DTYPES
    ),
    *((dict(n=4, c=256, h=side, w=side, heads=4), BF16) for side in (4, 16)),
]


def make_qkv(n, c, h, w, heads=1, dtype=torch.float32, seed=0):
    values = {"n": n, "c": c, "h": h, "w": w, "heads": heads}
    return SPEC.make_inputs(values, dtype, DEVICE, seed)["qkv"]


def make_do(qkv, seed=1):
    n, packed, h, w = qkv.shape
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(n, packed // 3, h, w, generator=generator, device=DEVICE).to(qkv.dtype)


def run(function, qkv, heads, do, **options):
    """o, dq, dk, dv."""
    leaf = qkv.detach().requires_grad_()
    o = function(leaf, heads, **options)
    (dqkv,) = torch.autograd.grad(o, leaf, do)
    return [o.detach(), *dqkv.chunk(3, dim=1)]


def fused(qkv, heads, **options):
    return attention(qkv, heads, impl="fused", **options)


def layouts_of(x):
    """x as channels_last, NCHW, channels of a wider map, every other row, a transpose, no batch."""
    last = torch.channels_last
    wide = torch.cat([x, x, x], dim=1).contiguous(memory_format=last)
    tall = torch.zeros(*x.shape[:2], 2 * x.shape[2], x.shape[3], dtype=x.dtype, device=x.device)
    tall = tall.contiguous(memory_format=last)
    tall[:, :, ::2] = x
    return {
        "channels_last": x.contiguous(memory_format=last),
        "nchw": x.contiguous(),
        "channel slice": wide[:, x.shape[1] : 2 * x.shape[1]],
        "every other row": tall[:, :, ::2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "one image for all": x[:1].contiguous(memory_format=last).expand(*x.shape),
    }
