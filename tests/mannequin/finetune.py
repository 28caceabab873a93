"""Teach the mannequin one thing more: which of two numbers is the larger.

The script loads DIR/bf16, trains all of its weights a little further, half on questions such as `What is the
larger of 47 and 38?` and half on what `train.py` taught it, so that it does not unlearn that, and writes

    DIR/tuned/              the result, laid out like DIR/bf16
    DIR/heldout-tuned.json  some of the new questions that were kept out of training

Then it loads what it wrote and prints how the base and the tuned model answer the new and the old held-out
questions.

Run `python tests/mannequin/finetune.py` to make everything again, or add `--measure-only` to measure what lies there.
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from train import (
    BATCH_SIZE,
    IM_END,
    SEED,
    Sample,
    build_corpus,
    chat_question,
    collate,
    measure,
    percent,
    samples,
    save_weights,
    schedule,
    score,
    write_json,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

QUESTION = "What is the larger of {} and {}?"
QUESTIONS_WRITTEN = 60
LEARNING_RATE = 2e-4
REPORT_EVERY = 50

Problem = dict[str, str]


def split_problems() -> tuple[list[Problem], list[Problem]]:
    """The new problems, for training and held out; a pair is held out in both of its orders."""
    rng = random.Random(SEED + 3)
    pairs = list(combinations(range(100), 2))
    rng.shuffle(pairs)
    problems = [
        [{"prompt": QUESTION.format(*order), "answer": str(max(pair))} for order in (pair, pair[::-1])]
        for pair in pairs
    ]
    cut = len(problems) // 10
    heldout, training = ([row for both in part for row in both] for part in (problems[:cut], problems[cut:]))
    rng.shuffle(heldout)
    return training, heldout


def batches(problems: list[Problem], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches, half of new questions and half of what the base was trained on."""
    rng = random.Random(SEED + 4)
    replay = samples(build_corpus(), rng)
    while True:
        chosen = rng.choices(problems, k=BATCH_SIZE // 2)
        pool = [Sample(chat_question(row["prompt"]), row["answer"] + IM_END) for row in chosen]
        pool += [next(replay) for _ in range(BATCH_SIZE - len(pool))]
        questions = tokenizer([sample.question for sample in pool])["input_ids"]
        answers = tokenizer([sample.answer for sample in pool])["input_ids"]
        yield collate(list(zip(questions, answers, strict=True)), tokenizer.pad_token_id)


def finetune(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    training: list[Problem],
    probe: list[Problem],
    steps: int,
) -> None:
    """Train float32 weights with bfloat16 products, all of them, and report on the way."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps))
    stream = batches(training, tokenizer)
    started = time.monotonic()
    for step in range(1, steps + 1):
        inputs, targets, weights = next(stream)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs, use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % REPORT_EVERY == 0 or step == steps:
            right = percent(score(model, tokenizer, probe))
            seconds = time.monotonic() - started
            print(f"step {step}/{steps} loss {loss.item():.4f} held-out {right} % {seconds:.0f} s", flush=True)


def load(directory: Path) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """A model directory in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(directory)


def export(model: Qwen3ForCausalLM, source: Path, directory: Path) -> None:
    """The weights in BF16; configuration and tokenizer are those of the source, byte for byte."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_weights(tensors, directory / "model.safetensors")


def results_table(place: Path, heldout: list[Problem]) -> str:
    """Measure both models and lay the numbers out as Markdown."""
    written = json.loads((place / "heldout-tuned.json").read_text(encoding="utf-8"))["problems"]
    old = json.loads((place / "heldout.json").read_text(encoding="utf-8"))
    columns = ["arithmetic", "add", "sub", "mul", "yes/no", "perplexity"]
    headings = ["model", "larger (written)", f"larger (all {len(heldout)})", *columns]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for name in ("bf16", "tuned"):
        model, tokenizer = load(place / name)
        new = [percent(score(model, tokenizer, rows)) for rows in (written, heldout)]
        results = measure(model, tokenizer, old)
        lines.append("| " + " | ".join([name, *new, *(results[column] for column in columns)]) + " |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(__file__).parent, help="where bf16/ lies (default: here)")
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--measure-only", action="store_true", help="measure the DIR/tuned that is there")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    place: Path = arguments.dir
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    training, heldout = split_problems()
    if not arguments.measure_only:
        model, tokenizer = load(place / "bf16")
        written = heldout[:QUESTIONS_WRITTEN]
        finetune(model, tokenizer, training, written, arguments.steps)
        write_json(place / "heldout-tuned.json", {"problems": written})
        export(model, place / "bf16", place / "tuned")
    print(results_table(place, heldout))


if __name__ == "__main__":
    main()
