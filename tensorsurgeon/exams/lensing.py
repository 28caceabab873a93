"""Tell layer by layer what a model would say next: the exam that looks through the logit lens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tensorsurgeon.charts import Chart, Panel, Point, Series, scaled
from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import UsageError, raise_all
from tensorsurgeon.evaluate.prompts import GivenPrompt, read_prompts
from tensorsurgeon.parameters import Count, File, Several, Words
from tensorsurgeon.progress import progress_bar
from tensorsurgeon.registry import Findings, exam, open_model
from tensorsurgeon.running import running

if TYPE_CHECKING:
    from tensorsurgeon.evaluate.tokens import Tokens
    from tensorsurgeon.forward.lensing import Seen

SHOWN = {
    "next token": ("model", "prompt", "depth", "bits", "top", "p", "final p", "final rank", "kl"),
    "depths": ("model", "depth", "bits", "kl", "agrees", "rms"),
    "lens": ("model", "prompt", "position", "token", "depth", "bits", "top", "p", "final rank", "kl"),
    "models": ("model", "layers", "settled", "settled, relative", "settled, all positions", "bits at the end"),
}
CURVES = {
    "bits": "entropy, bits",
    "kl": "divergence from the end, nats",
    "agrees": "share of positions that say what the end says",
    "settled": "share of positions that have settled",
}
"""What is drawn by depth: columns of the table of depths, as measures of a chart."""
Row = dict[str, Any]


class Asked(NamedTuple):
    """A prompt as a model gets it."""

    text: str
    tokens: list[int]


@exam
def lens(
    ckpt: Checkpoint,
    prompts: File,
    beside: Several | None = None,
    words: Words | None = None,
    top: Count = 5,
    chat: bool = False,
    last: bool = False,
    norm: Literal["own", "no-beta", "none"] = "own",
    head: Literal["float32", "own"] = "float32",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Findings:
    """Tell layer by layer what a model would say next, through the logit lens, streamed from the disk.

    The model is never held whole: each layer is read, run on all prompts, and dropped. At each depth, the number of
    layers that were run, the states go through the model's own final norm and head: entropy, the most probable tokens,
    the rank and probability of what the whole model says, and the divergence `kl` from it, in nats. A position has
    `settled` at the first depth from which the most probable token is that of the whole model and stays it.

    The logits behind the last layer are held against those of the model's own forward in every run: they are the same
    to the bit. Depth 0 is the embedding, and the states behind the last layer are those before the final norm. The
    same machine, threads and versions give the same bits; all are in the table of the model.

    Args:
        prompts: A file with a prompt on each line, or .jsonl with {"prompt": …} on each, and "system" for chats.
        beside: Further models to compare with, on the same prompts.
        words: Words whose probability and best rank are told too: of the tokens that spell them, with a space or
            without, or else of those that they begin with.
        top: How many of the most probable tokens are told.
        chat: Put each prompt into the model's chat template, up to where its answer begins.
        last: Look at the last position of each prompt alone.
        norm: The model's own norm; without the beta that it adds; or none at all.
        head: What the products of the head are computed in: float32, or the dtype of the layers.
        dtype: What the layers are computed in.
    """
    given = read_prompts(Path(prompts))
    models = [ckpt, *map(open_model, beside or ())]
    raise_all(UsageError, (f"{it.sources[0].name}: is an adapter; give a model." for it in models if it.is_adapter))
    names = _names(models)
    tables: dict[str, list[Row]] = {"models": [], "settled": [], "depths": [], "next token": [], "lens": []}
    for name, model in zip(names, models, strict=True):
        found = _look(model, given, words or (), top, chat, last, norm, head, dtype)
        label = {"model": name} if len(models) > 1 else {}
        for title, rows in found.items():
            tables[title] += [{**label, **row} for row in rows]
    if len(models) == 1:
        tables = {"model": [{"name": names[0], **tables.pop("models")[0]}], **tables}
    return Findings(tables, shown=SHOWN, charts=list(_charts(tables["depths"])))


def _names(models: Sequence[Checkpoint]) -> list[str]:
    names = [" ".join([it.sources[0].name, *(step.name for step in it.steps)]) for it in models]
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]


def _look(
    ckpt: Checkpoint,
    given: Sequence[GivenPrompt],
    words: Sequence[str],
    top: int,
    chat: bool,
    last: bool,
    norm: Any,
    head: str,
    dtype: Any,
) -> dict[str, list[Row]]:
    from tensorsurgeon.evaluate.tokens import Tokens
    from tensorsurgeon.forward.lensing import Lens

    tokens = Tokens(ckpt.sources[0].directory)
    tracked = {word: _spellings(tokens, word) for word in words}
    asked = [Asked(it.text, tokens.chat(it.text, it.system, {})[0] if chat else tokens.encode(it.text)) for it in given]
    with progress_bar(ckpt.layers.count + 1, "lens", running().quiet, "layer") as advance:
        seen = Lens(ckpt, [it.tokens for it in asked], dtype, norm, head == "float32", advance)
    depth = seen.stream.depth
    rows = [
        row for it in seen.see(top, list(tracked.values()), last) for row in _rows(it, asked, tokens, depth, tracked)
    ]
    rows.sort(key=lambda row: (row["prompt"], row["position"], row["depth"]))
    settled = list(_settled(rows, depth, asked))
    return {
        "models": [{**_summary(rows, settled, depth), **seen.describe()}],
        "settled": settled,
        "depths": list(_depths(rows, settled, depth)),
        "next token": [row for row in rows if row["position"] == len(asked[row["prompt"] - 1].tokens) - 1],
        "lens": rows,
    }


def _spellings(tokens: Tokens, word: str) -> list[int]:
    """Return the tokens that spell a word, with a space before it or without; or else those that it begins with."""
    whole = [number for number, text in enumerate(tokens.spellings) if text.strip() == word]
    return whole or sorted({tokens.after(text)[0] for text in (word, f" {word}")})


def _rows(
    it: Seen, asked: Sequence[Asked], tokens: Tokens, depth: int, tracked: Mapping[str, Sequence[int]]
) -> Iterator[Row]:
    reading = it.reading
    for place, position in enumerate(it.positions):
        best = reading.top[place].tolist()
        shares = reading.shares[place].tolist()
        told: Row = {}
        for number, word in enumerate(tracked):
            told[f"p({word})"] = float(reading.tracked[place, number])
            told[f"rank({word})"] = int(reading.tracked_ranks[place, number])
        yield {
            "prompt": it.prompt + 1,
            "position": position,
            "token": tokens.spelling(asked[it.prompt].tokens[position]),
            "depth": it.depth,
            "relative depth": it.depth / depth,
            "entropy": float(reading.entropy[place]),
            "bits": float(reading.bits[place]),
            "top": tokens.spelling(best[0]),
            "p": shares[0],
            "final p": float(reading.share[place]),
            "final rank": int(reading.rank[place]),
            "kl": float(reading.kl[place]),
            **told,
            "rms": float(it.rms[place]),
            "mean": float(it.mean[place]),
            "deviation": float(it.deviation[place]),
            "top tokens": [tokens.spelling(token) for token in best],
            "probabilities": shares,
            "top ids": best,
        }


def _settled(rows: Sequence[Row], depth: int, asked: Sequence[Asked]) -> Iterator[Row]:
    """Yield for each position from which depth on it says what the whole model says."""
    from tensorsurgeon.forward.readings import settled

    for start in range(0, len(rows), depth + 1):
        column = rows[start : start + depth + 1]
        from_depth = settled([row["top ids"][0] for row in column])
        first, end = column[0], column[-1]
        yield {
            "prompt": first["prompt"],
            "position": first["position"],
            "last": first["position"] == len(asked[first["prompt"] - 1].tokens) - 1,
            "token": first["token"],
            "says": end["top"],
            "p": end["p"],
            "bits": end["bits"],
            "settled": from_depth,
            "relative depth": from_depth / depth,
        }


def _depths(rows: Sequence[Row], settled: Sequence[Row], depth: int) -> Iterator[Row]:
    for number in range(depth + 1):
        here = [row for row in rows if row["depth"] == number]
        yield {
            "depth": number,
            "relative depth": number / depth,
            **{key: fmean(row[key] for row in here) for key in ("entropy", "bits", "kl")},
            "agrees": fmean(row["final rank"] == 1 for row in here),
            "settled": fmean(row["settled"] <= number for row in settled),
            **{key: fmean(row[key] for row in here) for key in ("rms", "mean", "deviation")},
        }


def _summary(rows: Sequence[Row], settled: Sequence[Row], depth: int) -> Row:
    """Return what one model's line in a comparison says, of the last positions and of all."""
    last = [row for row in settled if row["last"]]
    return {
        "prompts": len(last),
        "positions": len(settled),
        "settled": fmean(row["settled"] for row in last),
        "settled, relative": fmean(row["relative depth"] for row in last),
        "settled, all positions": fmean(row["settled"] for row in settled),
        "bits at the end": fmean(row["bits"] for row in last),
        "peak of bits at": max(_depths(rows, settled, depth), key=lambda row: row["bits"])["depth"],
    }


def _charts(depths: Sequence[Row]) -> Iterator[Chart]:
    """Yield what happens with depth as curves, one for each model."""
    ticks = [(it / 4, f"{it / 4:g}") for it in range(5)]
    for column, measure in CURVES.items():
        series = [
            Series(name, [_point(row, column, measure) for row in depths if row.get("model", "") == name])
            for name in dict.fromkeys(row.get("model", "") for row in depths)
        ]
        chart = scaled("By depth", measure, "curves", "relative depth", [Panel("", series, ticks)])
        yield chart if column == "kl" else chart._replace(log=False)


def _point(row: Row, column: str, measure: str) -> Point:
    where = ", ".join(filter(None, (row.get("model"), f"after {row['depth']} layers")))
    return Point(row["relative depth"], row[column], None, f"{where}: {measure} {row[column]:.4g}")
