"""A model's tokenizer: texts as tokens, chats by its template, and what each token spells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.format import load_json

ANCHOR = "1"
"""A text that merges with no word behind it: what a token spells within a text is seen behind it."""


class Tokens:
    """The tokenizer in a checkpoint's directory.

    Raises:
        CheckpointError: where there is none that transformers can load; no code of the checkpoint is run.
    """

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self.directory = directory
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except Exception as problem:
            first = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
            raise CheckpointError(f"{directory}: its tokenizer cannot be loaded: {first}") from None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return a text's tokens, with those that the tokenizer puts around every text where they are `special`."""
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def after(self, text: str) -> list[int]:
        """Return the tokens that a text has behind another, where a space before it is its own."""
        before, whole = self.encode(ANCHOR, special=False), self.encode(ANCHOR + text, special=False)
        return whole[len(before) :] if whole[: len(before)] == before else self.encode(text, special=False)

    def chat(self, text: str, system: str | None, options: Mapping[str, Any]) -> tuple[list[int], str]:
        """Return the tokens of a chat up to where the answer begins, and in which form it was put.

        A template that knows no system prompt gets it at the head of the question; without a template it is a
        completion of question and answer.
        """
        if not self.tokenizer.chat_template:
            framed = "\n\n".join(filter(None, [system, f"Question: {text}\nAnswer:"]))
            return self.encode(framed), "completion: no chat template"
        user = {"role": "user", "content": text}
        if system is None:
            return self._templated([user], options), "chat"
        try:
            return self._templated([{"role": "system", "content": system}, user], options), "chat"
        except Exception:  # a template refuses in whichever way it likes
            joined = {"role": "user", "content": f"{system}\n\n{text}"}
            return self._templated([joined], options), "chat: no system prompt"

    def _templated(self, messages: list[dict[str, str]], options: Mapping[str, Any]) -> list[int]:
        rendered = self._rendered(messages, options)
        if messages[-1]["content"].strip() not in rendered:
            # Templates of some models that take pictures know only a list of parts, and print nothing of a string.
            parts = [{**it, "content": [{"type": "text", "text": it["content"]}]} for it in messages]
            with suppress(Exception):  # a template refuses in whichever way it likes
                rendered = self._rendered(parts, options)
        return self.encode(rendered, special=False)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, return_dict=False, **options
            )
        )

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer: those of generation_config.json, and the tokenizer's own."""
        path = self.directory / "generation_config.json"
        told = load_json(path.read_bytes().decode()).get("eos_token_id") if path.exists() else None
        listed = told if isinstance(told, list) else [told]
        own = [self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(token for token in (*listed, *own) if isinstance(token, int)))

    def spelling(self, token: int) -> str:
        """Return what a token spells within a text, with a space before it where it has one; special ones by name."""
        return self.spellings[token] if token < len(self.spellings) else f"<{token}>"

    @cached_property
    def spellings(self) -> list[str]:
        """What each token spells within a text, by its number."""
        before = self.encode(ANCHOR, special=False)
        known = range(len(self.tokenizer))
        spelled = self.tokenizer.batch_decode([[*before, token] for token in known], clean_up_tokenization_spaces=False)
        head = len(self.tokenizer.decode(before, clean_up_tokenization_spaces=False))
        return [text[head:] for text in spelled]

    @cached_property
    def special(self) -> frozenset[int]:
        """The tokens that are no text."""
        return frozenset(self.tokenizer.all_special_ids)
