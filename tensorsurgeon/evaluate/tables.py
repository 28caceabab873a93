"""Records as tables: what a terminal, a page and CSV show of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tensorsurgeon.evaluate.bilingual import summary

Record = Mapping[str, Any]
Rows = list[dict[str, Any]]

SHOWN = {
    "models": ("model", "engine", "version", "dtype", "device", "threads", "batch", "digest"),
    "probes": ("model", "group", "probe", "for", "against", "share", "mass", "first", "entropy, bits", "kl"),
    "labels": ("model", "probe", "set", "label", "spelling", "logit", "probability"),
    "answers": ("model", "group", "question", "answer", "expected", "right"),
    "long answers": ("model", "group", "prompt", "answer", "tokens", "ended"),
    "bilingual answers": ("model", "category", "language", "answer", "expected", "right", "word", "token"),
}
"""Columns that a terminal has room for, of the tables that have more."""
WIDTH = 48
"""Characters of an answer that a table shows; records hold it whole."""


def tables_of(records: Sequence[Record]) -> dict[str, Rows]:
    """Return the tables of an evaluation, without those that would be empty."""
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kinds.setdefault(record["record"], []).append(record)
    probes, texts = kinds.get("probe", []), kinds.get("text", [])
    questions, bilingual = kinds.get("question", []), kinds.get("bilingual", [])
    made = {
        "models": _models(records),
        "probes": [_probe(it) for it in probes],
        "perplexity": _perplexity(texts),
        "right answers": _right(questions),
        "bilingual": summary([dict(it) for it in bilingual]),
        "tasks": [{"model": it["model_name"], **score} for it in kinds.get("task", []) for score in it["scores"]],
        "answers": [_question(it) for it in questions],
        "long answers": [_open(it) for it in kinds.get("open", [])],
        "bilingual answers": [_bilingual(it) for it in bilingual],
        "labels": [row for it in probes for row in _labels(it)],
        "most probable tokens": [row for it in probes for row in _top(it)],
    }
    return {title: rows for title, rows in made.items() if rows}


def problems_of(records: Iterable[Record]) -> Iterator[str]:
    """Yield what no sound model gives: numbers that are none."""
    for record in records:
        where = f"{record['model_name']}: {record.get('prompt_id')}"
        if record["record"] == "probe" and record["entropy_nats"] is None:
            yield f"{where}: its logits are not numbers; 'autopsy' names the tensor."
        if record["record"] == "text" and record["nats"] is None:
            yield f"{where}: log probabilities of the text are not numbers; 'autopsy' names the tensor."


def _models(records: Sequence[Record]) -> Rows:
    found = {it["model_name"]: it for it in records}
    return [
        {"model": name, "suite": it["suite"], **it["engine"], "digest": it["digest"][:12]} for name, it in found.items()
    ]


def _probe(it: Record) -> dict[str, Any]:
    first = it["top"][0]
    return {
        "model": it["model_name"],
        "group": it["prompt_group"],
        "probe": it["prompt_id"],
        "form": it["form"],
        "for": it["contrast"][0],
        "against": it["contrast"][1],
        "share": it["contrast_ratio"],
        "mass": it["contrast_mass"],
        "first": json.dumps(first["spelling"], ensure_ascii=False),
        "probability": first["probability"],
        "entropy, nats": it["entropy_nats"],
        "entropy, bits": it["entropy_bits"],
        "kl": it["kl"],
        **{f"mass of {name}": mass for name, mass in it["mass"].items()},
    }


def _labels(it: Record) -> Iterator[dict[str, Any]]:
    for label in it["labels"]:
        yield {
            "model": it["model_name"],
            "probe": it["prompt_id"],
            "set": label["set"],
            "label": label["label"],
            "spelling": json.dumps(label["spelling"], ensure_ascii=False),
            "kind": label["kind"],
            "tokens": " ".join(map(str, label["tokens"])),
            "logit": label["logit"],
            "log probability": label["logprob"],
            "probability": label["probability"],
            "probability of the first token": label["first_probability"],
        }


def _top(it: Record) -> Iterator[dict[str, Any]]:
    for rank, entry in enumerate(it["top"], 1):
        yield {
            "model": it["model_name"],
            "probe": it["prompt_id"],
            "rank": rank,
            "token": entry["token"],
            "spelling": json.dumps(entry["spelling"], ensure_ascii=False),
            "logit": entry["logit"],
            "probability": entry["probability"],
        }


def _perplexity(texts: Sequence[Record]) -> Rows:
    """Return the perplexity of each text, and what it is of that of the first model."""
    first: dict[str, float | None] = {}
    rows = []
    for it in texts:
        base = first.setdefault(it["prompt_id"], it["perplexity"])
        value = it["perplexity"]
        rows.append(
            {
                "model": it["model_name"],
                "text": it["prompt_id"],
                "tokens": it["tokens"],
                "perplexity": value,
                "bits per byte": it["bits_per_byte"],
                "times the first": value / base if value and base else None,
            }
        )
    return rows


def _right(questions: Sequence[Record]) -> Rows:
    found: dict[tuple[str, str], list[bool]] = {}
    for it in questions:
        found.setdefault((it["model_name"], it["prompt_group"]), []).append(it["right"])
    return [
        {"model": model, "group": group, "right": sum(held), "of": len(held), "share": sum(held) / len(held)}
        for (model, group), held in found.items()
    ]


def _question(it: Record) -> dict[str, Any]:
    return {
        "model": it["model_name"],
        "group": it["prompt_group"],
        "question": it["prompt_id"],
        "prompt": it["prompt_text"],
        "answer": _short(it["output"]),
        "expected": " or ".join(it["expected"]),
        "right": it["right"],
        "tokens": it["tokens"],
        "ended": it["ended"],
        "seconds": it["duration"],
    }


def _open(it: Record) -> dict[str, Any]:
    return {
        "model": it["model_name"],
        "group": it["prompt_group"],
        "prompt": it["prompt_id"],
        "form": it["form"],
        "answer": _short(it["output"]),
        "tokens": it["tokens"],
        "ended": it["ended"],
        "seconds": it["duration"],
        "whole answer": it["output"],
    }


def _bilingual(it: Record) -> dict[str, Any]:
    return {
        "model": it["model_name"],
        "category": it["prompt_group"],
        "language": it["language"],
        "prompt": it["prompt_text"],
        "answer": _short(it["output"]),
        "expected": it["expected"][0],
        "right": it["right"],
        "word": it["answer_word"],
        "token": it["answer_token"],
        "answered in": it["answer_language"],
        "tokens": it["tokens"],
        "whole answer": it["output"],
    }


def _short(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= WIDTH else f"{plain[: WIDTH - 1]}…"
