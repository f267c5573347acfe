"""Launches of `pytest -m gpu` and of the GPU suite, bound as on an H100, compiled and not run.

    python launched_kernels.py OUT JOBS     with 0 jobs nothing is compiled

Launch code runs on tensors without memory, Triton's own binder says what it asks for, and that is
compiled. OUT: {"kernels": how many, "violations": {kernel: [...]}, "num_stages": {module: [...]},
"unbound": launches of the presets, as offline.py compiles them, that no launch code asks for}. A
process of its own, because its launches never run and TRITON_INTERPRET=1 in the tests' environment
replaces the compiler.
"""

import itertools
import json
import multiprocessing
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ddpm_fast.kernels.adamw_ema import op as adamw_ema
from ddpm_fast.kernels.attention import op as attention
from ddpm_fast.kernels.group_norm_silu import op as group_norm_silu
from ddpm_fast.kernels.tuning import binding, offline
from ddpm_fast.nn import norm
from ddpm_fast.nn.config import PRESETS, preset
from ddpm_fast.nn.unet import UNet
from tests.kernels.attention_cases import ON_DEVICE as ATTENTIONS
from tests.kernels.group_norm_silu_cases import ON_DEVICE as NORMS

ARCH = 90
META = "meta"
# tests/train/test_step_gpu.py: the width of the cifar10 preset's attention
WIDE = dict(base_channels=256, channel_mults=(1,), attention_resolutions=(0,), num_groups=32)
# Heads of 128 channels and rows that do not fill their blocks: images, C, height and width, heads
OTHER_ATTENTIONS = [(2, 256, 8, 2), (2, 256, 7, 1), (2, 256, 10, 2), (2, 256, 10, 1)]


def run_cases():
    """The kernels' tests and the suite's kernels stage."""
    for spec, cases in ((group_norm_silu.SPEC, NORMS), (attention.SPEC, ATTENTIONS)):
        large = [(case.values, torch.bfloat16) for case in spec.cases if not case.small]
        for values, dtype in (*cases, *large):
            both_passes(spec.fused, spec.make_inputs(values, dtype, META, 0))
    for n, c, side, heads in OTHER_ATTENTIONS:
        qkv = torch.empty(n, 3 * c, side, side, dtype=torch.bfloat16, device=META)
        attention.attention(qkv, heads, impl="fused")
        if (c // heads, side) != (256, 10):  # the backward pass of this one is not ours
            both_passes(attention.SPEC.fused, {"qkv": qkv.requires_grad_(), "num_heads": heads})
    for case in adamw_ema.SPEC.cases:
        inputs = adamw_ema.SPEC.make_inputs(case.values, torch.float32, META, 0)
        for skip, refused in itertools.product((True, False), (None, torch.zeros((), device=META))):
            weights = inputs["ema_weights"]
            tables = adamw_ema.Tables(inputs["sizes"], len(weights), torch.zeros(4, device=META))
            tables.launch(weights, max_norm=1.0, skip_nonfinite=skip, refused=refused)


def both_passes(function, inputs):
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs])


class Launching(TorchDispatchMode):
    """Runs the launch code of our ops on tensors like theirs, but without memory."""

    LAUNCHES = {
        torch.ops.ddpm_fast.group_norm_silu.default: group_norm_silu.launch_forward,
        torch.ops.ddpm_fast.group_norm_silu_backward.default: group_norm_silu.launch_backward,
        torch.ops.ddpm_fast.attention_forward.default: attention.launch_forward,
        torch.ops.ddpm_fast.attention_backward.default: attention.launch_backward,
    }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if launch := self.LAUNCHES.get(function):
            with _disable_current_modes():
                launch(*map(without_memory, args))
        return function(*args, **(kwargs or {}))


def without_memory(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)


def run_nets():
    """Training and sampling of the presets, and the step of tests/train/test_step_gpu.py."""
    digits = {**PRESETS["digits"], "dropout": 0.1}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for config in (digits, {**digits, **WIDE}):
            run_net(UNet(**config), 8, 16, dtype, train=True)
            run_net(UNet(**config), 4, 16, dtype, train=False)
    for name, images in itertools.product(("cifar10", "seed-cifar10"), (1, 128, 512)):
        run_net(UNet.from_config(preset(name)), images, 32, torch.bfloat16, train=True)
    for images in (1, 16, 256):
        run_net(UNet.from_config(preset("cifar10")), images, 32, torch.bfloat16, train=False)


def run_net(net, images, side, dtype, train):
    net = net.train(train)  # its weights' layout does not change ours
    x = torch.empty(images, net.config.img_channels, side, side)
    x, low = x.to(memory_format=torch.channels_last), dtype != torch.float32
    autocast = torch.autocast("cpu", dtype if low else torch.bfloat16, enabled=low)
    with autocast, torch.set_grad_enabled(train):
        eps = net(x, torch.zeros(images).long())
    if train:
        eps.float().sum().backward()


def pretend_cuda():
    """The choices that are made on CUDA, of tensors that are not there."""
    for module in (group_norm_silu, attention, adamw_ema):
        module.why_not_fused = lambda device_type: None
    group_norm_silu.runs_fused = norm.runs_fused = lambda impl, x: True
    attention._path = lambda impl, qkv, head_dim: (
        "triton"
        if impl == "fused"
        else attention.choose(
            qkv.shape[2] * qkv.shape[3],
            head_dim,
            qkv.requires_grad and torch.is_grad_enabled(),
            "cuda",
            dtype=qkv.dtype,
            arch=ARCH,
        )[0]
    )
    torch.Generator = NoGenerator


class NoGenerator:
    """The meta device has none and needs none."""

    def __init__(self, device):
        pass

    def manual_seed(self, seed):
        return None


KERNELS = []  # a kernel cannot be handed to another process, but it is there after a fork


def misfits(index):
    return KERNELS[index].misfits()


def compiled(jobs):
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        rows = pool.map(misfits, range(len(KERNELS)), chunksize=1)
    return {bound.name: row for bound, row in zip(KERNELS, rows, strict=True) if row}


def main(out, jobs):
    found = binding.record(ARCH)
    pretend_cuda()
    run_cases()
    with FakeTensorMode(), Launching():
        run_nets()
    KERNELS.extend(found.values())
    presets = [launch for _, launch, _ in offline.collect([ARCH], offline.triton_kernels())]
    unbound = [x.name for x in presets if binding.key_of(x, ARCH) not in found]
    num_stages = defaultdict(set)
    for bound in KERNELS:
        module = bound.source.fn.fn.__module__.removeprefix("ddpm_fast.kernels.")
        num_stages[module].add(bound.options.num_stages)
    result = {
        "kernels": len(KERNELS),
        "violations": compiled(int(jobs)) if int(jobs) else None,
        "num_stages": {module: sorted(found) for module, found in num_stages.items()},
        "unbound": unbound,
    }
    Path(out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
