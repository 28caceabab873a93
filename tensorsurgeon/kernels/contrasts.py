"""Directions in which groups of samples differ: from activations (samples, width) of each to an orthonormal basis.

All in float64. The first so many directions of a basis are what fewer would have been.

Products and decompositions are torch's, each on one thread: NumPy has a library for them whose threads nothing but the
environment sets, and whose last bits depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.kernels.archives import Numbers
from tensorsurgeon.kernels.deltas import one_thread_each

NOISE = 1e-10
"""Singular values up to this share of the largest are taken for rounding."""


class Contrast(NamedTuple):
    """An orthonormal basis (k, width), and how much it holds.

    `captured` is its share of what the method decomposes, `of_all` of the variance of all samples about their mean.
    """

    vectors: Numbers
    captured: float
    of_all: float


class Method(NamedTuple):
    """A way to find directions: whether samples of groups belong together in pairs, and how many groups it takes.

    `means` tells that there is one direction less than groups; `find` returns all, the most important first, and the
    squares that each holds.
    """

    find: Callable[[Sequence[Numbers]], tuple[Numbers, Numbers]]
    paired: bool = False
    two: bool = False
    means: bool = False


@one_thread_each()
def find_contrast(method: str, groups: Sequence[Numbers], rank: int) -> Contrast:
    """Return the first so many directions.

    Raises:
        RefusedError: where there are not so many.
    """
    vectors, squares = METHODS[method].find(groups)
    known = int((squares > NOISE**2 * squares[:1]).sum())
    if rank > known:
        raise RefusedError(f"{method} finds {known} directions here, not the {rank} of rank.")
    basis = torch.linalg.qr(_tensor(vectors[:rank].T))[0].T.numpy()
    # QR turns some round; what they point to is kept.
    basis *= np.sign(np.einsum("ij,ij->i", basis, vectors[:rank]))[:, None]
    every = np.concatenate(groups)
    every -= every.mean(0)
    of_all = np.square(_product(every, basis.T)).sum() / np.square(every).sum()
    return Contrast(basis, float(squares[:rank].sum() / squares.sum()), float(of_all))


def _deviations(groups: Sequence[Numbers]) -> tuple[Numbers, Numbers]:
    """Decompose what each sample of a group differs by from the mean of that sample over all groups."""
    stacked = np.stack(groups, 1)
    return _principal((stacked - stacked.mean(1, keepdims=True)).reshape(-1, stacked.shape[2]))


def _mean_difference(groups: Sequence[Numbers]) -> tuple[Numbers, Numbers]:
    """Decompose what the means of groups differ by from the mean of these, which of two is their difference.

    A group's mean differs by that, times g / (g - 1), from the mean of the others, so that these have the same span.
    """
    means = np.stack([group.mean(0) for group in groups])
    return _pointed(*_principal(means - means.mean(0)), means)


def _difference_pca(groups: Sequence[Numbers]) -> tuple[Numbers, Numbers]:
    """Decompose differences of pairs, about zero: which of the two comes first does not matter."""
    return _pointed(*_principal(groups[0] - groups[1]), np.stack([group.mean(0) for group in groups]))


def _whitened_difference(groups: Sequence[Numbers]) -> tuple[Numbers, Numbers]:
    """Solve `B v = l S v`: v has the most variance between groups, B, for that within them, S (Fisher, 1936; LDA).

    With M the groups' means, weighted by the roots of their sizes, and `M S^-1 M' = Q l Q'`, v is `S^-1 M' Q`. For two
    groups this is `S^-1` times the difference of means.
    """
    sizes = np.array([len(group) for group in groups], np.float64)
    means = np.stack([group.mean(0) for group in groups])
    total = _product(sizes, means) / sizes.sum()
    between = (means - total) * np.sqrt(sizes)[:, None]
    within = np.concatenate([group - mean for group, mean in zip(groups, means, strict=True)])
    if not within.any():
        raise RefusedError("no sample differs from the mean of its group; there is nothing to whiten by.")
    solved = torch.linalg.solve(_tensor(shrunk_covariance(within)), _tensor(between.T)).numpy()
    values, turned = (it.numpy() for it in torch.linalg.eigh(_tensor(_product(between, solved))))
    # The means, weighted so, depend on each other: the least value is rounding.
    values, turned = values[:0:-1].copy(), turned[:, :0:-1].copy()
    vectors = _product(solved, turned).T
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return _pointed(vectors / np.where(lengths, lengths, 1), values.clip(min=0), means)


def shrunk_covariance(centred: Numbers) -> Numbers:
    """Return the covariance of rows, moved towards a multiple of the identity as much as lowers the expected error.

    With n rows of d numbers, `S = X'X / n` and m = tr S / d, `(1 - r) S + r m I` where r = min(b, a) / a with
    a = |S - m I|^2 and b = (sum |x|^4 / n - |S|^2) / n. Source: Ledoit and Wolf, "A well-conditioned estimator for
    large-dimensional covariance matrices", Journal of Multivariate Analysis 88 (2004).
    """
    count, width = centred.shape
    covariance = _product(centred.T, centred) / count
    mean = np.trace(covariance) / width
    squares = np.square(covariance).sum()
    spread = squares - width * mean**2
    error = (np.square(np.square(centred).sum(1)).sum() / count - squares) / count
    shrinkage = min(error, spread) / spread if spread > 0 else 1.0
    made: Numbers = (1 - shrinkage) * covariance
    made[np.diag_indices(width)] += shrinkage * mean
    return made


def _principal(rows: Numbers) -> tuple[Numbers, Numbers]:
    """Return the right singular vectors of a matrix, and its singular values squared."""
    _, values, vectors = torch.linalg.svd(_tensor(rows), full_matrices=False)
    return vectors.numpy(), values.numpy() ** 2


def _pointed(vectors: Numbers, squares: Numbers, means: Numbers) -> tuple[Numbers, Numbers]:
    """Let every direction point to the first group, from the mean of the others."""
    towards = _product(vectors, means[0] - means[1:].mean(0))
    return vectors * np.where(towards < 0, -1.0, 1.0)[:, None], squares


def _product(one: Numbers, other: Numbers) -> Numbers:
    made: Numbers = (_tensor(one) @ _tensor(other)).numpy()
    return made


def _tensor(numbers: Numbers) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers))


METHODS = {
    "deviations": Method(_deviations, paired=True),
    "mean-difference": Method(_mean_difference, means=True),
    "difference-pca": Method(_difference_pca, paired=True, two=True),
    "whitened-difference": Method(_whitened_difference, means=True),
}
"""Every method, by its name."""
