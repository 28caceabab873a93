"""Singular values of a matrix that is read in pieces, and what they say of it.

With singular values s_1 >= s_2 >= ...:

    stable rank = sum(s^2) / s_1^2
    effective rank = exp(-sum(p log p)), p = s / sum(s)         Roy and Vetterli, EUSIPCO 2007
    alpha: the eigenvalues s^2 of X'X above some least one have the density of a power law, x^-alpha

The exponent is that of greatest likelihood, above the value from which the fit is best by the Kolmogorov-Smirnov
distance (Clauset, Shalizi and Newman, SIAM Review 51, 2009); of weights it is mostly between 2 and 6 (Martin and
Mahoney, JMLR 22, 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tensorsurgeon.kernels.casting import TORCH
from tensorsurgeon.kernels.lowrank import Matrix, Tensor, gram_matrix
from tensorsurgeon.tensor import Block

FEWEST = 10
"""Eigenvalues that a power law is fitted to at least."""
NOISE = 1e-12
"""Share of the largest eigenvalue that is taken for rounding."""

Numbers = npt.NDArray[np.float64]


def singular_values(shape: tuple[int, ...], blocks: Callable[[], Iterable[Block]]) -> Numbers:
    """Return the singular values in descending order; `blocks` gives the rows from the first to the last, each time."""
    columns = prod(shape[1:])

    def tiles() -> Iterable[Tensor]:
        for block in blocks():
            yield torch.frombuffer(block.data, dtype=TORCH[block.dtype]).reshape(-1, columns).to(torch.float64)

    values = torch.linalg.eigvalsh(gram_matrix(Matrix((shape[0], columns), tiles, 0.0)))
    return values.clamp(min=0).sqrt().flip(0).numpy()  # type: ignore[no-any-return]


def spectral_statistics(singular: Numbers) -> dict[str, Any]:
    """Return what singular values say, by name; None where all are zero."""
    squares = singular**2
    if not len(singular) or not squares[0]:
        return dict.fromkeys(("spectral norm", "stable rank", "effective rank", "alpha"))
    shares = singular[singular > 0] / singular.sum()
    return {
        "spectral norm": float(singular[0]),
        "stable rank": float(squares.sum() / squares[0]),
        "effective rank": float(np.exp(-(shares * np.log(shares)).sum())),
        "alpha": power_law(squares[squares > NOISE * squares[0]]),
    }


def power_law(values: Numbers) -> float | None:
    """Return the exponent of the power law that fits the upper part of descending positive values best.

    For each least value x_n, `alpha = 1 + n / sum(log(x_i / x_n))` over the n values from it up; that one is taken
    whose law is nearest to the values above it. None where there are too few.
    """
    logs = np.log(values)
    best: tuple[float, float | None] = (np.inf, None)
    totals = np.cumsum(logs)
    for count in range(FEWEST, len(values) + 1):
        spread = totals[count - 1] - count * logs[count - 1]
        if spread <= 0:
            continue
        alpha = 1 + count / spread
        # The share of values above each, by the law and as it is; the law's is 1 at the least value.
        law = np.exp((1 - alpha) * (logs[:count] - logs[count - 1]))
        above = np.arange(count) / count
        distance = float(max(np.abs(law - above).max(), np.abs(law - above - 1 / count).max()))
        best = min(best, (distance, float(alpha)), key=lambda found: found[0])
    return best[1]
