"""Statistics of numbers, against NumPy and SciPy in float64, on every dtype and on data that breaks careless sums."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tensorsurgeon.kernels.census import STRETCH, Census, count_plainly, patterns
from tensorsurgeon.kernels.moments import TILE, Moments, block_moments
from tensorsurgeon.kernels.spectrum import power_law, singular_values, spectral_statistics
from tensorsurgeon.kernels.statistics import QUANTILES, exact_moments, histogram, present, statistics
from tensorsurgeon.tensor import Block

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
NARROW = ("BF16", "F16")


def normal(std: float, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(600, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * std + mean


def spotted(place: int, value: float) -> torch.Tensor:
    made = normal(0.02)
    made.view(-1)[place] = value
    return made


DATA = {
    "weights": normal(0.02),
    "a huge mean with a tiny std": normal(0.5, 4096.0),
    "all equal": torch.full((600, 300), 0.1),
    "all zero": torch.zeros(600, 300),
    "zeros of both signs": torch.zeros(600, 300).copysign(normal(1.0)),
    "heavy tails": normal(1.0) ** 3 * 0.1,
    "denormals": normal(1e-39),
    "denormals of F16": normal(2e-6),
    "beyond F16": normal(3e4),
    "around the limits of E4M3": normal(300.0),
    "NaN first": spotted(0, float("nan")),
    "NaN last": spotted(-1, float("nan")),
    "NaN at the end of a tile": spotted(TILE - 1, float("nan")),
    "NaN at the start of a tile": spotted(TILE, float("nan")),
    "infinity": spotted(7, float("inf")),
    "minus infinity": spotted(-7, float("-inf")),
    "one": torch.full((1, 1), -3.0),
    "nothing but NaN": torch.full((4, 5), float("nan")),
}


def as_bytes(tensor: torch.Tensor) -> bytearray:
    return bytearray(tensor.contiguous().view(torch.uint8).numpy())


def blocks(tensor: torch.Tensor, dtype: str, step: int) -> Iterator[tuple[int, Block]]:
    for start in range(0, len(tensor), step):
        part = tensor[start : start + step]
        yield start, Block(dtype, tuple(part.shape), as_bytes(part))


def found(tensor: torch.Tensor, dtype: str, step: int = 256) -> tuple[dict[str, Any], Census]:
    census, moments = Census(*tensor.shape), Moments()
    for start, block in blocks(tensor, dtype, step):
        census.add(block, start)
        if dtype not in NARROW:
            for part in block_moments(block, tensor.shape[1], 256):
                moments = moments.merge(part)
    numbers = present(census.counts, dtype)
    return statistics(numbers, exact_moments(numbers) if dtype in NARROW else moments), census


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("data", DATA)
def test_statistics_are_those_of_numpy_and_scipy(data: str, dtype: str) -> None:
    tensor = DATA[data].to(DTYPES[dtype])
    row, _ = found(tensor, dtype)
    every = tensor.double().numpy().ravel()
    x = every[np.isfinite(every)]
    size = np.abs(x)
    assert row["NaN"] == np.isnan(every).sum()
    assert row["Inf"] == np.isinf(every).sum()
    assert row["zeros"] == (x == 0).sum()
    least = float(torch.finfo(DTYPES[dtype]).smallest_normal)
    assert row["subnormals"] == ((size > 0) & (size < least)).sum()
    if not len(x):
        assert row["mean"] is row["std"] is row["absmax"] is row["50%"] is None
        return
    assert (row["min"], row["max"], row["absmax"]) == (x.min(), x.max(), size.max())
    precise = {"rel": 1e-12, "abs": 1e-300}
    assert row["mean"] == pytest.approx(x.mean(), rel=1e-12, abs=1e-13 * size.max())
    assert row["std"] == pytest.approx(x.std() if size.max() > size.min() or x.min() < x.max() else 0.0, **precise)
    assert row["rms"] == pytest.approx(np.sqrt((x**2).mean()), **precise)
    if x.min() < x.max() and x.std() ** 4 > 0:
        assert row["skewness"] == pytest.approx(stats.skew(x), rel=1e-9, abs=1e-9)
        assert row["kurtosis"] == pytest.approx(stats.kurtosis(x), rel=1e-9, abs=1e-9)
    with np.errstate(over="ignore"):
        for share, beyond in {
            "F16 overflow share": np.isinf(x.astype(np.float16)),
            "F16 underflow share": (x.astype(np.float16) == 0) & (x != 0),
            "E4M3 overflow share": size > 464,
            "E4M3 underflow share": (torch.tensor(x).float().to(torch.float8_e4m3fn).float().numpy() == 0) & (x != 0),
        }.items():
            assert row[share] == beyond.mean(), share
    exact = dtype in NARROW
    for name, share in QUANTILES.items():
        wanted = np.quantile(x, share)
        # Between two neighbours of opposite sign a quantile of the grid may be off by their distance.
        slack = 0 if exact else 2.0**-7 * np.abs(np.quantile(x, share, method="higher"))
        assert abs(row[name] - wanted) <= slack + 1e-15 * abs(wanted) + (0 if exact else 2.0**-126), name
    if not exact and 6 * row["std"] < 2.0**-6 * abs(row["mean"]):
        assert row["outlier share"] is None
        return
    outlying = (np.abs(x - x.mean()) > 6 * x.std()).mean() if row["std"] else 0
    assert row["outlier share"] == pytest.approx(outlying, abs=0 if exact else 2e-5 + 0.1 * outlying)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_depends_on_how_a_tensor_is_cut(dtype: str) -> None:
    tensor = DATA["heavy tails"].to(DTYPES[dtype])
    rows = [found(tensor, dtype, step)[0] for step in (256, 512, 1024)]
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 7), (5, 13), (2, STRETCH + 3), (300, 31), (2 * STRETCH + 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_census_is_the_plain_one(shape: tuple[int, int], dtype: str) -> None:
    bits = np.random.default_rng(1).integers(0, 256, (*shape, DTYPES[dtype].itemsize), np.uint8)
    block = Block(dtype, shape, bits.tobytes())
    census = Census(*shape)
    census.add(block, 0)
    counts, rows, columns = count_plainly(patterns(block).reshape(shape))
    assert (census.counts == counts).all()
    assert (census.rows == rows).all()
    assert (census.columns == columns).all()


def test_counts_do_not_overflow() -> None:
    """Tables count up to 2^32; what is pending is carried before that."""
    census = Census(4, 8)
    block = Block("BF16", (4, 8), bytes(64))
    census.add(block, 0)
    census.pending = 2**32 - 32
    census.tables[0, 0] = 2**32 - 33
    census.add(block, 0)
    census.add(block, 0)
    assert census.counts[0] == 2**32 - 33 + 3 * 32 - 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_histogram_counts_by_quarter_octaves(dtype: str) -> None:
    tensor = DATA["weights"].to(DTYPES[dtype]).clone()
    tensor[0, :3] = torch.tensor([0.0, -0.0, 1.25])
    row, census = found(tensor, dtype)
    made = histogram(present(census.counts, dtype))
    x = tensor.double().numpy().ravel()
    edges = [2.0 ** (made["octave"] + i // 4) * (1 + i % 4 / 4) for i in range(len(made["positive"]) + 1)]
    assert np.histogram(x[x > 0], edges)[0].tolist() == made["positive"]
    assert np.histogram(-x[x < 0], edges)[0].tolist() == made["negative"]
    assert made["zero"] == row["zeros"]
    assert made["positive"][-1] == 1


def test_the_histogram_of_zeros_has_no_bins() -> None:
    _, census = found(torch.zeros(3, 4, dtype=torch.bfloat16), "BF16")
    assert histogram(present(census.counts, "BF16")) == {"octave": 0, "negative": [], "zero": 12, "positive": []}


@pytest.mark.parametrize("shape", [(90, 40), (40, 90), (1, 5), (1200, 1100)])
def test_the_spectrum_is_that_of_the_full_svd(shape: tuple[int, int]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(2)) / torch.arange(1, shape[1] + 1)
    halves = [block for _, block in blocks(tensor, "F32", -(-shape[0] // 2))]
    singular = singular_values(shape, lambda: halves)
    wanted = torch.linalg.svdvals(tensor.double()).numpy()
    assert np.allclose(singular, wanted, rtol=1e-9, atol=1e-8 * wanted[0])
    row = spectral_statistics(singular)
    shares = wanted / wanted.sum()
    assert row["spectral norm"] == pytest.approx(np.linalg.norm(tensor.double().numpy(), 2))
    assert row["stable rank"] == pytest.approx((tensor.double() ** 2).sum().item() / wanted[0] ** 2)
    assert row["effective rank"] == pytest.approx(np.exp(stats.entropy(shares)), rel=1e-6)


def test_what_is_all_zero_has_no_spectrum() -> None:
    assert set(spectral_statistics(np.zeros(4)).values()) == {None}


@pytest.mark.parametrize("alpha", [2.2, 3.0, 5.0])
def test_the_exponent_of_a_power_law_is_found(alpha: float) -> None:
    random = np.random.default_rng(3)
    tail = random.pareto(alpha - 1, 4000) + 1
    exponent = power_law(np.sort(tail)[::-1])
    assert exponent == pytest.approx(alpha, rel=0.08)
    # What lies below the tail does not move it.
    body = random.uniform(0.2, 1, 4000)
    assert power_law(np.sort(np.concatenate([tail, body]))[::-1]) == pytest.approx(alpha, rel=0.12)


def test_the_least_value_of_a_power_law_is_the_best_of_all() -> None:
    """Against the same search, written out plainly for each least value."""
    values = np.sort(np.random.default_rng(4).lognormal(0, 1, 200))[::-1]
    fits = []
    for count in range(10, 201):
        top = values[:count]
        alpha = 1 + count / np.log(top / top[-1]).sum()
        law = stats.pareto(alpha - 1, scale=top[-1])
        fits.append((stats.kstest(top, law.cdf).statistic, alpha))
    assert power_law(values) == pytest.approx(min(fits)[1])


def test_too_few_values_have_no_power_law() -> None:
    assert power_law(np.array([3.0, 2.0, 1.0])) is None
