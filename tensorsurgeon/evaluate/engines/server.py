"""A server that speaks OpenAI's protocol as an engine; vLLM's gives everything, others continue prompts.

Tokens are asked for by number. A server that names them by their text would let those fall together that are spelled
alike, 3 % of the probability with a vocabulary of Qwen, and such an answer is refused.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tensorsurgeon.errors import EngineError
from tensorsurgeon.evaluate.engine import (
    Foreseen,
    Generation,
    Pictured,
    Prompt,
    Sampling,
    Scores,
    Settings,
    check_tokens,
)
from tensorsurgeon.evaluate.measures import Logits

TIMEOUT = 600
LOST = 1e-3
"""A full vocabulary whose probabilities miss more than this of 1 has lost tokens."""
ADVICE = "start the server with 'tensorsurgeon serve', or with --max-logprobs -1 --logprobs-mode raw_logprobs"


class ServerEngine:
    """Asks a server, which has its model already; its settings are its own, and told as far as they are known."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.settings = settings
        self.reloads = False
        self._served: dict[str, Any] = {}
        self._version: str | None = None
        self._proven = False

    def load(self, directory: Path, length: int, adapter: Path | None = None) -> None:
        """Look at what is served; that it is the model in the directory cannot be known, and is taken as said."""
        if adapter:
            raise EngineError(f"{self.url}: adapters are evaluated in an engine of their own, not on a server.")
        listed = self._get("/v1/models").get("data") or [{}]
        self._served = listed[0]
        if "id" not in self._served:
            raise EngineError(f"{self.url}: serves no model.")
        if self._served.get("owned_by") == "vllm":
            self._version = self._get("/version").get("version")
        most = self._served.get("max_model_len")
        if isinstance(most, int) and most < length:
            raise EngineError(
                f"{self.url}: takes {most} tokens, and {length} are needed; start it with --max-model-len {length}."
            )
        self._proven = False

    @property
    def is_vllm(self) -> bool:
        """Whether it is vLLM, which takes more than the protocol has."""
        return self._version is not None

    def reload(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Refuse: a server keeps its model."""
        raise EngineError(f"{self.url}: a server keeps the model that it has.")

    def foresee(self, foreseen: Foreseen) -> None:
        """Do nothing: what is asked is computed when it is asked."""

    def generate(
        self, prompts: Sequence[Prompt | Pictured], sampling: Sampling, ends: Sequence[int]
    ) -> list[Generation]:
        """Continue each prompt, one after the other; those with pictures as chats, which the server puts itself.

        Raises:
            EngineError: also for a server that does not tell the tokens of its answers, or puts a chat otherwise.
        """
        return [self._generate(prompt, sampling, ends) for prompt in prompts]

    def _generate(self, prompt: Prompt | Pictured, sampling: Sampling, ends: Sequence[int]) -> Generation:
        started = time.perf_counter()
        ask: Any = self._chat if isinstance(prompt, Pictured) else self._complete
        choice = ask(
            prompt,
            max_tokens=sampling.tokens,
            temperature=sampling.temperature,
            return_token_ids=True,
            stop_token_ids=list(ends),
            ignore_eos=True,
            **({"seed": sampling.seed} if sampling.temperature else {}),
            # What a model brings along for sampling is the default of vLLM's server.
            **({"top_k": -1, "top_p": 1, "min_p": 0, "repetition_penalty": 1} if self.is_vllm else {}),
        )
        tokens = choice.get("token_ids")
        if tokens is None:
            raise EngineError(f"{self.url}: does not tell the tokens of an answer, as vLLM does (return_token_ids).")
        ended = bool(tokens) and tokens[-1] in ends
        return Generation(tuple(tokens[:-1] if ended else tokens), ended, time.perf_counter() - started)

    def next_logits(self, prompts: Sequence[Prompt | Pictured]) -> Iterator[Logits]:
        """Yield log probabilities after each prompt, of all tokens.

        Raises:
            EngineError: for a server that gives fewer, or other numbers; and for prompts with pictures.
        """
        for prompt in prompts:
            if isinstance(prompt, Pictured):
                raise EngineError(f"{self.url}: gives answers about a picture, and no probabilities.")
            choice = self._complete(
                prompt, max_tokens=1, temperature=0, logprobs=-1, return_tokens_as_token_ids=True, ignore_eos=True
            )
            (held,) = (choice.get("logprobs") or {}).get("top_logprobs") or [{}]
            yield self._whole(held)

    def _whole(self, held: Mapping[str, float]) -> Logits:
        try:
            tokens = [int(name.removeprefix("token_id:")) for name in held if name.startswith("token_id:")]
        except ValueError:
            tokens = []
        if len(tokens) != len(held) or not tokens:
            raise EngineError(f"{self.url}: names tokens by their text, and those spelled alike are lost; {ADVICE}.")
        logprobs = np.full(max(tokens) + 1, -np.inf, np.float32)
        logprobs[tokens] = list(held.values())
        mass = float(np.exp(logprobs.astype(np.float64)).sum())
        if not abs(mass - 1) < LOST:
            raise EngineError(
                f"{self.url}: the probabilities of {len(tokens)} tokens sum up to {mass:.4g}, not to 1; {ADVICE}."
            )
        self._proven = True
        return logprobs

    def score(self, prompts: Sequence[Prompt]) -> list[Scores]:
        """Return log probabilities of the prompts' tokens; that it gives such is first proved on a whole vocabulary.

        Raises:
            EngineError: for a server that gives other numbers, or none.
        """
        if prompts and not self._proven:
            next(self.next_logits(prompts[:1]))
        return [self._score(prompt) for prompt in prompts]

    def _score(self, prompt: Prompt) -> Scores:
        choice = self._complete(
            prompt, max_tokens=0, temperature=0, logprobs=1, echo=True, return_tokens_as_token_ids=True
        )
        told = choice.get("logprobs") or {}
        own = (told.get("token_logprobs") or [])[1:]
        if len(own) != len(prompt) - 1:
            raise EngineError(f"{self.url}: does not score prompts (echo with logprobs), as vLLM does.")
        best = [max(entry.values()) for entry in told["top_logprobs"][1:]]
        logprobs = np.array(own, np.float64)
        return Scores(logprobs, logprobs >= np.array(best, np.float64))

    def _complete(self, prompt: Prompt, **options: Any) -> dict[str, Any]:
        body = {"model": self._served.get("id"), "prompt": list(prompt), **options}
        return self._get("/v1/completions", body)["choices"][0]  # type: ignore[no-any-return]

    def _chat(self, asked: Pictured, **options: Any) -> dict[str, Any]:
        """Return how a chat goes on; where the server tells what it put the chat into, that is looked at."""
        body = {"model": self._served.get("id"), "messages": _shown(asked), **options}
        if asked.template:
            body["chat_template_kwargs"] = asked.template
        answer = self._get("/v1/chat/completions", body)
        if answer.get("prompt_token_ids") is not None:
            check_tokens(self.url, asked, answer["prompt_token_ids"])
        return answer["choices"][0]  # type: ignore[no-any-return]

    def _get(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return what the server answers.

        Raises:
            EngineError: with the reason that it gives.
        """
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as problem:
            raise EngineError(f"{self.url}{path}: {problem.code}: {_reason(problem.read())}") from None
        except (OSError, http.client.HTTPException, ValueError, TypeError) as problem:
            raise EngineError(f"{self.url}{path}: no answer: {getattr(problem, 'reason', problem)}") from None

    def describe(self) -> dict[str, Any]:
        """Return what a record has to say of this engine; what only the server knows is missing."""
        return {
            "engine": "vllm server" if self.is_vllm else "server",
            "version": self._version,
            "torch": None,
            "dtype": None,
            "head": None,
            "device": self.url,
            "threads": None,
            "batch": 1,
            "eager": None,
            "prefix_caching": None,
            "seed": None,
            "logits": "log probabilities",
            "served": self._served.get("root") or self._served.get("id"),
        }

    def close(self) -> None:
        """Do nothing: the server keeps its model."""


def _shown(asked: Pictured) -> list[dict[str, Any]]:
    """Return the messages of a chat with the picture in them, as a PNG, which loses nothing."""
    file = io.BytesIO()
    asked.picture.image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    shown = {"type": "image_url", "image_url": {"url": url}}
    return [
        {**said, "content": [shown if part["type"] == "image" else part for part in said["content"]]}
        for said in asked.messages
    ]


def _reason(body: bytes) -> str:
    """Return the message of a server's error, or how its text begins."""
    try:
        told = json.loads(body)
        return str((told.get("error") or told)["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return body.decode(errors="replace").strip()[:200] or "no reason given"
