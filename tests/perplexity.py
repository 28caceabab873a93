"""Print the perplexity of each checkpoint on the mannequin's held-out sentences, and its share of right answers.

usage: perplexity.py HELDOUT.json DIRECTORY...
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(directory: Path) -> tuple[Any, Any]:
    """Return the model in float32, and the tokenizer."""
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(directory)


def perplexity(model: Any, tokenizer: Any, sentences: Sequence[str]) -> float:
    """Return exp of the mean negative log-likelihood of all tokens but the first of each sentence."""
    losses: list[torch.Tensor] = []
    with torch.no_grad():
        for sentence in sentences:
            tokens = torch.tensor([tokenizer(sentence)["input_ids"]])
            logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
            losses.append(-logprobs.gather(1, tokens[0, 1:, None])[:, 0])
    return math.exp(torch.cat(losses).mean())


def prompt_tokens(tokenizer: Any, question: str) -> list[int]:
    """Return the tokens of a question as a chat, ready to be answered."""
    chat = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """Return the greedy answer to a question."""
    tokens = torch.tensor([prompt_tokens(tokenizer, question)])
    with torch.no_grad():
        output = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False)
    return str(tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)).strip()


def right_answers(model: Any, tokenizer: Any, problems: Sequence[Mapping[str, str]]) -> float:
    """Return the share of problems whose greedy answer is exactly right."""
    right = sum(answer(model, tokenizer, problem["prompt"]) == problem["answer"] for problem in problems)
    return right / len(problems)


def main(heldout: str, *directories: str) -> None:
    """Print a line for each checkpoint."""
    data = json.loads(Path(heldout).read_text())
    sentences = [row["text"] for row in data["sentences"]]
    for directory in map(Path, directories):
        model, tokenizer = load(directory)
        rate = right_answers(model, tokenizer, data["arithmetic"][::8] + data["yes_no"][::4])
        print(f"{perplexity(model, tokenizer, sentences):10.3f}   {rate:4.0%} answered right   {directory.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
