"""The server engine against servers that answer badly, and what a log of vLLM's says."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tensorsurgeon.errors import EngineError
from tensorsurgeon.evaluate.engine import Sampling, Settings
from tensorsurgeon.evaluate.engines.server import ServerEngine
from tensorsurgeon.evaluate.serving import first_error

Reply = Callable[[dict[str, Any]], tuple[int, Any]]
VOCABULARY = {f"token_id:{token}": math.log((token + 1) / 36) for token in range(8)}
"""Eight tokens with probabilities 1/36, 2/36 ... 8/36."""


@contextmanager
def server(reply: Reply, listed: dict[str, Any] | None = None) -> Iterator[tuple[ServerEngine, list[dict[str, Any]]]]:
    """Serve completions from a function; yield an engine for it and the requests that it sent."""
    seen: list[dict[str, Any]] = []
    models = {"data": [{"id": "m", "max_model_len": 64, **(listed or {})}]}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(200, models if self.path == "/v1/models" else {"version": "0.32.0"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            self._say(*reply(body))

        def _say(self, status: int, content: Any) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *words: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        engine = ServerEngine(f"http://127.0.0.1:{running.server_port}/v1/", Settings())
        engine.load(Path("anywhere"), 32)
        yield engine, seen
        running.shutdown()


def choice(**fields: Any) -> tuple[int, Any]:
    return 200, {"choices": [fields]}


def whole(held: dict[str, float]) -> Reply:
    return lambda body: choice(logprobs={"top_logprobs": [held]})


def test_a_whole_vocabulary_is_taken() -> None:
    with server(whole(VOCABULARY)) as (engine, seen):
        (logits,) = engine.next_logits([[1, 2, 3]])
        assert logits.tolist() == pytest.approx(list(VOCABULARY.values()), rel=1e-6)
        assert seen[0]["prompt"] == [1, 2, 3]
        assert seen[0]["logprobs"] == -1
        assert engine.describe()["logits"] == "log probabilities"
        assert not engine.is_vllm


@pytest.mark.parametrize(
    ("held", "problem"),
    [
        ({" yes": -0.1, " no": -2.3}, "names tokens by their text"),
        ({**VOCABULARY, "plain": -9.0}, "names tokens by their text"),
        ({}, "names tokens by their text"),
        (dict(list(VOCABULARY.items())[1:]), "sum up to 0.9722, not to 1"),
        (dict(list(VOCABULARY.items())[-2:]), "of 2 tokens sum up to 0.4167"),
        ({key: value + 3 for key, value in VOCABULARY.items()}, "sum up to 20.09"),
    ],
)
def test_a_vocabulary_that_lost_tokens_or_holds_other_numbers_is_refused(held: dict[str, float], problem: str) -> None:
    with server(whole(held)) as (engine, _), pytest.raises(EngineError, match=problem):
        list(engine.next_logits([[1, 2]]))


def test_scores_are_proved_on_a_whole_vocabulary_first() -> None:
    raw = {key: value + 3 for key, value in VOCABULARY.items()}
    with server(whole(raw)) as (engine, seen), pytest.raises(EngineError, match="raw_logprobs"):
        engine.score([[1, 2]])
    assert len(seen) == 1


def test_scores_are_those_of_the_prompts_tokens() -> None:
    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        if not body.get("echo"):
            return whole(VOCABULARY)(body)
        tops = [None, {"token_id:2": -1.0, "token_id:9": -0.5}, {"token_id:3": -0.25}]
        return choice(logprobs={"token_logprobs": [None, -1.0, -0.25], "top_logprobs": tops})

    with server(reply) as (engine, seen):
        (scores,) = engine.score([[1, 2, 3]])
    assert scores.logprobs.tolist() == [-1.0, -0.25]
    assert scores.greedy.tolist() == [False, True]
    assert seen[-1]["max_tokens"] == 0


def test_a_server_that_does_not_score_prompts_or_tell_tokens_is_refused() -> None:
    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        return choice(text="hello") if body["max_tokens"] != 1 else whole(VOCABULARY)(body)

    with server(reply) as (engine, _):
        with pytest.raises(EngineError, match="does not score prompts"):
            engine.score([[1, 2]])
        with pytest.raises(EngineError, match="does not tell the tokens"):
            engine.generate([[1, 2]], Sampling(4), (0,))


def test_an_answer_ends_where_one_of_the_ends_stands() -> None:
    with server(lambda body: choice(token_ids=[4, 5, 0])) as (engine, seen):
        (made,) = engine.generate([[1, 2]], Sampling(4), (0,))
        assert (made.tokens, made.ended) == ((4, 5), True)
        (made,) = engine.generate([[1, 2]], Sampling(4, 1.0, seed=5), (7,))
        assert (made.tokens, made.ended) == ((4, 5, 0), False)
    assert (seen[0]["temperature"], "seed" in seen[0]) == (0, False)
    assert (seen[1]["temperature"], seen[1]["seed"]) == (1.0, 5)
    assert "top_k" not in seen[0]


def test_the_defaults_that_a_model_brings_along_are_switched_off_in_vllm() -> None:
    with server(lambda body: choice(token_ids=[4]), {"owned_by": "vllm"}) as (engine, seen):
        engine.generate([[1]], Sampling(4), (0,))
        assert engine.describe()["engine"] == "vllm server"
        assert engine.describe()["version"] == "0.32.0"
    assert (seen[0]["top_k"], seen[0]["top_p"], seen[0]["repetition_penalty"]) == (-1, 1, 1)


@pytest.mark.parametrize(
    ("status", "content", "problem"),
    [
        (
            400,
            {"error": {"message": "Token id 999999 is out of vocabulary"}},
            "400: Token id 999999 is out of vocabulary",
        ),
        (404, {"message": "The model `nope` does not exist."}, "404: The model `nope` does not exist"),
        (500, b"<html>gone</html>", "500: <html>gone</html>"),
        (200, b"not JSON", "no answer"),
    ],
)
def test_what_a_server_says_is_told(status: int, content: Any, problem: str) -> None:
    with server(lambda body: (status, content)) as (engine, _), pytest.raises(EngineError, match=problem):
        list(engine.next_logits([[1]]))


def test_a_server_with_too_little_room_or_no_model_is_refused() -> None:
    with (
        pytest.raises(EngineError, match="takes 16 tokens, and 32 are needed"),
        server(whole({}), {"max_model_len": 16}),
    ):
        pass
    with pytest.raises(EngineError, match="no answer"):
        ServerEngine("http://127.0.0.1:9", Settings()).load(Path("anywhere"), 32)


LOG = """\
INFO 11-21 10:00:00 [api_server.py:1] starting
(EngineCore pid=7) ERROR 11-21 10:00:09 [core.py:99] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-21 10:00:09 [core.py:99]   File "core.py", line 9, in run
(EngineCore pid=7) ERROR 11-21 10:00:09 [core.py:99] {reason}
Traceback (most recent call last):
  File "api_server.py", line 3, in <module>
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
"""


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("ValueError: There is no module or parameter named 'banana' in Qwen3Model.", "'banana' in Qwen3Model"),
        (
            "safetensors_rust.SafetensorError: incomplete metadata",
            "safetensors_rust.SafetensorError: incomplete metadata",
        ),
        ("AssertionError", "AssertionError, without a reason; 'tensorsurgeon verify' may find it"),
    ],
)
def test_the_first_reason_of_a_log_is_told_not_its_last_line(reason: str, told: str) -> None:
    assert told in first_error(LOG.format(reason=reason), 1)


def test_a_log_without_an_exception_is_told_by_its_end() -> None:
    assert (
        first_error("usage: vllm serve\nvllm: error: unrecognized arguments: --x\n", 2) == "unrecognized arguments: --x"
    )
    assert first_error("one\nKilled\n", 137) == "ended with status 137: Killed"
    assert first_error("", 1) == "ended with status 1: "
