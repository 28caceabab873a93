"""What lies on disk under the name of one quantised module, and what it is as a plain tensor.

A module `model.layers.0.mlp.down_proj` has parts, named by what follows its name: `.weight`, `.weight_scale`; of a
parameter without `.weight`, such as fused experts, the part of the codes is the empty string.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.format import BITS
from tensorsurgeon.names import companions
from tensorsurgeon.tensor import LazyTensor

PLAIN = ("F64", "F32", "F16", "BF16")
"""Dtypes whose elements are numbers that mean themselves."""

SCALES = ("F32", "BF16", "F16")
"""Dtypes of scales that are plain numbers."""

WEIGHT = ".weight"

IDLE = {
    ".input_scale", ".activation_scale", ".input_global_scale", ".input_zero_point", ".output_scale", ".input_scale_ub",
    ".k_scale", ".v_scale", ".q_scale", ".prob_scale", ".prob_output_scale", "_input_scale", ".qscale_act",
    "_activation_scale", ".k_zero_point", ".v_zero_point", ".q_zero_point", ".act_global_scale",
    ".k_bias", ".v_bias",
}  # fmt: skip
"""Parts about activations and caches: without meaning for a plain weight."""

BESIDE_CODES = (
    "_scale",
    ".scale",
    ".biases",
    ".qscale_weight",
    ".qscale_act",
    ".shape",
    ".row_offsets",
    ".global_scale",
)
"""Parts with names that other things have too; they are parts only beside a weight that is no plain numbers."""


def is_code(dtype: str) -> bool:
    """Tell whether elements of a dtype may be codes rather than numbers."""
    return dtype not in PLAIN


@dataclass(frozen=True)
class Parts:
    """The tensors of one module by part, and `beside` it all that the checkpoint holds."""

    module: str
    tensors: Mapping[str, LazyTensor]
    beside: Mapping[str, LazyTensor] = field(default_factory=dict)

    def __getitem__(self, part: str) -> LazyTensor:
        return self.tensors[part]

    def __contains__(self, part: object) -> bool:
        return part in self.tensors

    def get(self, *parts: str) -> LazyTensor | None:
        """Return the first of the parts that is there."""
        return next((self.tensors[part] for part in parts if part in self.tensors), None)

    def has(self, *parts: str) -> bool:
        """Tell whether all of the parts are there."""
        return all(part in self.tensors for part in parts)

    def dtype(self, part: str) -> str | None:
        """Return the dtype of a part, or None where it is missing."""
        return self.tensors[part].dtype if part in self.tensors else None

    @property
    def code(self) -> str | None:
        """The part that holds codes under the weight's own name: `.weight`, or nothing for experts."""
        return next((part for part in (WEIGHT, "") if part in self.tensors), None)

    def place(self, part: str) -> str:
        """Return the name of a part that is there, with its file, as messages give it."""
        return f"{self.module}{part}{self.file(part)}"

    def file(self, part: str) -> str:
        """Return in words the file of a part that is there, or nothing where it lies in none."""
        span = self.tensors[part].span
        return f" in {span.path.name}" if span else ""

    def expect(self, part: str, dtypes: Sequence[str], shape: tuple[int, ...] | None = None) -> LazyTensor:
        """Return a part that has one of `dtypes` and, where it is given, a shape.

        Raises:
            RefusedError: for a part that is missing or is otherwise.
        """
        if part not in self.tensors:
            raise RefusedError(f"{self.module}{part}: is missing; the codes mean nothing without it, fetch it.")
        tensor = self.tensors[part]
        name = self.place(part)
        if tensor.dtype not in dtypes:
            raise RefusedError(f"{name}: is {tensor.dtype}, not {' or '.join(dtypes)}.")
        if shape is not None and tensor.shape != shape:
            raise RefusedError(
                f"{name}: has shape {list(tensor.shape)}, but {list(shape)} is needed; the group size or the file "
                "is wrong."
            )
        return tensor


class Plain(NamedTuple):
    """A quantised module as one logical tensor.

    `name` is the plain parameter's, `label` says the format in words, `parts` are those that it was made of, and
    `decode` gives the tensor in F32, BF16 or F16. `shared` are tensors of no single module that it was made of too.
    """

    name: str
    label: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    decode: Callable[[str], LazyTensor]
    shared: tuple[str, ...] = ()


class Format(NamedTuple):
    """A format on disk: whether parts are of it, and what they are as a plain tensor.

    `read` raises RefusedError with all that is wrong with a module; it sees headers and settings, and no codes.
    """

    name: str
    claims: Callable[[Parts, Settings], bool]
    read: Callable[[Parts, Settings], Plain]


class Settings(NamedTuple):
    """What is said of quantisation: `values` of the file `where`, and the `metadata` of safetensors files.

    `method` is the `quant_method`, in small letters.
    `model_type` is the config's: a few models hold weights the other way round than their quantised ones.
    """

    values: Mapping[str, Any]
    where: str
    metadata: Mapping[str, str]
    method: str | None
    model_type: str = ""

    def require(self, methods: Sequence[str], what: str) -> None:
        """Raise RefusedError where the config does not say one of the methods that the tensors show."""
        if self.method not in methods:
            raise RefusedError(
                f"{self.where}: the tensors are {what}, but quant_method is {self.method!r}; what is not in the "
                f"tensors cannot be known. One of {', '.join(methods)} would fit."
            )


def group(tensors: Mapping[str, LazyTensor]) -> dict[str, Parts]:
    """Return the parts of every module that holds a companion or codes, in the order of its first tensor."""
    described = companions(tensors)
    for name in [name for name in tensors if name.endswith(BESIDE_CODES)]:
        for part in BESIDE_CODES:
            module = name.removesuffix(part)
            beside = tensors.get(module + WEIGHT) or tensors.get(module) or tensors.get(module + ".compressed")
            of_codes = beside is not None and (is_code(beside.dtype) or f"{module}.compressed" in tensors)
            if name.endswith(part) and name not in described and of_codes:
                described[name] = module
    modules = set(described.values())
    found: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        weight = name.removesuffix(WEIGHT)
        if name in described:
            module = described[name]
        elif weight in modules or name in modules:
            module = weight if weight in modules else name
        elif tensor.dtype.startswith("F") and BITS[tensor.dtype] < 16:
            module = weight
        else:
            continue
        found.setdefault(module, {})[name[len(module) :]] = tensor
    return {module: Parts(module, parts, tensors) for module, parts in found.items()}


def coded(parts: Parts) -> bool:
    """Tell whether a module has codes, or parts that only codes have: more than a plain weight and idle parts."""
    meaning = [part for part in parts.tensors if part not in IDLE]
    return bool(meaning) and not (
        len(meaning) == 1 and meaning[0] == parts.code and not is_code(parts[meaning[0]].dtype)
    )


def leftover(parts: Parts, used: Iterable[str]) -> list[str]:
    """Return the parts that no decoding used and that mean something."""
    return [part for part in parts.tensors if part not in used and part not in IDLE]
