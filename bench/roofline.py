"""A model of what our kernels and a training step take, beside the least that they can take.

The floor of anything: its least bytes at the copy's rate and its FLOPs at the matrix product's,
the larger (bench/ceilings.py, bench/model_work.py). The prediction, no constant of which has been
measured by this project yet; measured / predicted is its residual:

    a kernel       max(bytes / (REACHED copy), FLOPs / (share product), issue, MUFU) + LAUNCH_MS
    issue          elements INSTRUCTIONS / (128 lanes, SMs, GHZ) / ISSUED, on Hopper only
    MUFU           elements (2 forward, 4 backward) / (16 lanes, SMs, GHZ) / MUFU_USED
    convolutions   of each pass (forward, dgrad, wgrad) the same: share by PRODUCTS, FLOPs as of
                   whole waves of 128 x 128 tiles over the SMs; upsampling is 4/9 of its FLOPs
                   a 1x1 shortcut over x and skip is two products, of which the second reads and
                   writes the first's sum: 2 tensors more forward, dy once more in either gradient
    norms          a kernel of 2 tensors forward, 3 backward; with a block's residual 4 (it reads
                   that, and stores the sum) and 4 (the sum's gradient; the last norm's has none)
    attention      2 products forward and 5 backward by SDPA; dq, dk, dv stacked once
    adds, casts    2 bytes (sum of `_added`'s elements) / (REACHED copy); of each parameter a bf16
                   copy and its gradient's fp32 one, in CASTS launches of CAST_MS
    optimizer      clip, AdamW and EMA by torch: 52 bytes a parameter in 35 launches
    other          SMALL_MS: small kernels, gaps in the graph
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn

from bench.ceilings import Ceilings
from bench.model_work import FLOPS_OF_FORWARD, NORM_PASSES, OPTIMIZER_BYTES, work_of
from bench.original_unet import OriginalUNet
from bench.subjects import dtype_for
from ddpm_fast.kernels import SPECS
from ddpm_fast.kernels.spec import KernelSpec
from ddpm_fast.nn.config import UNetConfig

# Not yet measured, all of it: estimates from compiled code and from others' reports of Hopper GPUs.
# CASTS alone is counted, in the compiled step's graphs.
REACHED, ISSUED, MUFU_USED = 0.87, 0.75, 0.85  # of the ceiling of that name
GHZ, ISSUE_LANES, MUFU_LANES = 1.85, 128, 16  # of an SM
LAUNCH_MS, CAST_MS, SMALL_MS = 0.003, 0.001, 0.8
CASTS = 165 + 196  # of weights and vectors: docs/kernels_per_step.md
PRODUCTS = {"wide": 0.80, "narrow": 0.70, "strided": 0.45}  # narrow: below 256 channels
WGRAD_LESS = 0.12
SDPA = (0.69, 0.43)  # cuDNN's, forward and backward
OUR_ATTENTION = 0.28
# Instructions an element by (channels, pixels, kind) of a norm, forward and backward; compiled for
# sm_90. Of others they are not counted, and have no such term.
INSTRUCTIONS = {
    (128, 1024, ""): (14, 37), (128, 1024, "dropout"): (31, 66), (384, 1024, ""): (35, 58),
    (256, 1024, ""): (18, 43), (256, 256, "dropout"): (30, 47), (256, 256, "linear"): (8, 18),
    (384, 256, ""): (30, 67), (512, 256, ""): (18, 34),
}  # fmt: skip
PARTS = ("convolutions", "norms", "attention", "adds, casts", "optimizer", "other")
TRAINING = "training step"
NORM, ATTENTION = (
    next(spec for spec in SPECS if spec.name == name) for name in ("group_norm_silu", "attention")
)


@dataclass(frozen=True)
class Device:
    """sms: 0 if unknown, or not Hopper's: then no term counts issue slots or waves."""

    name: str
    ceilings: Ceilings
    source: str
    sms: int = 0


_GIVEN = "given, not measured here"
GIVEN = {
    "H100": Device("H100", Ceilings(3000.0, 798.0), _GIVEN, 132),
    "H200": Device("H200", Ceilings(4300.0, 790.0), _GIVEN, 132),
}


@dataclass(frozen=True)
class Row:
    """A kernel's pass or a training step.

    floor, predicted  ms of each part; a kernel has the one part ""
    terms             ms of a kernel were each term the only one
    measured          ms of each part of a step, if its kernels were profiled
    """

    name: str
    floor: Mapping[str, float]
    predicted: Mapping[str, float]
    terms: Mapping[str, float] = field(default_factory=dict)
    measured_ms: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def floor_ms(self) -> float:
        return sum(self.floor.values())

    @property
    def predicted_ms(self) -> float:
        return sum(self.predicted.values())

    @property
    def residual(self) -> float | None:
        return self.measured_ms / self.predicted_ms if self.measured_ms else None


def terms_ms(
    device: Device,
    moved: float,
    flops: float = 0,
    share: float = 1.0,
    issue: tuple[int, int, int] = (0, 0, 0),
) -> dict[str, float]:
    """What each term alone takes. issue: elements, instructions and MUFU operations of each."""
    elements, instructions, mufu = issue
    found = {"traffic": device.ceilings.floor_ms(moved, 0) / REACHED, "launch": LAUNCH_MS}
    if flops:
        found["products"] = device.ceilings.floor_ms(0, flops) / share
    if device.sms and instructions:
        per_ms = device.sms * GHZ * 1e6 / elements
        found["issue"] = instructions / (ISSUE_LANES * per_ms) / ISSUED
        found["MUFU"] = mufu / (MUFU_LANES * per_ms) / MUFU_USED
    return found


def kernel_ms(terms: Mapping[str, float]) -> float:
    return terms["launch"] + max(ms for term, ms in terms.items() if term != "launch")


def kernels(device: Device, measured: Mapping[str, float]) -> list[Row]:
    """Every large case of every kernel. measured: milliseconds by name, such as
    "dropout 256x128x32x32 bfloat16 forward"."""
    found = []
    for spec in SPECS:
        dtype = str(dtype_for(spec, torch.device("cuda"))).removeprefix("torch.")
        for case, which in product(spec.cases, ("forward", "backward")):
            floor_ms, terms = _of_pass(device, spec, case.values, which == "backward")
            if floor_ms and not case.small:
                name = f"{spec.name} {case.name} {dtype} {which}"
                row = Row(name, {"": floor_ms}, {"": kernel_ms(terms)}, terms, measured.get(name))
                found.append(row)
    return found


def _of_pass(
    device: Device,
    spec: KernelSpec,
    values: Mapping[str, Any],
    backward: bool,
    share: float = OUR_ATTENTION,
) -> tuple[float, dict[str, float]]:
    """A floor, 0 if there is no such pass, and the terms; values: a Case's."""
    moved = spec.bytes_moved(values, dtype_for(spec, torch.device("cuda")), backward)
    flops, issue = spec.flops(values, backward), (0, 0, 0)
    if spec is NORM:
        channels, hw = values["c1"] + values.get("c2", 0), values["hw"]
        linear = values.get("activation", "silu") is None
        kind = "dropout" if values.get("dropout") else "linear" if linear else ""
        counted = INSTRUCTIONS.get((channels, hw, kind), (0, 0))[backward]
        issue = (values["n"] * hw * channels, counted, 0 if linear else (2, 4)[backward])
    return device.ceilings.floor_ms(moved, flops), terms_ms(device, moved, flops, share, issue)


def step(
    device: Device, config: UNetConfig, side: int, batch: int, row: Mapping[str, Any] | None = None
) -> Row:
    """A training step of our net, compiled and captured, in bf16; its floor is ModelWork's.

    row  a suite's, with its ms, and the kernels of its profile if it has one
    """
    work, ceilings, shapes = work_of(config, side), device.ceilings, _shapes(config, side)
    flops = FLOPS_OF_FORWARD[TRAINING] * batch * work.flops
    heads = sum(4 * each[0] * each[1] ** 2 for part, each in shapes if part == "attention")
    heads *= FLOPS_OF_FORWARD[TRAINING] * batch
    normed = NORM_PASSES[TRAINING] * batch * work.norm_elements * 2
    floor = {
        "convolutions": ceilings.floor_ms(0, flops - heads),
        "norms": ceilings.floor_ms(normed, 0),
        "attention": ceilings.floor_ms(0, heads),
        "optimizer": ceilings.floor_ms(OPTIMIZER_BYTES * work.parameters, 0),
    }
    predicted = dict.fromkeys(PARTS, 0.0)
    for part, shape in shapes:
        predicted[part] += _MODELS[part](device, batch, *shape)
    predicted["adds, casts"] += _traffic_ms(device, 1, 6 * work.parameters) + CASTS * CAST_MS
    predicted["optimizer"] = _traffic_ms(device, 1, 26 * work.parameters) + 35 * LAUNCH_MS
    predicted["other"] = SMALL_MS
    measured_ms, profile = (row["ms"], row.get("profile")) if row else (None, None)
    parts = parts_of_profile(profile["kernels"], measured_ms) if profile else {}
    return Row(f"batch {batch}", floor, predicted, {}, measured_ms, parts)


@functools.cache
def _shapes(config: UNetConfig, side: int) -> list[tuple[str, tuple]]:
    """(part, what its model takes behind the batch), by a forward of the plain net on torch's meta
    device; pixels and elements are an image's."""
    found: list[tuple[str, tuple]] = []

    def summed_by(name: str) -> tuple[int, bool]:
        """Channels of the residual that a norm adds, and whether others read the sum too."""
        if name.endswith("attention.norm"):
            return net.get_submodule(name).num_channels, True
        of_block = name.endswith("norm_1")
        layer = net.get_submodule(name.removesuffix(".norm_1"))
        last = before.get(layer)
        summed = last.conv_2[1].out_channels if hasattr(last, "norm_1") else 0
        return summed, of_block

    def note(name: str, module: nn.Module, x: torch.Size, y: torch.Size) -> None:
        pixels, up = x[2:].numel(), ".upsample." in name
        if isinstance(module, nn.Conv2d):
            read = pixels // 4 if up else pixels  # the upsampled image is never made
            shape = (x[1], y[1], module.kernel_size[0], read, y[2:].numel(), name == "init_conv")
            split = name.startswith("ups.") and name.endswith("residual_connection")
            found.append(("convolutions", (*shape, split)))
        elif isinstance(module, nn.GroupNorm):
            dropout = config.dropout if name.endswith("norm_2") else 0.0
            act = None if name.endswith("attention.norm") else config.activation
            found.append(("norms", (x[1], pixels, dropout, act, *summed_by(name))))
        elif hasattr(module, "to_qkv"):
            found.append(("attention", (x[1], pixels)))
        reader = readers.get(module, module)
        found.append(("adds, casts", (_added(name, module, x.numel(), y.numel(), reader),)))

    with torch.device("meta"), torch.no_grad():
        net = OriginalUNet(config).eval()
        layers = [*net.downs, *net.mid, *net.ups, net.out_norm]
        readers = dict(itertools.pairwise(layers))
        before = dict(zip(layers[1:], layers, strict=False))
        for name, module in net.named_modules():
            module.register_forward_hook(
                lambda module, inputs, y, name=name: note(name, module, inputs[0].shape, y.shape)
            )
        net(torch.empty(1, config.img_channels, side, side), torch.zeros(1))
    return found


def _sums(layer: nn.Module) -> bool:
    """Whether a layer begins with a norm, which adds up the block's output before it."""
    return hasattr(layer, "norm_1") or isinstance(layer, nn.GroupNorm)


def _added(name: str, module: nn.Module, x: int, y: int, reader: nn.Module) -> int:
    """Elements that passes between the kernels read and write, forward and backward, for a module
    that takes x and makes y.

    reader  the layer that takes a layer's output

    h + residual before an up- or downsampling: 3, and to sum the moved bias's gradient. A
    convolution's own bias: 2, and to sum its gradient; a shortcut's is the product's. Gradients,
    added in one pass: a skip's three or, where no norm has stored it, four; an upsampled image's
    two.
    """
    if isinstance(module, nn.Conv2d):
        if name.endswith(("conv_1", "conv_2.1", "to_out")):  # the next norm adds the bias
            return 0
        if name.endswith("residual_connection"):
            return y
        return (3 + 5 * (name == "init_conv")) * y
    if hasattr(module, "norm_1"):
        parts = module.attention, module.residual_connection
        biased = hasattr(parts[0], "to_out") or isinstance(parts[1], nn.Identity)
        of_sum = 0 if _sums(reader) else 3 + biased
        return (of_sum + 4 * name.startswith("downs.")) * y
    if hasattr(module, "downsample"):  # padded, and its gradient cut
        return 5 * y + 4 * x * module.asymmetric
    return 3 * y if hasattr(module, "upsample") else 0


def convolution_ms(
    device: Device,
    batch: int,
    c_in: int,
    c_out: int,
    size: int,
    hw_in: int,
    hw_out: int,
    first: bool,
    split: bool = False,
) -> float:
    weights, up = c_in * c_out * size**2, hw_out > hw_in
    flops = 2 * batch * weights * hw_out * (4 / 9 if up else 1)
    moved = 2 * (batch * (c_in * hw_in + c_out * hw_out) + weights)
    share = PRODUCTS["wide" if min(c_in, c_out) >= 256 else "narrow"]
    forward, dgrad = (PRODUCTS["strided"] if each else share for each in (up, hw_out < hw_in))
    waves = functools.partial(_whole_waves, device.sms)
    passes = [
        (forward, waves(batch * hw_out, c_out), 2),
        (share - WGRAD_LESS, waves(c_in * size**2, c_out, split=True), 1),
    ]
    if not first:  # images need no gradient
        passes.append((dgrad, waves(batch * hw_in, c_in), 1))
    again = split * 2 * batch * c_out * hw_out
    return sum(
        kernel_ms(terms_ms(device, moved + more * again, flops * whole, reached))
        for reached, whole, more in passes
    )


def _whole_waves(sms: int, m: int, n: int, *, split: bool = False) -> float:
    """SMs' time over what the (m, n) product's tiles fill; split: over the long sum as well."""
    tiles = math.ceil(m / 128) * math.ceil(n / 128)
    tiles *= max(1, sms // tiles) if split else 1
    return math.ceil(tiles / sms) * sms / tiles if sms else 1.0


def _norm_ms(
    device: Device,
    batch: int,
    channels: int,
    hw: int,
    dropout: float,
    act: str | None,
    summed: int,
    kept: bool,
) -> float:
    c1 = summed or channels
    values = {"n": batch, "c1": c1, "c2": channels - c1, "hw": hw, "dropout": dropout}
    values |= {"activation": act}
    return sum(
        kernel_ms(_of_pass(device, NORM, {**values, "residual": adds}, back)[1])
        for back, adds in ((False, bool(summed)), (True, bool(summed) and kept))
    )


def _attention_ms(device: Device, batch: int, channels: int, tokens: int) -> float:
    values = {"n": batch, "c": channels, "h": tokens, "w": 1, "heads": 1}
    passes = [_of_pass(device, ATTENTION, values, i == 1, SDPA[i])[1] for i in (0, 1)]
    stacked = 6 * channels * tokens if tokens > 64 else 0
    return sum(map(kernel_ms, passes)) + _traffic_ms(device, batch, stacked)


def _traffic_ms(device: Device, batch: int, elements: int) -> float:
    return terms_ms(device, 2 * batch * elements)["traffic"]


_MODELS = {
    "convolutions": convolution_ms, "norms": _norm_ms, "attention": _attention_ms,
    "adds, casts": _traffic_ms,
}  # fmt: skip

# The first pattern that a kernel's name holds. A kernel by Inductor is called by all that it fuses,
# as may be a product's way of adding up.
_KERNEL_NAMES = (
    ("adds, casts", r"^triton_(?!tem)"),
    ("optimizer", r"adam|lerp|multi_tensor|^(norm|outcome|update)_kernel"),
    ("attention", r"sdpa|flash|fmha|attention"),
    ("norms", r"group_?norm"),
    ("adds, casts", r"at::native|elementwise|memcpy"),
    ("convolutions", r"conv|cudnn|cutlass|xmma|gemm|gemv|nvjet|cublas|[wd]grad|fprop|nhwc|splitk"),
)


def parts_of_profile(kernels: Iterable[Mapping[str, Any]], step_ms: float) -> dict[str, float]:
    """Milliseconds by PARTS, without those that have none, of a step's kernels, each with its name
    and its us a step; what no kernel fills of the step is other."""
    found = dict.fromkeys(PARTS, 0.0)
    for kernel in kernels:
        name = kernel["name"].lower()
        part = next((part for part, words in _KERNEL_NAMES if re.search(words, name)), "other")
        found[part] += kernel["us"] / 1e3
    found["other"] += max(0.0, step_ms - sum(found.values()))
    return {part: ms for part, ms in found.items() if ms}
