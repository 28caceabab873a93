"""LoRA adapters as PEFT writes them: which tensor is which, and what the config says of each pair.

    base_model.model.M.lora_A.weight          (rank, in)       a Linear named M in the model
    base_model.model.M.lora_B.weight          (out, rank)
    base_model.model.M.lora_embedding_A       (rank, rows)     an Embedding
    base_model.model.M.lora_embedding_B       (columns, rank)
    base_model.model.M.lora_magnitude_vector  (out)            DoRA
    base_model.model.M.weight                 as M's own       a module that was trained as a whole

The weight is `W + s B A`, of an embedding `W + s (B A)'`, with `s = lora_alpha / r`, or `lora_alpha / sqrt(r)` for
rsLoRA; `rank_pattern` and `alpha_pattern` give some modules other values.
Source: PEFT 0.21, utils/save_and_load.py and tuners/lora; vLLM 0.32, lora/peft_helper.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.tensor import LazyTensor

PREFIX = "base_model.model."
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.32 takes as `--max-lora-rank`."""


def served_rank(rank: int) -> int | None:
    """Return the least rank that vLLM takes and that is as high, or None for one above all."""
    return next((served for served in SERVED_RANKS if served >= rank), None)


_KEY = re.compile(
    r"^(?P<prefix>base_model\.model\.)?(?P<module>.+?)\."
    r"(?:(?P<part>lora_[AB]|lora_magnitude_vector)(?:\.(?P<adapter>\w+))??(?P<weight>\.weight|\.bias)?"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.\w+)?|(?P<whole>[^.]+))$"
)


class LoraKey(NamedTuple):
    """A tensor name of an adapter: the `module`, and the `part` of what it says of it.

    The part is A, B, embedding_A, embedding_B, magnitude, or the name of a parameter that is there as a whole.
    """

    module: str
    part: str
    prefixed: bool


def lora_key(name: str) -> LoraKey:
    """Take the name of an adapter's tensor apart."""
    match = _KEY.match(name)
    if not match:
        return LoraKey("", name, False)
    bias = "_bias" if match["weight"] == ".bias" else ""
    part = match["part"] or match["embedding"]
    word = part.removeprefix("lora_").removesuffix("_vector") + bias if part else match["whole"]
    return LoraKey(match["module"], word, bool(match["prefix"]))


def pair_names(module: str, embedding: bool = False) -> tuple[str, str]:
    """Return the names of a module's two factors, A and B."""
    kind, ending = ("embedding_", "") if embedding else ("", ".weight")
    a, b = (f"{PREFIX}{module}.lora_{kind}{side}{ending}" for side in "AB")
    return a, b


def lora_config(
    base: str,
    ranks: Mapping[str, int],
    targets: Iterable[str],
    task: str | None,
    whole: Iterable[str],
    transposed: bool,
) -> dict[str, Any]:
    """Return the config of an adapter whose scale is 1 everywhere: `lora_alpha` is the rank."""
    most = max(ranks.values(), default=0)
    patterns = {module: rank for module, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": list(targets),
        "modules_to_save": list(whole) or None,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
        "inference_mode": True,
    }


def target_names(chosen: Iterable[str], every: Iterable[str]) -> list[str]:
    """Return names that PEFT finds just the chosen modules by: short where all modules that end so are chosen."""
    chosen, others = list(chosen), list(every)
    left = {module for module in others if module not in set(chosen)}
    foreign = {module.rpartition(".")[2] for module in left}
    short = (module.rpartition(".")[2] for module in chosen)
    return sorted({name if name not in foreign else module for name, module in zip(short, chosen, strict=True)})


def scale_and_rank(config: Mapping[str, Any], module: str) -> tuple[float, int]:
    """Return what the product of a module's factors is multiplied by, and their rank, as the config has them."""
    rank = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if rank <= 0:
        return 0.0, 0
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), int(rank)


def _by_pattern(patterns: Any, module: str, default: Any) -> float:
    """Return the value of the first pattern that the module's name ends with, as PEFT matches it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(default) if isinstance(default, int | float) else 0.0


class LoraModule(NamedTuple):
    """What an adapter says of one module: its factors and, for DoRA, the length of every row.

    Scale and rank are what the config says, 0 where it does not.
    """

    a: LazyTensor | None = None
    b: LazyTensor | None = None
    embedding: bool = False
    magnitude: LazyTensor | None = None
    scale: float = 0.0
    rank: int = 0

    @property
    def factors(self) -> tuple[LazyTensor, LazyTensor]:
        """A and B, of a pair that was found to be whole."""
        assert self.a is not None
        assert self.b is not None
        return self.a, self.b

    @property
    def squares(self) -> float:
        """The sum of squares of what is added to the weight, in float64; both factors are read."""
        from tensorsurgeon.kernels.pairs import product_squares

        a, b = self.factors
        return product_squares(a.read(), b.read()) * self.scale**2


class Lora(NamedTuple):
    """An adapter taken apart: modules with factors, tensors that take another's place, and names of no known kind."""

    modules: Mapping[str, LoraModule]
    whole: Mapping[str, LazyTensor]
    unknown: tuple[str, ...]
    keys: Mapping[str, LoraKey]


def read_lora(ckpt: Checkpoint) -> Lora:
    """Take an adapter apart by the names of its tensors."""
    modules: dict[str, LoraModule] = {}
    whole: dict[str, LazyTensor] = {}
    unknown: list[str] = []
    keys = {name: lora_key(name) for name in ckpt}
    for name, (module, part, _) in keys.items():
        tensor = ckpt[name]
        held = modules.get(module) or LoraModule(None, None, False, None, *scale_and_rank(ckpt.config.value, module))
        match part:
            case "A":
                modules[module] = held._replace(a=tensor)
            case "B":
                modules[module] = held._replace(b=tensor)
            case "embedding_A":
                modules[module] = held._replace(a=tensor, embedding=True)
            case "embedding_B":
                modules[module] = held._replace(b=tensor, embedding=True)
            case "magnitude":
                modules[module] = held._replace(magnitude=tensor)
            case "weight" | "bias":
                whole[f"{module.removesuffix('.base_layer')}.{part}"] = tensor
            case _:
                unknown.append(name)
    return Lora(modules, whole, tuple(unknown), keys)


def half_pairs(lora: Lora) -> Iterator[str]:
    """Yield the pairs of which one factor is missing."""
    for module, held in lora.modules.items():
        if held.a is None or held.b is None:
            found, lost = ("A", "B") if held.b is None else ("B", "A")
            yield f"{module}: has lora_{found} but no lora_{lost}; half a pair."


def shape_problems(lora: Lora, base: Checkpoint, transposed: bool) -> Iterator[str]:
    """Yield what keeps whole pairs from fitting a model's weights."""
    for module, (a, b, embedding, *_) in lora.modules.items():
        weight = base.tensors.get(f"{module}.weight") or base.tensors.get(module)
        if a is None or b is None:
            continue
        if weight is None:
            yield f"{module}: the base has no such module; an engine would drop the pair without a word."
        elif len(weight.shape) != 2 or len(a.shape) != 2 or len(b.shape) != 2:
            yield f"{module}: has shape {list(weight.shape)}; a pair of factors belongs to two dimensions."
        else:
            rows, columns = weight.shape
            out, width = (columns, rows) if embedding or transposed else (rows, columns)
            if a.shape[0] != b.shape[1] or a.shape[1] != width or b.shape[0] != out:
                yield (
                    f"{module}: A is {list(a.shape)} and B {list(b.shape)}; {out} rows of {width} need A of "
                    f"[rank, {width}] and B of [{out}, rank]."
                )
