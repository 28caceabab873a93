"""Compiled loops that unpack codes, against plain references and against codes packed bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import packed
from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.format import Span
from tensorsurgeon.kernels.codes import E4M3, INT8, UNSIGNED, Table, offset
from tensorsurgeon.kernels.interleaving import unpack_interleaved, unpack_interleaved_plainly
from tensorsurgeon.kernels.planes import unpack_planes, unpack_planes_plainly
from tensorsurgeon.kernels.scaling import Scaling, decode, decode_plainly
from tensorsurgeon.kernels.tables import few, look_up_places
from tensorsurgeon.kernels.unpacking import (
    transposed,
    unpack_columns,
    unpack_columns_plainly,
    unpack_rows,
    unpack_rows_plainly,
)
from tensorsurgeon.tensor import LazyTensor

CHANCE = np.random.default_rng(0)


def random(bits: int, shape: tuple[int, int]) -> packed.Array:
    """Return codes that hold every one of so many bits, where there is room for them."""
    values = np.arange(shape[0] * shape[1]) % 2**bits
    return CHANCE.permutation(values).reshape(shape)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 64), (17, 100), (40, 260)])
def test_rows_and_columns_are_what_was_packed(bits: int, shape: tuple[int, int]) -> None:
    values = random(bits, shape)
    words = packed.stream(values, bits)
    down = np.ascontiguousarray(words.T)
    for unpacked in (
        unpack_rows(words, bits, shape[1]),
        unpack_rows_plainly(words, bits, shape[1]),
        unpack_columns(down, bits, shape[1]),
        unpack_columns_plainly(down, bits, shape[1]),
    ):
        np.testing.assert_array_equal(unpacked, values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_are_what_was_packed(bits: int) -> None:
    values = random(bits, (9, 224))
    words = packed.stream(values, bits) if 32 % bits == 0 else packed.planes(values, bits)
    np.testing.assert_array_equal(unpack_planes(words, bits, 224), values)
    np.testing.assert_array_equal(unpack_planes_plainly(words, bits, 224), values)
    np.testing.assert_array_equal(unpack_planes(words, bits, 201), values[:, :201])


@pytest.mark.parametrize("bits", [4, 5, 6, 7])
@pytest.mark.parametrize("shape", [(1, 32), (8, 128), (35, 160), (100, 288)])
def test_interleaved_columns_are_what_was_packed(bits: int, shape: tuple[int, int]) -> None:
    values = random(bits, shape)
    words = packed.interleaved(values, bits)
    np.testing.assert_array_equal(unpack_interleaved(words, bits), values.T)
    np.testing.assert_array_equal(unpack_interleaved_plainly(words, bits), values.T)


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (33, 50)])
def test_a_transpose(shape: tuple[int, int]) -> None:
    words = CHANCE.integers(0, 2**32, shape, dtype=np.uint32)
    np.testing.assert_array_equal(transposed(words), words.T)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("table", [UNSIGNED, offset(4), offset(8), INT8, E4M3])
@pytest.mark.parametrize("zeros", [True, False])
def test_every_code_is_decoded_by_the_plain_formula(table: Table, zeros: bool, dtype: str) -> None:
    codes = np.tile(np.arange(256, dtype=np.uint8), (3, 2))
    scales = np.exp(CHANCE.normal(-4, 2, (3, 16))).astype(np.float32)
    scaling = Scaling(scales, 1, 32)
    if zeros:
        scaling = scaling._replace(zeros=CHANCE.integers(0, 256, (3, 16)).astype(np.float32))
    assert bytes(decode(codes, table, scaling, dtype).data) == bytes(decode_plainly(codes, table, scaling, dtype).data)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("zeros", [True, False])
def test_tables_for_columns_in_any_order_are_the_plain_formula(bits: int, zeros: bool, dtype: str) -> None:
    codes = random(bits, (5, 256)).astype(np.uint8)
    scaling = Scaling(np.exp(CHANCE.normal(-4, 2, (5, 8))).astype(np.float32))
    scaling = scaling._replace(places=CHANCE.permutation(np.arange(256) // 32).astype(np.int32))
    if zeros:
        scaling = scaling._replace(zeros=CHANCE.integers(0, 2**bits, (5, 8)).astype(np.float32))
    assert few(scaling, 2**bits, 256, dtype)
    plain = bytes(decode_plainly(codes, UNSIGNED, scaling, dtype).data)
    assert bytes(look_up_places(codes, UNSIGNED, scaling, 2**bits, dtype).data) == plain
    assert bytes(decode(codes, UNSIGNED, scaling, dtype).data) == plain


@pytest.mark.parametrize("width", [3, 5000])
def test_columns_near_and_far_are_read_alike(width: int, tmp_path: Path) -> None:
    numbers = CHANCE.integers(0, 2**31, (1100, width), dtype=np.int32)
    path = tmp_path / "numbers"
    path.write_bytes(b"12345" + numbers.tobytes())
    tensor = LazyTensor("I32", numbers.shape, Span(path, 5, numbers.nbytes))
    for start, stop in ((0, 1), (1, 3), (width - 1, width), (0, width)):
        block = tensor.read_columns(start, stop)
        assert block.shape == (1100, stop - start)
        assert bytes(block.data) == numbers[:, start:stop].tobytes()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="before"):
        tensor.read_columns(width - 1, width)
