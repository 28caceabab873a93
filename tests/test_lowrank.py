"""Factors of low rank, held against the singular value decomposition of LAPACK in float64."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tensorsurgeon.kernels import lowrank
from tensorsurgeon.kernels.deltas import Goal
from tensorsurgeon.kernels.lowrank import Factors, Matrix, balanced, squared_error, sum_of_squares

SHAPES = {"square": (900, 900), "tall": (2000, 500), "wide": (500, 2000), "small": (200, 160), "narrow": (3000, 24)}
SPECTRA = ("random", "power law", "steep", "flat", "two levels", "quantisation noise")


@cache
def matrix(spectrum: str, shape: tuple[int, int]) -> torch.Tensor:
    """Return a matrix of float32 with a spectrum."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = shape
    noise = torch.randn(rows, columns, generator=generator)
    if spectrum == "random":
        return noise
    if spectrum == "quantisation noise":
        return noise - (noise * 8).round() / 8
    size = min(shape)
    left = torch.linalg.qr(noise if rows >= columns else noise.T)[0]
    right = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    number = torch.arange(1, size + 1, dtype=torch.float64)
    values = {
        "power law": number**-0.5,
        "steep": number**-1.5,
        "flat": torch.ones(size, dtype=torch.float64),
        "two levels": torch.where(number <= size // 4, 1.0, 0.5),
    }[spectrum]
    made = (left.double() * values) @ right.double().T
    return (made if rows >= columns else made.T).float()


def tiled(whole: torch.Tensor, rows: int = 170) -> Matrix:
    return Matrix(tuple(whole.shape), lambda: whole.split(rows), sum_of_squares(whole))  # type: ignore[arg-type]


def factors(given: Matrix, goal: Goal, hint: int, method: str) -> Factors:
    """Return factors by a method; where a Krylov space would be too large, the exact way is gone."""
    found = lowrank.krylov_factors(given, goal.enough, hint, seed=7) if method == "krylov" else None
    return found or lowrank.exact_factors(given, goal.enough)


@pytest.mark.parametrize("method", ["krylov", "exact"])
@pytest.mark.parametrize("rank", [1, 8, 32, 64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_error_is_the_least_possible_to_a_thousandth(spectrum: str, shape: str, rank: int, method: str) -> None:
    whole = matrix(spectrum, SHAPES[shape])
    given, goal = tiled(whole), Goal("rank", rank)
    squares = torch.linalg.svdvals(whole.double()) ** 2
    if rank > len(squares):
        return
    found = factors(given, goal, rank, method)
    b, a = balanced(found, rank, torch.float32)
    error = (whole.double() - b.double() @ a.double()).square().sum()
    optimum = squares[rank:].sum()
    assert error.sqrt() <= optimum.sqrt() * 1.001 + 1e-6 * squares.sum().sqrt()
    assert squared_error(given, b, a) == pytest.approx(float(error), rel=1e-3, abs=1e-10 * given.total)
    least = given.total - float(found.squares.sum()) - found.slack
    assert least <= float(optimum) + 1e-6 * given.total
    assert least >= 0.995 * float(optimum) - 1e-6 * given.total


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 20])
def test_a_planted_delta_is_recovered_to_float_precision(shape: str, rank: int) -> None:
    generator = torch.Generator().manual_seed(2)
    rows, columns = SHAPES[shape]
    whole = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    for method in ("krylov", "exact"):
        found = factors(tiled(whole), Goal("rank", rank), rank, method)
        b, a = balanced(found, rank, torch.float32)
        assert (whole - b @ a).norm() <= 3e-6 * whole.norm()


@pytest.mark.parametrize("method", ["krylov", "exact"])
@pytest.mark.parametrize("shape", ["square", "tall", "wide"])
def test_a_rank_above_the_delta_s_own_is_filled_with_zeros(shape: str, method: str) -> None:
    rows, columns = SHAPES[shape]
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(rows, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
    found = factors(tiled(whole), Goal("rank", 40), 40, method)
    b, a = balanced(found, 48, torch.float32)
    assert (b.shape, a.shape) == ((rows, 48), (48, columns))
    assert (whole - b @ a).norm() <= 3e-6 * whole.norm()
    assert torch.isfinite(b).all()
    assert torch.isfinite(a).all()
    assert not b[:, 40:].any()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", ["square", "tall", "wide", "small"])
@pytest.mark.parametrize(("kind", "value"), [("energy", 0.5), ("energy", 0.1), ("error", 0.9), ("error", 0.3)])
def test_the_least_rank_that_reaches_a_share_is_taken(spectrum: str, shape: str, kind: str, value: float) -> None:
    whole = matrix(spectrum, SHAPES[shape])
    goal = Goal(kind, value)  # type: ignore[arg-type]
    squares = torch.linalg.svdvals(whole.double()) ** 2
    wanted = value if kind == "energy" else 1 - value**2
    least = int((squares.cumsum(0) < wanted * squares.sum() * (1 - 1e-9)).sum()) + 1
    found = factors(tiled(whole), goal, 32, "krylov")
    assert least <= len(found.squares) <= least * 1.02 + 1
    assert float(found.squares.sum()) >= wanted * float(squares.sum()) * (1 - 1e-6)


def test_the_singular_values_lie_in_equal_parts_on_both_sides() -> None:
    for shape in ("tall", "wide"):
        whole = matrix("power law", SHAPES[shape])
        found = factors(tiled(whole), Goal("rank", 8), 8, "krylov")
        b, a = balanced(found, 8, torch.float32)
        values = torch.linalg.svdvals(whole.double())[:8].float()
        assert torch.allclose(b.norm(dim=0) ** 2, values, rtol=1e-3)
        assert torch.allclose(a.norm(dim=1) ** 2, values, rtol=1e-3)


def test_neither_tiles_read_anew_nor_the_run_change_a_bit() -> None:
    whole = matrix("random", SHAPES["tall"])
    first = factors(tiled(whole), Goal("rank", 8), 8, "krylov")
    again = factors(Matrix((2000, 500), lambda: whole.clone().split(170), sum_of_squares(whole)),
                    Goal("rank", 8), 8, "krylov")  # fmt: skip
    assert torch.equal(first.left, again.left)
    assert torch.equal(first.right, again.right)


@pytest.mark.parametrize("spectrum", ["power law", "steep", "flat", "random", "quantisation noise"])
def test_low_ranks_of_large_matrices_need_no_whole_decomposition(spectrum: str) -> None:
    whole = matrix(spectrum, (1500, 1500))
    assert lowrank.krylov_factors(tiled(whole), Goal("rank", 8).enough, 8, seed=7)
