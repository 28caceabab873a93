"""The mannequin as a patient: under the weights of any checkpoint made out of it, how well does it read and answer?

Only weights that an operation changed are read, and put into the model in memory: what is written is the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from conftest import MANNEQUIN
from perplexity import load, prompt_tokens
from torch.nn.utils.rnn import pad_sequence

import make
from tensorsurgeon.checkpoint import Checkpoint

BATCH = 64


class Patient:
    """The mannequin in float32, and what was held out of its training."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load(MANNEQUIN / "bf16")
        heldout = json.loads((MANNEQUIN / "heldout.json").read_text())
        self.problems, self.yes_no = heldout["arithmetic"], heldout["yes_no"]
        self.texts = [row["text"] for row in heldout["sentences"]]
        self.sentences = [torch.tensor(self.tokenizer(text)["input_ids"]) for text in self.texts]
        self.weights = {name: it.float() for name, it in make.read(MANNEQUIN / "bf16").items()}
        self.end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def gets(self, ckpt: Checkpoint) -> Patient:
        """Give it a checkpoint's weights in place of those that it had."""
        changed = {}
        for name in ckpt:
            if ckpt[name].span is None:
                block = ckpt[name].read()
                numbers = torch.frombuffer(bytearray(block.data), dtype=torch.bfloat16)
                changed[name] = numbers.reshape(block.shape).float()
        self.model.load_state_dict(self.weights | changed)
        return self

    def losses(self) -> torch.Tensor:
        """Return the negative log-likelihood of each sentence, for each of all tokens on average."""
        sums = torch.zeros(len(self.sentences), dtype=torch.float64)
        tokens = 0
        for place, (sentence, logits) in enumerate(zip(self.sentences, self._logits(self.sentences), strict=True)):
            found = logits[:-1].log_softmax(-1).gather(1, sentence[1:, None])
            sums[place] = -found.double().sum()
            tokens += len(found)
        return sums / tokens

    def perplexity(self) -> float:
        """Return the perplexity of the held-out sentences."""
        return float(self.losses().sum().exp())

    def right(self, problems: Sequence[Mapping[str, str]]) -> list[bool]:
        """Return whether the greedy answer to each problem is exactly right.

        It is just where each token of the right answer is the most probable one after those before it.
        """
        prompts = [self.prompt(row["prompt"]) for row in problems]
        answers = [torch.tensor([*self.tokenizer(row["answer"])["input_ids"], self.end]) for row in problems]
        said = self._logits([torch.cat(pair) for pair in zip(prompts, answers, strict=True)])
        return [
            torch.equal(logits[len(prompt) - 1 : -1].argmax(-1), answer)
            for logits, prompt, answer in zip(said, prompts, answers, strict=True)
        ]

    def prompt(self, question: str) -> torch.Tensor:
        """Return the tokens of a question, ready to be answered."""
        return torch.tensor(prompt_tokens(self.tokenizer, question))

    def outputs(self, module: str, rows: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Return, for each layer, what one of its modules ("" for itself) gives at every token of each row."""
        found: list[list[torch.Tensor]] = [[] for _ in self.model.model.layers]
        lengths: list[int] = []

        def note(number: int, output: Any) -> None:
            whole = output[0] if isinstance(output, tuple) else output
            found[number] += [it[:length].clone() for it, length in zip(whole, lengths, strict=True)]

        hooks = [
            layer.get_submodule(module).register_forward_hook(lambda _, __, output, number=number: note(number, output))
            for number, layer in enumerate(self.model.model.layers)
        ]
        for begin in range(0, len(rows), BATCH):
            lengths[:] = [len(row) for row in rows[begin : begin + BATCH]]
            list(self._logits(rows[begin : begin + BATCH]))
        for hook in hooks:
            hook.remove()
        return found

    def _logits(self, rows: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the logits of each row; what pads the others comes after them, where nothing looks at it."""
        for begin in range(0, len(rows), BATCH):
            batch = rows[begin : begin + BATCH]
            with torch.no_grad():
                logits = self.model(pad_sequence(batch, batch_first=True)).logits
            yield from (it[: len(row)] for it, row in zip(logits, batch, strict=True))
