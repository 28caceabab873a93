"""MXFP4 experts as gpt-oss publishes them: `quant_method: mxfp4`.

    M_blocks  U8  [experts, out, in / 32, 16]  two E2M1 a byte, the first in the low half
    M_scales  U8  [experts, out, in / 32]      E8M0

for M = ...experts.gate_up_proj and down_proj. `V[e, o, 32 k + 2 j] = E2M1[low half of b[e, o, k, j]] * 2^(s - 127)`, s
of [e, o, k]; the high half follows. The plain parameter M is V with in and out exchanged, [experts, in, out]: it is
decoded from columns of the codes.
Source: transformers, integrations/mxfp4.py; gpt-oss, gpt_oss/torch/weights.py.
"""

from __future__ import annotations

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.quantized.decoding import decode_codes, each_matrix, lazily
from tensorsurgeon.quantized.parts import Format, Parts, Plain, Settings
from tensorsurgeon.shaping import viewed
from tensorsurgeon.tensor import Block, Input, LazyTensor

BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32
LABEL = "MXFP4 experts, groups of 32"


def claims(parts: Parts, settings: Settings) -> bool:
    """Tell whether a module is of this format."""
    return BLOCKS in parts


def read(parts: Parts, settings: Settings) -> Plain:
    """Describe a module; see `Format`."""
    settings.require(("mxfp4",), "MXFP4 blocks and scales")
    blocks = parts.expect(BLOCKS, ("U8",))
    if len(blocks.shape) != 4 or blocks.shape[3] != GROUP // 2:
        raise RefusedError(
            f"{parts.module}{BLOCKS}: has shape {list(blocks.shape)}, but [experts, out, in / 32, 16] is needed."
        )
    experts, outputs, groups, _ = blocks.shape
    scales = parts.expect(SCALES, ("U8", "F8_E8M0"), (experts, outputs, groups))
    inputs = groups * GROUP
    codes = viewed(blocks, "U8", (experts, outputs, inputs // 2))

    def decode(dtype: str) -> LazyTensor:
        def decode_rows(start: int, packed: Block, exponents: Block) -> Block:
            from tensorsurgeon.kernels.arrays import as_bytes
            from tensorsurgeon.kernels.codes import E2M1, E8M0
            from tensorsurgeon.kernels.scaling import Scaling
            from tensorsurgeon.kernels.unpacking import transposed, unpack_row_pairs

            halves = unpack_row_pairs(transposed(as_bytes(packed)))
            powers = E8M0[transposed(as_bytes(exponents))]
            return decode_codes(halves, E2M1, Scaling(powers, GROUP), dtype)

        def matrix(packed: LazyTensor, exponents: LazyTensor) -> LazyTensor:
            sides = (Input(packed, 2, 1, columns=True), Input(exponents, GROUP, 1, columns=True))
            return lazily(decode_rows, *sides, dtype=dtype, shape=(inputs, outputs), label=LABEL)

        return each_matrix(matrix, codes, scales)

    return Plain(parts.module, LABEL, (experts, inputs, outputs), (BLOCKS, SCALES), decode)


FORMAT = Format("mxfp4", claims, read)
