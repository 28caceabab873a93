"""A suite put to an engine: one record for each probe, text, question and answer, as plain dicts.

A record stands by itself: it names the model, the digest of its files, the engine and its settings, the suite, and
what was asked. Fields of generated answers have the names that the notebooks of the degradation study read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from tensorsurgeon.evaluate.benchmarks import run_task
from tensorsurgeon.evaluate.engine import Engine, Foreseen, Generation, Prompt, Sampling
from tensorsurgeon.evaluate.grading import find_script, first_position, is_right
from tensorsurgeon.evaluate.measures import Logits, Loss, log_softmax, total
from tensorsurgeon.evaluate.probing import Distributions, continuations, distribution, divergence_from, several
from tensorsurgeon.evaluate.questionnaire import Asked, Questionnaire, Windows
from tensorsurgeon.evaluate.suite_parts import Open, Prompted, Question

Record = dict[str, Any]
Keep = Callable[[Record], object]
Earlier = Mapping[tuple[str, str], Mapping[str, Any]]
"""Records that there are already, by their kind and the id of what was asked."""


def ask(
    engine: Engine,
    asked: Questionnaire,
    about: Mapping[str, Any],
    keep: Keep,
    base: Distributions | None = None,
    earlier: Earlier | None = None,
    distributions: bool = True,
    seed: int = 0,
) -> Distributions:
    """Put a suite to the model that an engine has loaded, hand each record to `keep`, and return the distributions.

    `about` is what each record says of the model; with a `base`'s distributions of the same vocabulary, divergences
    from it are measured too. What there is a record of from `earlier` is not recorded again, and asked again only
    where the `distributions` of all probes are needed, or where it was computed together with what is missing: a
    batch is always made of the same prompts. Answers by chance begin at `seed`.
    """
    earlier = earlier or {}
    common = {**about, "suite": asked.suite.name, "engine": engine.describe(), "batch_size": engine.settings.batch}
    perplexity: list[float | None] = []

    def record(kind: str, **fields: Any) -> None:
        if (kind, fields["prompt_id"]) not in earlier:
            keep(_plain({"record": kind, "timestamp": datetime.now(UTC).isoformat(), **common, **fields}))

    found: Distributions = {}
    engine.foresee(foreseen(asked, earlier, distributions, seed))
    probes = [it for it in asked.suite.probes if distributions or ("probe", it.id) not in earlier]
    prompts = [asked.prompts[it.id].tokens for it in probes]
    for probe, logits in zip(probes, engine.next_logits(prompts), strict=True):
        logprobs = log_softmax(logits)
        prompt = asked.prompts[probe.id]
        found[probe.id] = prompt.tokens, logprobs
        if ("probe", probe.id) in earlier:
            continue
        scored = continuations(engine, prompt.tokens, asked, logprobs)
        measured = distribution(asked, logits, logprobs, scored, probe.contrast)
        measured["kl"] = divergence_from((base or {}).get(probe.id), prompt.tokens, logprobs)
        record("probe", **_named(probe, prompt), contrast=list(probe.contrast), **measured)
    for text in asked.suite.texts:
        if ("text", text.id) in earlier:
            perplexity.append(earlier["text", text.id]["perplexity"])
            continue
        losses = [_loss(engine, held) for held in asked.windows[text.id]]
        loss = total(losses)
        perplexity.append(loss.perplexity)
        record(
            "text", prompt_group="perplexity", prompt_id=text.id, texts=len(losses), tokens=loss.tokens, nats=loss.nats,
            perplexity=loss.perplexity, bits_per_byte=loss.bits_per_byte,
        )  # fmt: skip
    for task in asked.suite.tasks:
        if ("task", task.id) not in earlier:
            scores = run_task(engine, asked.tokens, task, asked.room)
            record("task", prompt_group="tasks", prompt_id=task.id, limit=task.limit, chat=task.chat, scores=scores)
    whole = {"perplexity": perplexity[0] if perplexity else None}
    for batch in _batches(_answers(asked, seed), engine.settings.batch):
        if all((it.kind, it.id) in earlier for it in batch):
            continue
        made = engine.generate([it.prompt.given for it in batch], batch[0].sampling, asked.tokens.ends)
        for it, generation in zip(batch, made, strict=True):
            record(it.kind, **whole, **it.tell(_generated(asked, it.sampling, generation)))
    return found


def foreseen(asked: Questionnaire, earlier: Earlier, distributions: bool, seed: int) -> Foreseen:
    """Return what `ask` will have an engine compute of a suite."""
    continued = [(it.prompt.given, it.sampling) for it in _answers(asked, seed) if (it.kind, it.id) not in earlier]
    new = {tuple(asked.prompts[it.id].tokens) for it in asked.suite.probes if ("probe", it.id) not in earlier}
    logits = [asked.prompts[it.id].tokens for it in asked.suite.probes] if distributions else list(map(list, new))
    scores = [
        prompt
        for text in asked.suite.texts
        if ("text", text.id) not in earlier
        for held in asked.windows[text.id]
        for prompt in held.prompts
    ]
    if not asked.suite.least:
        scores += [[*prompt, *tokens] for prompt in new for tokens in several(asked)]
        return Foreseen(logits, scores, continued=continued)

    def following(prompt: Prompt, logits: Logits) -> list[list[int]]:
        found = several(asked, log_softmax(logits)) if tuple(prompt) in new else []
        return [[*prompt, *tokens] for tokens in found]

    return Foreseen(logits, scores, following, continued)


class _Answer(NamedTuple):
    """Something to be answered: the kind of its record and its id, what is asked, and what its record tells."""

    kind: str
    id: str
    prompt: Asked
    sampling: Sampling
    tell: Callable[[Record], Record]


def _answers(asked: Questionnaire, seed: int) -> Iterator[_Answer]:
    for question in asked.suite.questions:
        prompt = asked.prompts[question.id]
        tell = partial(_tell_question, question, prompt)
        yield _Answer("question", question.id, prompt, Sampling(question.tokens, seed=seed), tell)
    for it in asked.suite.all_open:
        prompt = asked.prompts[it.id]
        sampling = Sampling(it.tokens, it.temperature, seed if it.seed is None else it.seed)
        yield _Answer("open", it.id, prompt, sampling, partial(_tell_open, it, prompt))
    test = asked.suite.bilingual
    for (place, language), prompt in asked.translated.items():
        assert test
        tell = partial(_tell_bilingual, asked, place, language)
        yield _Answer("bilingual", f"{place}-{language}", prompt, Sampling(test.tokens, seed=seed), tell)


def _batches(answers: Iterable[_Answer], size: int) -> Iterator[list[_Answer]]:
    """Yield what is sampled alike, so many at a time."""
    for _, alike in groupby(answers, lambda it: it.sampling):
        waiting = list(alike)
        yield from (waiting[start : start + size] for start in range(0, len(waiting), size))


def _tell_question(question: Question, prompt: Asked, fields: Record) -> Record:
    right = is_right(fields["output"], question.answers, question.match)
    return {**_named(question, prompt), **fields, "expected": list(question.answers), "right": right}


def _tell_open(it: Open, prompt: Asked, fields: Record) -> Record:
    picture = prompt.pictured.picture if prompt.pictured else None
    image = {"image": picture and picture.name, "image_sha256": picture and picture.digest}
    return {**_named(it, prompt), **image, **fields}


def _tell_bilingual(asked: Questionnaire, place: int, language: str, fields: Record) -> Record:
    test, problem, prompt = asked.suite.bilingual, asked.problems[place], asked.translated[place, language]
    assert test
    expected = str(problem.answer)
    script = find_script(fields["output"])
    position = first_position(fields["output"], expected, fields["output_tokens"], asked.tokens.decode)
    return {
        "prompt_group": problem.category,
        "prompt_id": f"{place}-{language}",
        "form": prompt.form,
        "prompt_text": problem.text(test.wordings[language]),
        "prompt_tokens": len(prompt.tokens),
        "language": language,
        **fields,
        "expected": [expected],
        "right": position is not None,
        "answer_word": position.word if position else None,
        "answer_token": position.token if position else None,
        "answer_language": script.language,
        "cjk": script.cjk,
        "latin": script.latin,
    }


def _named(it: Prompted, prompt: Asked) -> dict[str, Any]:
    return {
        "prompt_group": it.group,
        "prompt_id": it.id,
        "prompt_text": it.text,
        "system": it.system,
        "form": prompt.form,
        "prompt_tokens": len(prompt.tokens),
    }


def _generated(asked: Questionnaire, sampling: Sampling, made: Generation) -> Record:
    return {
        "output": asked.tokens.decode(made.tokens),
        "output_tokens": list(made.tokens),
        "duration": made.seconds,
        "tokens": len(made.tokens),
        "ended": made.ended,
        "max_new_tokens": sampling.tokens,
        "temperature": sampling.temperature,
        "do_sample": sampling.temperature > 0,
        "seed": sampling.seed,
    }


def _loss(engine: Engine, held: Windows) -> Loss:
    scores = engine.score(held.prompts)
    nats = -sum(float(it.logprobs.sum()) for it in scores)
    return Loss(nats, sum(len(it.logprobs) for it in scores), held.bytes)


def _plain(value: Any) -> Any:
    """Return what JSON can hold: what is not a finite number becomes nothing."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
