"""Frechet distance between two sets of images: |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^1/2)."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Distance of the normal distributions with the means and covariances of a and b.

    a, b    (N, D) and (M, D), at least two rows each; computed in fp64
    raises  ValueError  shapes that do not match or a single row
    source  Dowson & Landau 1982; Heusel et al. 2017, eq. 6
    """
    for rows in (a, b):
        if rows.ndim != 2 or len(rows) < 2 or rows.shape[1] != a.shape[1]:
            raise ValueError(f"features of shapes {a.shape}, {b.shape} must be (N >= 2, D) each")
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root_a = _root(np.atleast_2d(cov_a))
    # (C_1 C_2)^1/2 has the trace of the symmetric (C_1^1/2 C_2 C_1^1/2)^1/2
    middle = np.linalg.eigvalsh(root_a @ np.atleast_2d(cov_b) @ root_a)
    trace = np.trace(np.atleast_2d(cov_a)) + np.trace(np.atleast_2d(cov_b))
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + trace - 2 * np.sqrt(np.maximum(middle, 0)).sum())


def _root(matrix: np.ndarray) -> np.ndarray:
    """Square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def area_features(images: Tensor, size: int = 8) -> np.ndarray:
    """(N, C, H, W) -> (N, C * size * size) means over equal areas; H and W multiples of size.

    At 8x8 these are the pixels in which the digits were recorded.
    """
    if images.shape[-1] % size or images.shape[-2] % size:
        raise ValueError(f"images of {tuple(images.shape[-2:])} pixels must be multiples of {size}")
    return F.adaptive_avg_pool2d(images.float().cpu(), size).flatten(1).numpy()
