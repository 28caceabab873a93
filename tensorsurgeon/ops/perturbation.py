"""Perturb chosen weights: noise, ablation, coarse grids, permutations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError, UsageError, raise_all
from tensorsurgeon.groups import Chosen, choose, find_members
from tensorsurgeon.names import layer_name
from tensorsurgeon.ops.dequantization import FloatName, as_numbers, decoded
from tensorsurgeon.ops.dtypes import cast_tensor
from tensorsurgeon.ops.untying import TIE, head_name, untied
from tensorsurgeon.parameters import Layers, Words
from tensorsurgeon.quantized import find_modules, fp8
from tensorsurgeon.registry import operation
from tensorsurgeon.tensor import Block, LazyTensor, Pieces

Method = Literal["mult-gauss", "add-gauss", "ablate", "uniform-quant", "shuffle", "zero"]
Per = Literal["tensor", "channel"]
By = Literal["weight", "row", "column", "head", "smallest", "largest"]

FLOATS = ("F32", "F16", "BF16")
MOST_LEVELS = 2**24
"""Whole numbers up to here are exact in float32."""

TIED = "perturb: group: the head is tied to the embedding; --untie writes it by itself, so that only the head changes."


class Change(NamedTuple):
    """What is done to one tensor, of which `name` is the name and `chosen` the part."""

    method: str
    level: float
    seed: int
    per: str
    by: str
    name: str
    chosen: Chosen

    def apply(self, tensor: LazyTensor, dtype: str) -> LazyTensor:
        """Return the tensor with its part changed, rounded once to a dtype."""
        part, words = self.chosen.part, (self.method, self.name)
        if self.method in ("mult-gauss", "add-gauss"):
            settings = {"seed": self.seed, "words": words, "level": self.level}
            known = [self._find(tensor, "deviations", "F64")] if self.method == "add-gauss" else []
            return self._rowwise(tensor, dtype, "noise", settings, *known)
        if self.method == "uniform-quant":
            channels = self.per == "channel"
            width = 2 * (part.grid.outputs if channels else 1)
            known = [self._find(tensor, "extremes", "F32", width, channels=channels)]
            return self._rowwise(tensor, dtype, "grid", {"level": int(self.level), "channels": channels}, *known)
        if self.method == "zero":
            return self._rowwise(tensor, dtype, "zero", {})
        if self.method == "shuffle":
            grain = max(1, tensor.rows // part.grid.stacked)
            return self._rowwise(tensor, dtype, "shuffle", {"seed": self.seed, "words": words}, grain=grain)
        return self._ablated(tensor, dtype, (*words, self.by))

    def _ablated(self, tensor: LazyTensor, dtype: str, words: tuple[str, ...]) -> LazyTensor:
        drawn = {"seed": self.seed, "words": words}
        if self.by in ("smallest", "largest"):
            drawn |= {"largest": self.by == "largest"}
            known = self._find(tensor, "count ranks", "U64", 4, level=self.level, **drawn)
            for _ in range(2):
                known = self._find(tensor, "count ranks", "U64", 4, known, level=self.level, **drawn)
            return self._rowwise(tensor, dtype, "prune", drawn, self._find(tensor, "limits", "U64", 2, known, **drawn))
        drawn |= {"level": self.level}
        if self.by == "weight":
            return self._rowwise(tensor, dtype, "thin", drawn)
        if self.by == "head":
            at = layer_name(self.name)
            layer = f"{at.prefix}{at.index}" if at else ""
            drawn |= {"heads": self.chosen.heads, "words": (self.method, layer, self.chosen.role.mark, self.by)}
        return self._rowwise(tensor, dtype, "units", {**drawn, "inputs": self.by == "column"})

    def _find(
        self, tensor: LazyTensor, what: str, dtype: str, width: int = 1, *known: LazyTensor, **settings: Any
    ) -> LazyTensor:
        """Return what is found out of the whole tensor, a row for each stacked matrix."""
        part = self.chosen.part

        def find(pieces: Pieces, *blocks: Block) -> Block:
            from tensorsurgeon.kernels.ranking import REDUCTIONS

            return REDUCTIONS[what](pieces, *blocks, part=part, **settings)

        history = f"find {what} of {part}, {settings}"
        return tensor.reduced(find, *known, dtype=dtype, shape=(part.grid.stacked, width), history=history)

    def _rowwise(
        self, tensor: LazyTensor, dtype: str, what: str, settings: Mapping[str, Any], *known: LazyTensor, grain: int = 1
    ) -> LazyTensor:
        part = self.chosen.part

        def change(start: int, rows: Block, *blocks: Block) -> Block:
            from tensorsurgeon.kernels.perturbing import METHODS

            return METHODS[what](start, rows, *blocks, dtype=dtype, part=part, **settings)

        # A vector is one row to the kernels.
        grain = grain if len(tensor.shape) > 1 else max(1, tensor.rows)
        history = f"perturb: {what} of {part}, {dict(settings)}, to {dtype}"
        return tensor.rowwise(change, dtype=dtype, history=history, grain=grain, whole=known, placed=True)


@operation
def perturb(
    ckpt: Checkpoint,
    method: Method,
    group: Words,
    level: float | None = None,
    layers: Layers | None = None,
    seed: int = 0,
    per: Per = "tensor",
    by: By = "weight",
    untie: bool = False,
    dequantize: bool = False,
    requantize: bool = False,
    dtype: FloatName = "bfloat16",
) -> Checkpoint:
    """Change the numbers of chosen weights: with noise, by ablation, by a coarse grid, or by their order.

    With n standard normal: mult-gauss makes w (1 + level n); add-gauss w + level std(w) n; ablate sets weights to
    zero with probability level; uniform-quant rounds to level numbers at even distances between the least and the
    largest; shuffle permutes; zero sets all to zero. Level 0 changes no byte.

    A group is a word: attention, attention-q, -k, -v, -o, mlp and experts (dense and shared, and routed experts; also
    -gate, -up, -down), mixer (of tokens, without softmax), router, embedding, head, norm; or a pattern for names,
    which takes whole tensors, biases too. Of fused matrices only the part's rows or columns change; deviations, grids
    and shares are those of what is chosen of a tensor, of stacked experts those of each. Chance depends on the seed,
    the method, the tensor's name and the place in it, not on the level: what one sets to zero, a higher one does too.

    Args:
        method: What is done.
        group: The weights that change, with commas between.
        level: How much; of uniform-quant how many numbers are left. Only shuffle and zero need none.
        layers: Decoder layers to change; all, and what is outside of them, where not given.
        seed: Where chance begins; another seed gives other draws.
        per: Of uniform-quant, whether a grid is that of the tensor, or of each output channel.
        by: Of ablate, what goes at once: a weight, a row (an output, whichever way the matrix lies), a column, an
            attention head (the same in all matrices of a layer with as many heads), or just the level's share of the
            smallest or largest magnitudes.
        untie: Where head and embedding are tied, write the head by itself, so that only the one that is chosen changes.
        dequantize: Decode the model, all of it, to change chosen weights that are quantised.
        requantize: Quantise changed weights again that were block FP8; the others keep their bits.
        dtype: What weights become that are decoded.

    Raises:
        UsageError: for a level that the method does not have, and a group or layer that is not there.
        RefusedError: for quantised weights, for fused ones whose parts cannot be told apart, and for a tied head.
    """
    raise_all(UsageError, _slips(method, level, per, by, dequantize and requantize))
    found = find_modules(ckpt)
    if (dequantize or requantize) and not found.coded:
        raise UsageError(f"perturb: {'dequantize' if dequantize else 'requantize'}: no weight here is quantised.")
    source, twin = _separated(ckpt, group, untie)
    found = found if source is ckpt else find_modules(source)
    exact, quantized = as_numbers(source, found, dequantize or requantize)
    touched = sorted(quantized & set(find_members(exact, group, layers)))
    if touched and not (dequantize or requantize):
        raise RefusedError(
            f"perturb: {len(touched)} of the chosen tensors are quantised, for example {touched[0]!r}; --dequantize "
            "writes the model plain, and --requantize quantises changed weights again."
        )
    kept = decoded(source, found, dtype) if dequantize else source
    chosen = choose(exact, group, layers, method == "ablate" and by == "head")
    raise_all(RefusedError, _problems(exact, chosen, twin))
    tensors = dict(kept.tensors)
    for name, it in chosen.items() if level != 0 else ():
        again = name in quantized and not dequantize
        change = Change(method, 1.0 if level is None else level, seed, per, by, name, it)
        changed = change.apply(exact[name], "F32" if again else kept[name].dtype)
        if again:
            tensors |= fp8.requantized(kept, name, changed)
        else:
            tensors[name] = changed
    notes = []
    embedding = next((name for name, it in chosen.items() if it.role[:2] == ("embedding", "token")), None)
    if twin is not None and embedding and level != 0:
        notes.append(f"perturb: the head is tied to {embedding} and changes with it; --untie keeps it as it is.")
        tensors |= {twin: cast_tensor(tensors[embedding], kept[twin].dtype)} if twin else {}
    rows = [{"method": method, "level": level, **row} for row in _rows(chosen)]
    report = {**kept.report, "perturbed": [*kept.report.get("perturbed", ()), *rows]}
    return kept.replace(tensors=tensors, steps=ckpt.steps, report=report).warn(*notes)


def _slips(method: str, level: float | None, per: str, by: str, both: bool) -> Iterator[str]:
    """Yield what is wrong with the parameters by themselves."""
    if both:
        yield "perturb: dequantize and requantize are given; one writes plain weights, the other quantised ones."
    if per != "tensor" and method != "uniform-quant":
        yield f"perturb: per: {method} has no grids; only uniform-quant does."
    if by != "weight" and method != "ablate":
        yield f"perturb: by: {method} changes all weights; only ablate chooses among them."
    if level is None:
        if method not in ("shuffle", "zero"):
            yield f"perturb: level is missing; {method} needs one."
    elif not math.isfinite(level) or level < 0:
        yield f"perturb: level: {level} is no finite number from 0."
    elif method == "ablate" and level > 1:
        yield f"perturb: level: {level} is no probability; ablate takes 0 to 1."
    elif method in ("shuffle", "zero") and level not in (0, 1):
        yield f"perturb: level: {level} is neither 0 nor 1; {method} has no degrees."
    elif method == "uniform-quant" and level and not (level == int(level) and 2 <= level <= MOST_LEVELS):
        yield f"perturb: level: {level} is no whole number from 2 to {MOST_LEVELS}, as many as uniform-quant leaves."


def _separated(ckpt: Checkpoint, group: Sequence[str], untie: bool) -> tuple[Checkpoint, str | None]:
    """Return the checkpoint, its head by itself if it is to be untied, and the head that follows the embedding.

    That is None where nothing is tied, and empty where the head is not in the files.
    """
    matrices = [name for name in ckpt if len(ckpt[name].shape) == 2]
    embeddings = [name for name in matrices if ckpt.roles[name][:2] == ("embedding", "token")]
    heads = [name for name in matrices if ckpt.roles[name][:2] == ("head", "lm_head")]
    says = any(part.get(TIE) is True for part in (ckpt.text_config, ckpt.config.value))
    tied = bool(embeddings) and (says or not heads)
    if untie and not tied:
        raise UsageError("perturb: untie: head and embedding are not tied here.")
    if not tied:
        return ckpt, None
    if not untie:
        raise_all(RefusedError, [TIED] if "head" in group else [])
        return ckpt, heads[0] if heads else ""
    if not heads and len(embeddings) > 1:
        raise RefusedError(f"perturb: untie: cannot tell which of {', '.join(embeddings)} is tied to the head.")
    own = {} if heads else {head_name(ckpt, "perturb"): ckpt[embeddings[0]]}
    return ckpt.replace(tensors={**ckpt.tensors, **own}, config=untied(ckpt)), None


def _problems(ckpt: Checkpoint, chosen: Mapping[str, Chosen], twin: str | None) -> Iterator[str]:
    if twin in chosen and not any(it.role.group == "embedding" for it in chosen.values()):
        yield TIED
    if not chosen:
        yield "perturb: by: none of the chosen tensors has attention heads."
    for name in chosen:
        if ckpt[name].dtype not in FLOATS:
            yield f"perturb: {name}: is {ckpt[name].dtype}, not one of {', '.join(FLOATS)}."


def _rows(chosen: Mapping[str, Chosen]) -> Iterator[dict[str, Any]]:
    """Yield how many tensors of each role are chosen, and how many elements of them."""
    counts: dict[str, list[int]] = {}
    for role, part, _ in chosen.values():
        count = counts.setdefault(" ".join(filter(None, (role.group, role.mark, role.part))), [0, 0])
        count[0] += 1
        count[1] += part.elements
    for label, (tensors, elements) in counts.items():
        yield {"role": label, "tensors": tensors, "elements": elements}
