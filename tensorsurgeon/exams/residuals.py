"""Look at what quantisation takes from one matrix, or from the same one of two models, in a single pass.

Sums and counts are taken tile by tile as pieces come. Subspaces need a fixed number of further passes: differences
are kept for these where they take no more than half of the memory, else tensors are read again.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch

from tensorsurgeon.exams.streaming import Reader, Work
from tensorsurgeon.kernels.arrays import as_float32
from tensorsurgeon.kernels.noise import Tally, difference, ratio
from tensorsurgeon.kernels.statistics import histogram, present
from tensorsurgeon.kernels.subspaces import (
    Angles,
    Subspace,
    Tiles,
    angles_between,
    energies,
    find_subspaces,
    memory_needed,
)
from tensorsurgeon.tensor import Block, LazyTensor

CENSUS = 4 * 2**20
"""Bytes of memory for the counts of one pair, or less."""
SIDES = ("output", "input")
"""What rows and columns of a matrix stand for, unless it lies the other way round."""
ONE, TWO = ("noise", "weights"), ("noise A", "noise B", "delta")
"""Matrices whose subspaces are compared, of one pair of models and of two; only the last can be zero."""


class Question(NamedTuple):
    """What is asked of a matrix: the `rank` of subspaces, 0 for none, and whether to look at it `in_depth`.

    `memory` is all that there is, in bytes; `turned` tells that rows are inputs, as those of Conv1D are.
    """

    memory: int
    rank: int = 0
    in_depth: bool = False
    turned: bool = False


class Residual(NamedTuple):
    """What was found of a matrix: statistics, and rows for further tables.

    `broken` are places of models that hold NaN, infinity or numbers too large to be summed; `silent` are those of pairs
    that have no noise. Of both nothing else is told.
    """

    row: dict[str, Any]
    subspaces: Sequence[dict[str, Any]] = ()
    energy: Sequence[dict[str, Any]] = ()
    spectra: Sequence[dict[str, Any]] = ()
    angles: Sequence[dict[str, Any]] = ()
    detail: dict[str, Any] | None = None
    broken: tuple[int, ...] = ()
    silent: tuple[int, ...] = ()


def work_for(tensors: Sequence[LazyTensor], question: Question) -> Work:
    """Return what looking at a matrix in two or four models takes."""
    besides = CENSUS * (len(tensors) // 2)
    if question.rank:
        rows, columns = tensors[0].shape
        matrices = len(_matrices(tensors))
        besides += memory_needed((rows, columns), question.rank, matrices)
        besides += _kept_bytes(tensors) if _is_kept(tensors, question) else 0
        besides += 4 * min(tensors[0].piece_rows, rows) * columns * matrices
    return Work(tensors, besides=besides)


def look_at_noise(name: str, tensors: Sequence[LazyTensor], reader: Reader, question: Question) -> Residual:
    """Read A and A', or A, A', B and B', once, and return what was found."""
    rows, columns = tensors[0].shape
    pairs = len(tensors) // 2
    tally = Tally(rows, columns, pairs)
    kept: list[Sequence[torch.Tensor]] | None = [] if question.rank and _is_kept(tensors, question) else None
    for start, blocks in reader.pieces(*tensors):
        tally.add(blocks, start)
        if kept is not None:
            kept.append(_differences(blocks))
    silent = tuple(pair for pair in range(pairs) if tally.is_silent(pair))
    if tally.broken or silent:
        return Residual({}, broken=tuple(sorted(tally.broken)), silent=silent)
    row = tally.joint_statistics() if pairs > 1 else {}
    row |= tally.own_statistics(0)
    if pairs > 1:
        row |= {f"{key} B": value for key, value in tally.own_statistics(1).items()}
    found = Residual(row)
    if question.rank:
        found = _with_subspaces(name, tensors, _totals(tally), _tiles(tensors, reader, kept), question)
        found = found._replace(row=row | found.row)
    if question.in_depth:
        labels = ("A", "B")[:pairs]
        distinct = [present(made.counts, "F32") for made in tally.censuses]
        histograms = {label: histogram(it) for label, it in zip(labels, distinct, strict=True)}
        found = found._replace(detail={"histograms": histograms, **(found.detail or {})})
    return found


def _matrices(tensors: Sequence[LazyTensor]) -> tuple[str, ...]:
    return TWO if len(tensors) > 2 else ONE


def _totals(tally: Tally) -> list[float]:
    """Return the sums of squares of those matrices."""
    if len(tally.own) > 1:
        return [float(tally.own[0, 1]), float(tally.own[1, 1]), float(tally.between[3])]
    return [float(tally.own[0, 1]), float(tally.own[0, 0])]


def _kept_bytes(tensors: Sequence[LazyTensor]) -> int:
    rows, columns = tensors[0].shape
    return 4 * rows * columns * len(_matrices(tensors))


def _is_kept(tensors: Sequence[LazyTensor], question: Question) -> bool:
    return 2 * _kept_bytes(tensors) <= question.memory


def _differences(blocks: Sequence[Block]) -> tuple[torch.Tensor, ...]:
    """Return tiles of those matrices, each rounded once to float32."""
    # What is not finite is named by the sums.
    with np.errstate(over="ignore", invalid="ignore"):
        if len(blocks) == 2:
            made = [difference(*blocks), as_float32(blocks[0])]
        else:
            a, a_quantised, b, b_quantised = blocks
            made = [difference(a, a_quantised), difference(b, b_quantised), difference(b, a)]
    return tuple(map(torch.from_numpy, made))


def _tiles(tensors: Sequence[LazyTensor], reader: Reader, kept: list[Sequence[torch.Tensor]] | None) -> Tiles:
    if kept is not None:
        return lambda: kept

    # The bar is over what is read once.
    again = Reader(lambda _: None)

    def read() -> Iterable[Sequence[torch.Tensor]]:
        for _, blocks in again.pieces(*tensors):
            yield _differences(blocks)

    return read


def _with_subspaces(
    name: str, tensors: Sequence[LazyTensor], totals: Sequence[float], tiles: Tiles, question: Question
) -> Residual:
    """Return what subspaces of those matrices tell; where the last is zero, as that of two equal models, without it."""
    rows, columns = tensors[0].shape
    labels = [label for label, total in zip(_matrices(tensors), totals, strict=True) if total]
    rank = min(question.rank, rows, columns)

    def present() -> Iterable[Sequence[torch.Tensor]]:
        return (parts[: len(labels)] for parts in tiles())

    found = find_subspaces(present, (rows, columns), totals[: len(labels)], rank, zlib.crc32(name.encode()))
    named = dict(zip(labels, found, strict=True))
    sides = SIDES[::-1] if question.turned else SIDES
    row: dict[str, Any] = {}
    compared, angles, energy = [], [], []
    for (one, first), (other, second) in combinations(named.items(), 2):
        bases = (first.left, second.left), (first.right, second.right)
        for side, pair in zip(sides, bases, strict=True):
            between = angles_between(*pair)
            mark = {"between": f"{one}, {other}", "side": side}
            compared.append(mark | _compared(first, second, between))
            angles += [{**mark, "number": number, "degrees": it} for number, it in enumerate(between.angles, 1)]
            if (one, other) in (TWO[:2], ONE):
                row[f"{side} overlap over chance"] = ratio(between.overlap, between.chance)
    whose, inside = (TWO[2], TWO[:2]) if len(tensors) > 2 else (ONE[0], ONE[1:])
    if {whose, *inside} <= set(labels):
        place = labels.index(whose)
        held = energies(present, place, totals[place], [named[label] for label in inside])
        for label, (right, left) in zip(inside, held, strict=True):
            for side, share, size in zip(sides, (left, right), (rows, columns), strict=True):
                energy.append({"of": whose, "inside": label, "side": side, **_share(named[label].rank, share, size)})
                if label == inside[0]:
                    row[f"{side} energy over chance"] = energy[-1]["over chance"]
    spectra = [_spectrum(label, it) for label, it in named.items()]
    detail = {"spectrum": {"values": found[0].values, "step": 1}} if question.in_depth else None
    return Residual(row, compared, energy, spectra, angles if question.in_depth else (), detail)


def _share(rank: int, share: float, size: int) -> dict[str, Any]:
    return {"rank": rank, "share": share, "by chance": rank / size, "over chance": share * size / rank}


def _compared(one: Subspace, other: Subspace, angles: Angles) -> dict[str, Any]:
    return {
        "ranks": [one.rank, other.rank],
        "overlap": angles.overlap,
        "by chance": angles.chance,
        "over chance": ratio(angles.overlap, angles.chance),
        "z": angles.z,
        "smallest angle": angles.angles[0],
    }


def _spectrum(label: str, subspace: Subspace) -> dict[str, Any]:
    return {
        "matrix": label,
        "rank": subspace.rank,
        "largest": subspace.values[0],
        "last": subspace.values[subspace.rank - 1],
        "following": subspace.values[subspace.rank] if len(subspace.values) > subspace.rank else None,
        "gap": subspace.gap,
        "over flat": subspace.prominence,
    }
