"""The package's pieces, each run for a moment, up to one training step as the trainer makes it."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from ddpm_fast.doctor.rows import Finding, one_line

# Counter 0,0,0,0 and key 0,0: Random123's kat_vectors, philox4x32-10
PHILOX_ZEROS = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
REINSTALL = "pip install --force-reinstall --no-deps -e ."


def check_extension() -> Finding:
    """Whether ddpm_fast._C loads, and what it was built with."""
    from ddpm_fast.kernels.calling import extension

    if why := extension.why_missing():
        found = f"{why.partition(';')[0]}: plain torch instead"
        return Finding(found, "slower", extension.BUILD_COMMAND)
    info = extension.module().build_info()
    archs = " ".join(info["archs"])
    cuda = f"CUDA {info['cuda_version']} for {archs}" if info["cuda"] else "without CUDA"
    simd = extension.module().cpu.simd_level()
    return Finding(f"{info['version']}, {info['compiler']}, {cuda}; runs {simd} code on the CPU")


def check_impl() -> Finding:
    """Which implementation DDPM_FAST_IMPL chooses."""
    from ddpm_fast.kernels.calling import extension
    from ddpm_fast.kernels.calling.impl import IMPLS
    from ddpm_fast.kernels.calling.target import why_not_fused
    from ddpm_fast.runtime.device import pick_device

    given = os.environ.get("DDPM_FAST_IMPL")
    name = given or "auto"
    source = "from DDPM_FAST_IMPL" if given else "the default"
    if given is not None and given not in IMPLS:
        found = f"DDPM_FAST_IMPL={given!r} must be one of {', '.join(IMPLS)}"
        return Finding(found, "fails", "unset DDPM_FAST_IMPL")
    if name == "reference":
        found = f"{name} ({source}): plain torch everywhere"
        return Finding(found, "slower", "unset DDPM_FAST_IMPL")
    if name == "fused" and extension.why_missing():
        found = f"{name} ({source}), but there is no extension"
        return Finding(found, "fails", extension.BUILD_COMMAND)
    if name == "fused" and (why_not := why_not_fused(pick_device("auto").type)):
        return Finding(f"{name} ({source}): {why_not}", "fails", "unset DDPM_FAST_IMPL")
    return Finding(f"{name} ({source})")


def check_philox() -> Finding:
    """The generator's words against the published vector."""
    import torch

    from ddpm_fast import ops
    from ddpm_fast.kernels.calling import extension

    impls = ["reference"] if extension.why_missing() else ["reference", "fused"]
    for impl in impls:
        words = ops.philox_words(
            torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), impl=impl
        )
        if tuple(words.tolist()) != PHILOX_ZEROS:
            got = " ".join(f"{word:08x}" for word in words.tolist())
            return Finding(f"{impl}: wrong words {got}", "fails", REINSTALL)
    return Finding(f"published vector met: {', '.join(impls)}")


def check_noising() -> Finding:
    """x_t against its formula in fp64, with the generator's own noise."""
    import torch

    from ddpm_fast.diffusion.process import Diffusion

    proc = Diffusion()
    t = torch.tensor([0, 10, 500, 999])
    x_0 = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8)
    x_t, eps = proc.q_sample(x_0, t, seed=1)
    abar_t = proc.alphas_cumprod[t].view(4, 1, 1, 1)
    expected = abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * eps
    error = float((x_t - expected).abs().max())
    if not error <= 1e-5:  # a few roundings of fp32 at |x_t| < 7
        return Finding(f"off its formula by {error:.1e}", "fails", REINSTALL)
    return Finding("x_t as its formula says")


def check_unet() -> Finding:
    """A small U-Net with attention, forward and backward on the CPU."""
    import torch

    from ddpm_fast.nn.unet import UNet

    net = UNet(1, 8, channel_mults=(1, 2), num_res_blocks=1, time_emb_dim=16, num_groups=4,
               attention_resolutions=(1,), dropout=0.1)  # fmt: skip
    x = torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8)
    out = net(x, torch.tensor([0, 500]))
    out.square().mean().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    finite = all(bool(g.isfinite().all()) for g in [out, *gradients])
    if out.shape != x.shape or not gradients or not finite:
        return Finding(f"output {tuple(out.shape)}, finite: {finite}", "fails", REINSTALL)
    return Finding("forward and backward, all finite")


def check_digits() -> Finding:
    """The images of the default run, which come with the package."""
    from ddpm_fast.data import DataError, open_images

    try:
        images = open_images("digits", data_root=".").images
    except (OSError, DataError) as error:
        return Finding(one_line(error), "fails", REINSTALL)
    count, channels, height, width = images.shape
    found = f"{count} images, {channels}x{height}x{width}, {images.dtype}"
    return Finding(found) if images.any() else Finding(f"{found}, empty", "fails", REINSTALL)


def check_checkpoint() -> Finding:
    """Written to a temporary folder, read back, compared."""
    import torch

    from ddpm_fast.checkpoints import own as checkpoint

    weights = {"weight": torch.linspace(-1, 1, 1000)}
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = checkpoint.save(Path(folder), 1, {"model": weights}, {"seed": 0}, keep=1)
            read = checkpoint.load(path).parts["model"]["weight"]
    except (OSError, checkpoint.CheckpointError) as error:
        return Finding(one_line(error), "fails", "export TMPDIR=DIR, a folder with free space")
    if not torch.equal(read, weights["weight"]):
        return Finding("read back other values than written", "fails", REINSTALL)
    return Finding("written and read back")


def check_training_step() -> Finding:
    """One step of the default run, with a small batch, on the device that it would take."""
    from ddpm_fast.runtime.device import pick_device
    from ddpm_fast.train.config import TrainConfig
    from ddpm_fast.train.setup import make_step, open_data

    device = pick_device("auto")
    config = TrainConfig(batch_size=4, iterations=1)
    step = make_step(config, open_data(config, lambda line: None), device)
    start = time.perf_counter()
    step(0)
    loss, healthy = float(step.loss), bool(step.healthy)
    step_ms = 1000 * (time.perf_counter() - start)
    found = f"digits on {device}: loss {loss:.3f}, {step_ms:.0f} ms the first"
    if healthy:
        return Finding(found)
    mend = REINSTALL if device.type == "cpu" else "python -m ddpm_fast.train --device cpu"
    return Finding(f"{found}; not finite", "fails", mend)
