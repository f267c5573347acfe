"""The original repository's claim, 6-7x on 8 RTX 3090 (75-85 %), as a question of bandwidth.

Its benchmark's default is 32 images a GPU, and its DDP holds the averaged weights too, so it sums
twice the gradients' bytes. It claims 500 to 1000 images/s on 8 GPUs: 500 / 7 to 1000 / 6 on one.
source  dongwookim-ml/DDPM, BENCHMARK_README.md and benchmark_gpu_training.py
"""

from __future__ import annotations

from dataclasses import dataclass

from ddpm_fast.scaling.alpha_beta import (
    BACKWARD_SHARE,
    BUCKET_BYTES,
    FIRST_BUCKET_BYTES,
    Link,
    all_reduce_seconds,
    exposed_seconds,
    ready_times,
)
from ddpm_fast.scaling.interconnects import INTERCONNECTS

GPUS, BATCH_PER_GPU = 8, 32
PARAMETERS = 35_746_307
EFFICIENCY = (0.75, 0.85)
IMAGES_PER_S = (500 / 7, 1000 / 6)  # of one GPU: the slowest and the fastest that the claim allows


def even_buckets(total: int) -> list[int]:
    """DDP's buckets for `total` bytes, if parameters could be cut anywhere: an estimate."""
    sizes = [min(FIRST_BUCKET_BYTES, total)]
    while sum(sizes) < total:
        sizes.append(min(BUCKET_BYTES, total - sum(sizes)))
    return sizes


def weak_efficiency(
    *, images_per_s: float, batch: int, gradient_bytes: int, link: Link, n: int = GPUS
) -> float:
    """T_1 / T_n at `batch` images a GPU, for equal ranks; images_per_s is one GPU's."""
    step_s = batch / images_per_s
    backward_s = step_s * BACKWARD_SHARE
    buckets = even_buckets(gradient_bytes)
    bucket_s = [all_reduce_seconds(size, n, link, ("ring",)) for size in buckets]
    exposed = exposed_seconds(bucket_s, ready_times(buckets, backward_s), backward_s)
    return step_s / (step_s + exposed)


@dataclass(frozen=True)
class ClaimHolds:
    """Bus bandwidths, GB/s, at which 8 GPUs reach 75 and 85 % with one GPU at `images_per_s`."""

    images_per_s: float
    gradient_bytes: int
    at_75: float
    at_85: float


def bandwidths(images_per_s: float, *, averaged_weights_too: bool = True) -> ClaimHolds:
    """Where the claim holds: between these bandwidths. Below, less; above, more than 85 %."""
    size = 4 * PARAMETERS * (2 if averaged_weights_too else 1)
    return ClaimHolds(images_per_s, size, *(_bandwidth(images_per_s, size, e) for e in EFFICIENCY))


def _bandwidth(images_per_s: float, size: int, efficiency: float) -> float:
    """By bisection in the logarithm: efficiency grows with bandwidth."""
    alpha_s = INTERCONNECTS["rtx3090-pcie"].hop_s
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = (low * high) ** 0.5
        link = Link(alpha_s=alpha_s, beta_bytes_per_s=middle * 1e9)
        reached = weak_efficiency(
            images_per_s=images_per_s, batch=BATCH_PER_GPU, gradient_bytes=size, link=link
        )
        low, high = (middle, high) if reached < efficiency else (low, middle)
    return high


def in_words() -> str:
    """The claim and the bandwidths under which the model gives it, as lines of text."""
    lines = [
        "The original's claim: 6-7x on 8 RTX 3090 (75-85 % efficiency), 500-1000 images/s.",
        f"By the model (an estimate), at its {BATCH_PER_GPU} images a GPU and fp32 gradients:",
    ]
    for both, what in ((True, "its DDP sums 286 MB, averaged weights too"),
                       (False, "without them, 143 MB")):  # fmt: skip
        for rate in IMAGES_PER_S:
            holds = bandwidths(rate, averaged_weights_too=both)
            lines.append(
                f"  {what}; one GPU at {rate:.0f} images/s: the claim holds for "
                f"{holds.at_75:.2f} to {holds.at_85:.2f} GB/s of bus bandwidth."
            )
    link = INTERCONNECTS["rtx3090-pcie"].link(GPUS)
    shares = [
        weak_efficiency(images_per_s=rate, batch=BATCH_PER_GPU, gradient_bytes=8 * PARAMETERS,
                        link=link)
        for rate in IMAGES_PER_S
    ]  # fmt: skip
    lines.append(
        f"At the {link.beta_bytes_per_s / 1e9:.0f} GB/s assumed for 8 RTX 3090 it gives "
        f"{100 * shares[1]:.0f} to {100 * shares[0]:.0f} %. Data loading and its host sync in "
        "every step are not in the model."
    )
    return "\n".join(lines)
