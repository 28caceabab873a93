"""Results as a sweep leaves them: of the mannequin's variants, asked by transformers; and made by hand."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tensorsurgeon as ts
from tensorsurgeon.checkpoint import Step
from tensorsurgeon.evaluate.asking import ask
from tensorsurgeon.evaluate.engine import Settings
from tensorsurgeon.evaluate.engines.transformers import TransformersEngine
from tensorsurgeon.evaluate.questionnaire import Questionnaire
from tensorsurgeon.evaluate.suite import load_suite
from tensorsurgeon.evaluate.tokens import Tokens
from tensorsurgeon.registry import apply_steps

MANNEQUIN = Path(__file__).parent / "mannequin" / "bf16"
LAYERS = 6
SEED = 42

SUITE = {
    "about": "A little of each kind.",
    "labels": {"affirm": ["yes"], "deny": ["no", "nope"]},
    "probes": [
        {"id": "larger", "group": "control", "text": "Is 38 greater than 18?"},
        {"id": "smaller", "group": "control", "text": "Is 4 greater than 62?"},
    ],
    "texts": [{"id": "sentences", "texts": ["Amina had 54 coins and found 65 more, so now she has 119."]}],
    "questions": [
        {"id": "sum", "group": "math", "text": "What is 14 plus 50?", "answers": ["64"], "tokens": 6},
        {"id": "difference", "group": "math", "text": "What is 81 minus 36?", "answers": ["45"], "tokens": 6},
        {"id": "even", "group": "words", "text": "Is 40 even?", "answers": ["yes"], "match": "word", "tokens": 6},
    ],
    "open": [{"id": "go-on", "group": "behaviour", "form": "completion", "text": "Amina had", "tokens": 16}],
}

Make = Callable[[int], list[dict[str, Any]]]
"""The steps of a variant, for the seed of a repetition."""


def sweep(
    directory: Path,
    variants: Mapping[str, Make],
    tells: Mapping[str, Mapping[str, Any]],
    repeats: int = 1,
    baseline: str | None = "baseline",
    suite: Mapping[str, Any] = SUITE,
    source: Path = MANNEQUIN,
) -> Path:
    """Write the results of a study, and return their directory; `tells` is what records say of each variant."""
    directory.mkdir(parents=True)
    (directory / "suite.yaml").write_text(json.dumps(suite))
    listed = [
        {
            "name": name,
            "values": tells[name].get("values", {}),
            "source": str(source),
            "steps": make(SEED),
            "base": None,
        }
        for name, make in variants.items()
    ]
    study = {
        "name": directory.name, "about": "A study of the mannequin.", "tensorsurgeon": ts.__version__,
        "source": str(source), "suite": "little", "repeats": repeats, "seed": SEED, "baseline": baseline,
        "variants": listed,
    }  # fmt: skip
    (directory / "study.json").write_text(json.dumps(study))
    engine = TransformersEngine(Settings())
    # To take a model looks for garbage, which is slow among all that was imported.
    gc.freeze()
    base = None
    with (directory / "records.jsonl").open("w") as file:
        for name, make in variants.items():
            for repetition in range(repeats):
                found = measured(engine, directory, make(SEED + repetition), source)
                common = {
                    "study": directory.name, "variant": name, "repeat_index": repetition, "values": {},
                    "source_layers": LAYERS, "layers": None, "built": "written", "batch_size": 1,
                    "degradation_method": None, "level_value": None, "std_dev": None, "param_group_name": None,
                    "model_name": source.name, **tells[name], "seed": SEED + repetition,
                }  # fmt: skip
                records, distributions = found(common, base)
                base = base or (distributions if name == baseline else None)
                file.writelines(json.dumps(it) + "\n" for it in records)
    engine.close()
    gc.unfreeze()
    return directory


def measured(engine: TransformersEngine, directory: Path, steps: Sequence[Mapping[str, Any]], source: Path) -> Any:
    """Load a variant, and return what asks it."""
    ckpt = apply_steps(ts.open(source), [Step(name, values) for step in steps for name, values in step.items()])
    place = source
    if steps:
        place = directory / "model"
        ts.write(ckpt, place, overwrite=True, quiet=True)
    engine.load(place, 256)

    def found(common: Mapping[str, Any], base: Any) -> tuple[list[dict[str, Any]], Any]:
        records: list[dict[str, Any]] = []
        form = Questionnaire(load_suite(str(directory / "suite.yaml")), Tokens(place), 256)
        distributions = ask(engine, form, common, records.append, base)
        perplexity = next((it["perplexity"] for it in records if it["record"] == "text"), None)
        return [it if "perplexity" in it else {**it, "perplexity": perplexity} for it in records], distributions

    return found


def layers(directory: Path, delete: Sequence[tuple[int, int]], double: Sequence[tuple[int, int]] = ()) -> Path:
    """Sweep over windows of layers, of a size and from a first layer."""
    variants: dict[str, Make] = {"baseline": lambda _: []}
    tells: dict[str, dict[str, Any]] = {"baseline": {"layers": [*range(LAYERS)]}}
    for kind, windows in (("delete", delete), ("double", double)):
        for size, first in windows:
            window = [*range(first, first + size)]
            text = f"{first}" if size == 1 else f"{first}-{first + size - 1}"
            before, after = [*range(first)], [*range(first + size, LAYERS)]
            kept = [*before, *window, *window, *after] if kind == "double" else [*before, *after]
            step = {"select-layers": {"layers": ",".join(map(str, kept))}}
            variants[f"{kind}-{text}"] = partial(_always, [step])
            tells[f"{kind}-{text}"] = {"values": {"layers": text}, "layers": kept}
    return sweep(directory, variants, tells)


def _always(steps: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    return steps


def levels(
    directory: Path,
    method: str = "mult-gauss",
    values: Sequence[float] = (0, 0.35, 0.7),
    groups: Sequence[str] = ("attention", "mlp"),
    repeats: int = 3,
    baseline: str | None = "baseline",
) -> Path:
    """Sweep over levels of noise, with repetitions."""
    variants: dict[str, Make] = {"baseline": lambda _: []} if baseline else {}
    tells: dict[str, dict[str, Any]] = {"baseline": {"layers": [*range(LAYERS)]}}
    for group in groups:
        for level in values:

            def make(seed: int, group: str = group, level: float = level) -> list[dict[str, Any]]:
                return [{"perturb": {"method": method, "level": level, "group": group, "seed": seed}}]

            name = f"{method}-{group}-{level}"
            variants[name] = make
            tells[name] = {
                "values": {"group": group, "level": level}, "degradation_method": method, "level_value": level,
                "std_dev": level, "param_group_name": group,
            }  # fmt: skip
    return sweep(directory, variants, tells, repeats, baseline)


def text(variant: int, perplexity: float | None, repetition: int = 0, **more: Any) -> dict[str, Any]:
    """Return the record of a text."""
    return {
        "record": "text", "variant": f"v{variant}", "repeat_index": repetition, "prompt_id": "t",
        "prompt_group": "perplexity", "perplexity": perplexity, "tokens": 9, **more,
    }  # fmt: skip


def question(variant: int, right: bool, repetition: int = 0, group: str = "math", **more: Any) -> dict[str, Any]:
    """Return the record of an answer that is right or wrong."""
    return {
        "record": "question", "variant": f"v{variant}", "repeat_index": repetition, "prompt_id": f"q-{group}",
        "prompt_group": group, "prompt_text": "1 + 1?", "output": "2" if right else "3", "right": right,
        "expected": ["2"], "tokens": 1, "ended": True, **more,
    }  # fmt: skip


def probe(variant: int, kl: float | None, entropy: float | None = 0.5, **more: Any) -> dict[str, Any]:
    """Return the record of a probe."""
    return {
        "record": "probe", "variant": f"v{variant}", "repeat_index": 0, "prompt_id": "p", "prompt_group": "binary",
        "mass": {"affirm": 0.25, "deny": 0.5}, "contrast": ["affirm", "deny"], "contrast_mass": 0.75,
        "contrast_ratio": 1 / 3, "entropy_nats": entropy, "kl": kl, **more,
    }  # fmt: skip


def write_study(directory: Path, *records: Mapping[str, Any], variants: int = 3, **changes: Any) -> Path:
    """Write results made by hand: variants v0, v1, ..., of which the first is the baseline."""
    directory.mkdir(parents=True)
    study = {
        "name": directory.name, "about": None, "tensorsurgeon": "0", "source": "model", "suite": "quick", "repeats": 1,
        "seed": 0, "baseline": "v0", "variants": [{"name": f"v{it}", "values": {}} for it in range(variants)],
        **changes,
    }  # fmt: skip
    (directory / "study.json").write_text(json.dumps(study))
    (directory / "records.jsonl").write_text("".join(json.dumps(it) + "\n" for it in records))
    return directory


def changed_study(directory: Path, changes: Mapping[str, Any]) -> Path:
    """Write results of one variant with something else in study.json."""
    write_study(directory, text(0, 2.0), variants=1)
    study = json.loads((directory / "study.json").read_text())
    (directory / "study.json").write_text(json.dumps({**study, **changes}))
    return directory
