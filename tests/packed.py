"""Weights packed as GPTQ and AWQ pack them, bit by bit, with what they are; never by the code under test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import make

Array = np.ndarray[Any, Any]
MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"


class Codes(NamedTuple):
    """Random codes (out, in), zero points and scales (out, groups), and the group of each column."""

    codes: Array
    zeros: Array
    scales: Array
    index: Array

    @property
    def numbers(self) -> Array:
        """The weight in float32."""
        spread = (self.codes.astype(np.float32) - self.zeros.astype(np.float32)[:, self.index]) * self.scales[
            :, self.index
        ]
        assert spread.dtype == np.float32
        return spread


def codes(bits: int, shape: tuple[int, int], group: int, zeros: Sequence[int] | None = None, seed: int = 0) -> Codes:
    """Return random codes in groups of columns; `zeros` are the zero points to choose from."""
    chance = np.random.default_rng(seed)
    groups = -(-shape[1] // group)
    points = chance.choice(np.arange(2**bits) if zeros is None else np.array(zeros), (shape[0], groups))
    scales = np.exp(chance.normal(-4, 1, (shape[0], groups))).astype(np.float16).astype(np.float32)
    return Codes(chance.integers(0, 2**bits, shape), points, scales, np.arange(shape[1]) // group)


def stream(values: Array, bits: int) -> Array:
    """Pack each row into little-endian words, lowest bits first, the last word filled with zeros: int32."""
    words = []
    for row in values.tolist():
        number = sum((value & (2**bits - 1)) << (bits * place) for place, value in enumerate(row))
        count = -(-len(row) * bits // 32)
        words.append(np.frombuffer(number.to_bytes(4 * count, "little"), np.int32))
    return np.stack(words)


def borrowed(values: Array, bits: int) -> Array:
    """Pack rows less one as GPTQModel does: from each whole word, its padding included, one is taken in every field."""
    if 32 % bits:
        return stream(values - 1, bits)
    ones = sum(1 << place for place in range(0, 32, bits))
    return (stream(values, bits).view(np.uint32) - np.uint32(ones)).view(np.int32)


def planes(values: Array, bits: int) -> Array:
    """Pack each row as GPTQModel's planes: for 32 values those of low bits first, then of higher ones."""
    words = []
    for start in range(0, values.shape[1], 32):
        shift = 0
        for width in (4, 2, 1):
            if bits & width:
                words.append(stream(values[:, start : start + 32] >> shift, width))
                shift += width
    return np.concatenate(words, axis=1)


def interleaved(values: Array, bits: int = 4) -> Array:
    """Pack each row as AWQ does: of every eight columns, those with even numbers come first."""
    order = values.reshape(len(values), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
    return stream(order.reshape(values.shape), bits)


def tensor(array: Array) -> torch.Tensor:
    """Return an array as a tensor."""
    return torch.from_numpy(np.array(array, order="C"))


def gptq(
    held: Codes, bits: int, *, less_one: bool = True, index: bool = True, planar: bool = False
) -> dict[str, torch.Tensor]:
    """Return the parts of a GPTQ module."""
    pack = planes if planar else stream
    zeros = borrowed(held.zeros.T, bits) if less_one else pack(held.zeros.T, bits)
    parts = {
        "qweight": tensor(pack(held.codes, bits).T),
        "qzeros": tensor(zeros),
        "scales": tensor(held.scales.T.astype(np.float16)),
        "g_idx": tensor(held.index.astype(np.int32)),
    }
    return parts if index else {part: it for part, it in parts.items() if part != "g_idx"}


def save(directory: Path, parts: dict[str, torch.Tensor], settings: dict[str, Any] | None) -> Path:
    """Write a checkpoint of one module that is packed."""
    made = {f"{MODULE}.{part}": it for part, it in parts.items()} | {"model.norm.weight": torch.ones(4)}
    changes = {} if settings is None else {"quantization_config": settings}
    return make.save(directory, made, make.config(1, **changes))
