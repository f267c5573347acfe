"""Count the kernels of a compiled training step from its AOT graphs, forward and backward.

Writes the table of docs/kernels_per_step.md:  python -m bench.kernels_per_step --write
No GPU: nothing is run. The net is traced in bf16 autocast on CPU tensors, with the ops and the
attention that an H100 or H200 would take.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.fx import GraphModule, Node

from bench.arguments import ArgumentParser

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels_per_step.md"
MARKS = ("<!-- table: python -m bench.kernels_per_step --write -->\n", "<!-- end -->\n")
SMALLEST_IMAGE = 2048  # numbers; 4x4 pixels of 128 channels
BATCH = 100  # divides no width, so that a tensor's first dimension tells images from weights

# What only changes how memory is read, or makes no tensor.
_VIEWS = {
    "view", "_unsafe_view", "permute", "t", "transpose", "expand", "unsqueeze", "squeeze", "select",
    "slice", "split", "split_with_sizes", "unbind", "alias", "detach", "getitem", "as_strided",
    "sym_size", "lift_fresh_copy",
}  # fmt: skip
_KINDS = {
    "products": {"mm", "addmm", "bmm", "baddbmm", "linear"},
    "casts": {"_to_copy", "convert_element_type"},
    "reductions": {"sum", "mean", "amax"},
    "attention": {
        "attention_forward", "attention_backward", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    },
    "norms": {"group_norm_silu", "group_norm_silu_backward"},
    "copies": {
        "cat", "stack", "clone", "copy", "copy_", "constant_pad_nd", "slice_backward", "full",
        "select_backward", "zeros", "arange", "select_scatter", "slice_scatter",
    },
}  # fmt: skip
ROWS = (
    "convolutions", "products", "norms", "attention", "casts",
    "adds and other pointwise", "reductions", "copies",
)  # fmt: skip


class _TracedError(Exception):
    """Ends the call once its graphs are traced; nothing runs."""


def count(preset: str = "cifar10") -> dict[str, Counter[tuple[str, bool]]]:
    """{"forward": ..., "backward": ...}: numbers by kind and by whether images are passed over."""
    forward, backward = _graphs(preset)
    return {"forward": _count(forward), "backward": _count(backward)}


def _graphs(preset: str) -> tuple[GraphModule, GraphModule]:
    """The two AOT graphs of the training net, as Inductor's partitioner cuts them."""
    os.environ.setdefault("TRITON_INTERPRET", "1")  # lets CPU tensors take our kernels
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    from ddpm_fast.kernels.attention import op as attention
    from ddpm_fast.nn.unet import UNet

    found: list[tuple[GraphModule, GraphModule]] = []

    def partition(joint, inputs, **options):
        found.append(min_cut_rematerialization_partition(joint, inputs, **options))
        raise _TracedError

    def path(impl: str, qkv: torch.Tensor, head_dim: int) -> str:
        tokens = qkv.shape[2] * qkv.shape[3]
        return attention.choose(tokens, head_dim, True, "cuda", dtype=qkv.dtype)[0]

    net = UNet.from_preset(preset, impl="fused").to(memory_format=torch.channels_last)
    size = (BATCH, net.img_channels, net.image_size, net.image_size)
    x = torch.zeros(size).contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lambda graph, _: graph, partition_fn=partition)
    with mock.patch.object(attention, "_path", path), torch.autocast("cpu", torch.bfloat16):
        try:
            torch.compile(net, backend=backend, fullgraph=True)(x, torch.arange(BATCH))
        except Exception:
            if not found:
                raise
    return found[0]


def _count(graph: GraphModule) -> Counter[tuple[str, bool]]:
    counts: Counter[tuple[str, bool]] = Counter()
    for node in graph.graph.nodes:
        if node.op == "call_function":
            of_images = any(map(_is_of_images, (node, *node.all_input_nodes)))
            for kind, number in _kernels(node).items():
                counts[kind, of_images] += number
    return counts


def _is_of_images(node: Node) -> bool:
    """Whether it makes a tensor of the batch's pixels, (N, C, H, W) or (N H W, C)."""
    made = node.meta.get("val")
    tensors = made if isinstance(made, (tuple, list)) else (made,)
    return any(
        isinstance(t, torch.Tensor)
        and t.ndim > 1
        and t.shape[0] % BATCH == 0
        and t.numel() >= BATCH * SMALLEST_IMAGE
        for t in tensors
    )


def _kernels(node: Node) -> dict[str, int]:
    """The kernels that one op of the graph takes, by kind."""
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    if name in _VIEWS:
        return {}
    if name == "convolution":
        return {"convolutions": 1, "adds and other pointwise": int(node.args[2] is not None)}
    if name == "convolution_backward":
        of_input, of_weight, of_bias = node.args[-1]
        return {"convolutions": of_input + of_weight, "reductions": int(of_bias)}
    for kind, names in _KINDS.items():
        if name in names:
            return {kind: 1}
    return {"adds and other pointwise": 1}


def table(counts: dict[str, Counter[tuple[str, bool]]]) -> str:
    columns = [(way, of_images) for of_images in (True, False) for way in counts]
    titles = [f"{way}, {'images' if images else 'weights and vectors'}" for way, images in columns]
    lines = ["| kind | " + " | ".join(titles) + " | all |", "|---" * (len(columns) + 2) + "|"]
    for row in (*ROWS, "all"):
        kinds = ROWS if row == "all" else (row,)
        numbers = [sum(counts[way][kind, images] for kind in kinds) for way, images in columns]
        lines.append("| " + " | ".join(map(str, (row, *numbers, sum(numbers)))) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = ArgumentParser(prog="python -m bench.kernels_per_step", description=__doc__)
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    arguments = parser.parse_args()
    made = table(count(arguments.preset))
    print(made, end="")
    if arguments.write:
        before, rest = PAGE.read_text().split(MARKS[0])
        PAGE.write_text(before + MARKS[0] + made + MARKS[1] + rest.split(MARKS[1])[1])


if __name__ == "__main__":
    main()
