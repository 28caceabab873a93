"""How alike the states before and after layers are: cosines, angular distances, and CKA, in float64."""

from __future__ import annotations

from math import pi

import torch

KERNEL = 1024
"""Samples that CKA compares at most, as it compares each with each."""


def influence(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return the block influence: one minus the mean cosine of states before and after (Men et al., 2024)."""
    return 1 - float(_cosines(before, after).mean())


def angular_distance(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return the mean of `arccos(cosine) / pi` (Gromov et al., 2024): 0 for one direction, 1 for opposite ones."""
    return float((_cosines(before, after).clamp(-1, 1).arccos() / pi).mean())


def centred_kernel(states: torch.Tensor) -> torch.Tensor:
    """Return the products of all pairs of samples, of which the means are taken out, by rows and columns."""
    wide = states.double()
    wide = wide - wide.mean(0, keepdim=True)
    return wide @ wide.T


def cka(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the linear centred kernel alignment of two centred kernels (Kornblith et al., 2019).

    `<K, L> / (|K| |L|)`: 1 where states differ by a rotation and a factor, whatever their widths.
    """
    sizes = one.norm() * other.norm()
    return float((one * other).sum() / sizes) if sizes > 0 else float("nan")


def _cosines(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    one, other = before.double(), after.double()
    sizes: torch.Tensor = one.norm(dim=1) * other.norm(dim=1)
    return (one * other).sum(1) / sizes
