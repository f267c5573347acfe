"""t(S, n) = base + 2 (n - 1) (alpha + S / (n beta)) for a ring; a step hides what it can of it.

n ranks, S bytes, alpha seconds a hop, beta bytes/s a link and direction: the "bus bandwidth" of
nccl-tests. A bucket's all-reduce starts when its gradients are there and the one before is done.
source  Thakur et al. 2005 (ring); Sanders et al. 2009 (two trees); Li et al. 2020 (DDP's buckets)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20  # torch DDP's defaults
TREE_CHUNK_BYTES = 2**18  # NCCL's tree latency is that of a 256 KB chunk (src/graph/tuning.cc)
BACKWARD_SHARE = 2 / 3  # of forward + backward, by FLOPs; workers measure it


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins the ranks of one all-reduce.

    alpha_s            seconds a hop;  base_s  seconds a collective
    beta_bytes_per_s   bytes a second and direction
    raises  ValueError  a bandwidth or latency that no link has
    """

    alpha_s: float
    beta_bytes_per_s: float
    base_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.beta_bytes_per_s > 0 or self.alpha_s < 0 or self.base_s < 0:
            raise ValueError(
                f"beta_bytes_per_s={self.beta_bytes_per_s} must be positive, "
                f"alpha_s={self.alpha_s} and base_s={self.base_s} not negative"
            )


def ring_seconds(size: float, n: int, link: Link) -> float:
    """All-reduce of `size` bytes: n - 1 reducing and n - 1 gathering hops of size / n."""
    if n == 1:
        return 0.0
    return link.base_s + 2 * (n - 1) * (link.alpha_s + size / (n * link.beta_bytes_per_s))


def tree_seconds(size: float, n: int, link: Link) -> float:
    """All-reduce over two binary trees at once, each taking half in chunks, up and then down.

    An inner rank of one tree is a leaf of the other, so an edge has a quarter of a rank's
    bandwidth, and 2 size / beta is the limit, as a ring's.
    """
    if n == 1:
        return 0.0
    chunks = max(1, math.ceil(size / 2 / TREE_CHUNK_BYTES))
    chunk_s = size / 2 / chunks / (link.beta_bytes_per_s / 4)
    depth = int(math.log2(n))
    return link.base_s + 2 * depth * (link.alpha_s + chunk_s) + (chunks - 1) * chunk_s


ALGORITHMS = {"ring": ring_seconds, "tree": tree_seconds}
FITTED = ("ring",)  # what a measured all-reduce is taken for: its link predicts by the same alone


def all_reduce_seconds(
    size: float, n: int, link: Link, algorithms: Sequence[str] = ("ring", "tree")
) -> float:
    """The cheapest of the algorithms, as NCCL picks by its own estimate of each."""
    return min(ALGORITHMS[name](size, n, link) for name in algorithms)


def bus_bytes_per_s(size: float, seconds: float, n: int) -> float:
    """(S / t) 2 (n - 1) / n: comparable between world sizes (nccl-tests, doc/PERFORMANCE.md)."""
    return size / seconds * 2 * (n - 1) / n


def bucket_sizes(
    gradient_bytes: Sequence[int], first: int = FIRST_BUCKET_BYTES, cap: int = BUCKET_BYTES
) -> list[int]:
    """Bytes of each bucket in the order in which they become ready.

    gradient_bytes  of each parameter, in the order in which a backward pass makes them
    A bucket is closed when it has reached its cap, as those that DDP builds after its warm-up.
    """
    sizes: list[int] = []
    filled = 0
    for size in gradient_bytes:
        filled += size
        if filled >= (cap if sizes else first):
            sizes.append(filled)
            filled = 0
    return [*sizes, filled] if filled else sizes


def exposed_seconds(
    bucket_s: Sequence[float], ready_s: Sequence[float], backward_s: float
) -> float:
    """Communication that is left when the backward pass ends.

    bucket_s  each bucket's all-reduce;  ready_s  when its gradients are there, from 0 at the start
              of the backward pass. For equal ranks exact: end = max(ready, end before) + time.
    A bound often quoted, max(t_last, t_all - T_backward (1 - S_last / S)), has the last bucket
    where this has the first, with which communication begins: they differ by those two's sizes.
    """
    end = 0.0
    for seconds, ready in zip(bucket_s, ready_s, strict=True):
        end = max(end, ready) + seconds
    return max(0.0, end - backward_s)


def ready_times(buckets: Sequence[int], backward_s: float) -> list[float]:
    """When each bucket is ready, if gradients come evenly by bytes over the backward pass."""
    return (np.cumsum(buckets) / sum(buckets) * backward_s).tolist()


def straggler_factor(jitter: float, n: int) -> float:
    """Expected slowest of n ranks over the mean, for normal step times.

    jitter  standard deviation / mean of a rank's step time
    source  Blom 1958: the largest of n is near the quantile (n - 0.375) / (n + 0.25)
    """
    return 1.0 if n == 1 else 1 + jitter * NormalDist().inv_cdf((n - 0.375) / (n + 0.25))


@dataclass(frozen=True)
class LinkFit:
    """A link fitted on measured all-reduces; residuals are (fitted - measured) / measured."""

    link: Link
    residuals: tuple[float, ...]

    @property
    def rms_residual(self) -> float:
        return float(np.sqrt(np.mean(np.square(self.residuals))))


def fit_link(sizes: Sequence[float], seconds: Sequence[float], n: int) -> LinkFit:
    """Least squares of t / t_measured = 1 over alpha and 1 / beta: relative, as t spans decades.

    The time is a ring's (FITTED), whatever the library ran; a tree with the alpha and beta of that
    fit would be another time than was measured.
    A latency that would come out negative is 0. raises ValueError for fewer than two sizes, n < 2,
    or times that do not grow with the size.
    """
    if n < 2 or len(set(sizes)) < 2:
        raise ValueError(f"n={n} and {len(set(sizes))} sizes: needs 2 ranks and 2 sizes or more")
    size, measured = np.asarray(sizes, float), np.asarray(seconds, float)
    hops = 2 * (n - 1)
    columns = np.stack([np.full_like(size, hops), hops / n * size], 1) / measured[:, None]
    scale = columns.max(0)  # seconds against seconds per byte: alike before they are solved for
    (alpha, inverse), *_ = np.linalg.lstsq(columns / scale, np.ones_like(size), rcond=None)
    alpha, inverse = alpha / scale[0], inverse / scale[1]
    if alpha < 0:
        alpha, inverse = 0.0, columns[:, 1].sum() / np.square(columns[:, 1]).sum()
    if inverse <= 0:
        raise ValueError(f"the all-reduces of n={n} ranks take no longer for more bytes")
    link = Link(alpha_s=float(alpha), beta_bytes_per_s=float(1 / inverse))
    fitted = np.array([all_reduce_seconds(s, n, link, FITTED) for s in size])
    return LinkFit(link, tuple(float(r) for r in fitted / measured - 1))


def fit_line(batches: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(fixed_s, per_image_s) of seconds = fixed + per_image * batch; both never negative.

    One batch size alone says nothing of the fixed part: it is 0.
    """
    x, y = np.asarray(batches, float), np.asarray(seconds, float)
    if len(set(batches)) < 2:
        return 0.0, float(np.mean(y / x))
    columns = np.stack([np.ones_like(x), x], 1)
    (fixed, slope), *_ = np.linalg.lstsq(columns / y[:, None], np.ones_like(y), rcond=None)
    if fixed < 0:
        return 0.0, float((x / y).sum() / np.square(x / y).sum())
    if slope < 0:
        return float((1 / y).sum() / np.square(1 / y).sum()), 0.0
    return float(fixed), float(slope)
