"""The loops that decode codes, against their formulas in NumPy and against torch's own dtypes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.kernels import codes as tables
from tensorsurgeon.kernels.scaling import Scaling, decode, decode_plainly
from tensorsurgeon.kernels.tables import look_up, worthwhile
from tensorsurgeon.kernels.unpacking import transposed, unpack_lanes, unpack_row_pairs, unpack_rows, unpack_rows_plainly

CHANCE = np.random.default_rng(6)
Array = np.ndarray[Any, Any]


def random(*shape: int) -> Array:
    return CHANCE.normal(0, 0.1, shape).astype(np.float32)


def test_tables_are_what_torch_makes_of_the_codes() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for table, dtype in ((tables.E4M3, torch.float8_e4m3fn), (tables.E8M0, torch.float8_e8m0fnu)):
        np.testing.assert_array_equal(table, codes.view(dtype).float().numpy())
    np.testing.assert_array_equal(tables.INT8, codes.view(torch.int8).float().numpy())


def test_small_floats_are_the_numbers_of_the_specification() -> None:
    # OCP Microscaling Formats (MX) v1.0, sections 5.3.2 and 5.3.3.
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert tables.E2M1[:16].tolist() == positive + [-it for it in positive]
    assert tables.E2M3[[1, 7, 8, 16, 24, 31, 63]].tolist() == [0.125, 0.875, 1, 2, 4, 7.5, -7.5]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 32, 100, 257])
def test_streams_are_unpacked_as_bit_by_bit(bits: int, columns: int) -> None:
    words = -(-columns * bits // 32)
    packed = CHANCE.integers(0, 2**32, (5, words), dtype=np.uint32)
    np.testing.assert_array_equal(unpack_rows(packed, bits, columns), unpack_rows_plainly(packed, bits, columns))


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_lanes_are_whole_codes_of_a_word(bits: int) -> None:
    each = 32 // bits
    codes = CHANCE.integers(0, 2**bits, (4, 3 * each))
    words = [[sum(int(c) << bits * k for k, c in enumerate(row[w : w + each])) for w in range(0, 3 * each, each)]
             for row in codes]  # fmt: skip
    np.testing.assert_array_equal(unpack_lanes(np.array(words, np.uint32), bits, 3 * each - 2), codes[:, :-2])


@pytest.mark.parametrize("shape", [(1, 1), (33, 65), (64, 32), (100, 7)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_a_transpose_is_numpys(shape: tuple[int, int], dtype: Any) -> None:
    matrix = CHANCE.integers(0, 100, shape).astype(dtype)
    np.testing.assert_array_equal(transposed(matrix), matrix.T)


def test_halves_of_bytes_become_rows() -> None:
    packed = CHANCE.integers(0, 256, (3, 5), dtype=np.uint8)
    halves = unpack_row_pairs(packed)
    np.testing.assert_array_equal(halves[0::2], packed % 16)
    np.testing.assert_array_equal(halves[1::2], packed // 16)


def variants() -> dict[str, Scaling]:
    rows, groups = 37, 9
    full = {"scales": random(rows, groups), "columns": 16}
    return {
        "groups": Scaling(**full),
        "zeros": Scaling(**full, zeros=CHANCE.integers(0, 16, (rows, groups)).astype(np.float32)),
        "biases": Scaling(**full, biases=random(rows, groups)),
        "factors": Scaling(**full, factors=random(130)),
        "divided": Scaling(1 + abs(random(rows, groups)), columns=16, divide=True),
        "places": Scaling(random(rows, groups), places=CHANCE.integers(0, groups, 130).astype(np.int32)),
        "places, zeros": Scaling(
            random(rows, groups), zeros=random(rows, groups), places=CHANCE.integers(0, groups, 130).astype(np.int32)
        ),
        "blocks": Scaling(random(4, 3), 16, 64, start=11),
        "one for all": Scaling(random(1, 1), 37, 130),
        "one a row": Scaling(random(rows, 1), 1, 130),
        "one a column": Scaling(random(1, 130), 37, 1),
        "extreme": Scaling(np.array([[3e38, 1e-45, np.inf]], np.float32), 37, 64),
    }


@pytest.mark.parametrize("name", variants())
@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
@pytest.mark.parametrize("table", ["E4M3", "INT8", "OFFSET4"])
def test_the_compiled_loop_is_the_formula(name: str, dtype: str, table: str) -> None:
    scaling = variants()[name]
    codes = np.tile(np.arange(256, dtype=np.uint8), 19)[: 37 * 130].reshape(37, 130)
    if dtype == "F16" and name == "extreme":
        for function in (decode, decode_plainly):
            with pytest.raises(RefusedError, match="does not fit float16"):
                function(codes, tables.named(table), scaling, dtype)
        return
    wanted = bytes(decode_plainly(codes, tables.named(table), scaling, dtype).data)
    assert bytes(decode(codes, tables.named(table), scaling, dtype).data) == wanted
    if not any(it.size for it in (scaling.zeros, scaling.biases, scaling.factors, scaling.places)):
        assert bytes(look_up(codes, tables.named(table), scaling, dtype).data) == wanted


def test_tables_are_taken_where_many_codes_share_a_scale() -> None:
    assert worthwhile(Scaling(random(1, 1), 128, 128), "BF16")
    assert not worthwhile(Scaling(random(1, 1), 1, 128), "BF16")
    assert not worthwhile(Scaling(random(1, 1), 128, 128, zeros=random(1, 1)), "BF16")
