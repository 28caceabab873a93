"""vLLM in this process: set for answers that repeat bit for bit, with room for one model after the other."""

from __future__ import annotations

import gc
import importlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tensorsurgeon.checkpoint import open_checkpoint
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
from tensorsurgeon.evaluate.engines.vllm_environment import (
    ENVIRONMENT,
    QUIET,
    bear_being_looked_at,
    hide_broken_wheels,
    vllm_version,
)
from tensorsurgeon.evaluate.engines.vllm_errors import error_of, first_line, wanting
from tensorsurgeon.evaluate.measures import Logits
from tensorsurgeon.evaluate.pictures import takes_pictures
from tensorsurgeon.lora import read_lora, served_rank

CACHE = 2**30
"""Least bytes for keys and values on a processor: vLLM would take a share of all memory."""


class VllmEngine:
    """Runs models in vLLM, each in an engine of its own that is gone before the next; adapters never."""

    def __init__(self, settings: Settings) -> None:
        os.environ.update(ENVIRONMENT)
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        if settings.threads:
            # torch may have been imported before, and reads the variable no more; vLLM reads it again. torch's own
            # function is asked, as vLLM puts one in its place that does nothing.
            os.environ["OMP_NUM_THREADS"] = str(settings.threads)
            importlib.import_module("torch._C").set_num_threads(settings.threads)
        hide_broken_wheels()
        # By name: mypy would read all of vLLM, or miss it where it is not installed.
        self._vllm: Any = _silently(importlib.import_module, "vllm")
        self._platform: Any = importlib.import_module("vllm.platforms").current_platform
        self.settings = settings
        self.reloads = True
        self.llm: Any = None
        self._adapter: Any = None
        self._mode = ""
        self._taken = False
        gc.freeze()

    def load(self, directory: Path, length: int, adapter: Path | None = None) -> None:
        """Take a model in place of any other, for so many tokens; an adapter is applied to every request."""
        self.close()
        bear_being_looked_at()
        self._taken = True
        on_cpu = self._platform.is_cpu()
        try:
            self.llm = _silently(
                self._vllm.LLM,
                str(directory),
                dtype=self.settings.dtype,
                hf_overrides={} if self.settings.dtype == "float32" else {"head_dtype": "float32"},
                seed=self.settings.seed,
                enforce_eager=True,
                max_num_seqs=1 if adapter else self.settings.batch,
                enable_prefix_caching=False,
                max_model_len=length,
                logprobs_mode="raw_logits",
                max_logprobs=-1,
                # Prompts are token ids; but what puts pictures into them asks for a tokenizer.
                skip_tokenizer_init=not takes_pictures(directory),
                use_tqdm_on_load=False,
                model_loader_extra_config={"enable_weights_track": True},  # refuses some missing FP8 scales by name
                **({"kv_cache_memory_bytes": _cache(directory, length, self.settings.batch)} if on_cpu else {}),
                **({"enable_lora": True, "max_loras": 1, "max_lora_rank": _rank(adapter)} if adapter else {}),
            )
            self._adapter = self._add(adapter) if adapter else None
        except EngineError:
            self.close()
            raise
        except Exception as problem:
            self.close()
            raise error_of(f"{directory}: vLLM refuses it{wanting(directory)}", problem) from problem
        self._mode = "raw_logits"

    def reload(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Put other weights into the model by vLLM's own loader: what is fused there is fused again."""
        try:
            _silently(self.llm.collective_rpc, "reload_weights", kwargs={"weights_iterator": weights})
            # It keeps what the encoder made of a picture, by the picture alone.
            self.llm.llm_engine.reset_encoder_cache()
        except Exception as problem:
            raise error_of("vLLM takes no other weights into the model", problem) from problem

    def _add(self, adapter: Path) -> Any:
        """Load an adapter before any request: one that failed within a request would leave the engine stuck."""
        request: Any = importlib.import_module("vllm.lora.request").LoRARequest(adapter.name, 1, str(adapter))
        try:
            self.llm.llm_engine.add_lora(request)
        except Exception as problem:
            raise EngineError(f"{adapter}: vLLM refuses the adapter: {first_line(problem)}") from problem
        return request

    def _give(self, mode: str) -> None:
        """Have logits or log probabilities given from now on."""
        if mode != self._mode:

            def change(worker: Any) -> None:
                worker.model_runner.sampler.logprobs_mode = mode
                worker.model_runner.model_config.logprobs_mode = mode

            self.llm.collective_rpc(change)
            self._mode = mode

    def _ask(self, prompts: Sequence[Prompt | Pictured], **sampling: Any) -> list[Any]:
        given = [_given(prompt) for prompt in prompts]
        wanted = self._vllm.SamplingParams(detokenize=False, **sampling)
        try:
            done = list(self.llm.generate(given, wanted, use_tqdm=False, lora_request=self._adapter))
        except Exception as problem:
            raise error_of("vLLM failed to answer", problem) from problem
        for prompt, output in zip(prompts, done, strict=True):
            if isinstance(prompt, Pictured):
                check_tokens("vLLM", prompt, output.prompt_token_ids)
        return done

    def foresee(self, foreseen: Foreseen) -> None:
        """Do nothing: what is asked is computed when it is asked."""

    def generate(
        self, prompts: Sequence[Prompt | Pictured], sampling: Sampling, ends: Sequence[int]
    ) -> list[Generation]:
        """Continue each prompt; the settings that the model brings along for sampling do not count."""
        found: list[Generation] = []
        for start in range(0, len(prompts), self.settings.batch):
            started = time.perf_counter()
            done = self._ask(
                prompts[start : start + self.settings.batch],
                max_tokens=sampling.tokens,
                temperature=sampling.temperature,
                seed=sampling.seed if sampling.temperature else None,
                stop_token_ids=list(ends),
                ignore_eos=True,
            )
            seconds = time.perf_counter() - started
            found += [_generation(output, ends, seconds) for output in done]
        return found

    def next_logits(self, prompts: Sequence[Prompt | Pictured]) -> Iterator[Logits]:
        """Yield the raw logits after each prompt."""
        for prompt in prompts:
            self._give("raw_logits")
            (output,) = self._ask(
                [prompt], max_tokens=1, logprobs=-1, flat_logprobs=True, temperature=0, ignore_eos=True
            )
            found = output.outputs[0].logprobs
            logits = np.full(max(found.token_ids) + 1, -np.inf, np.float32)
            logits[np.asarray(found.token_ids)] = np.asarray(found.logprobs, np.float32)
            yield logits

    def score(self, prompts: Sequence[Prompt]) -> list[Scores]:
        """Return log probabilities, by vLLM's softmax in float32."""
        self._give("raw_logprobs")
        done = self._ask(prompts, max_tokens=1, prompt_logprobs=0, temperature=0)
        found = []
        for prompt, output in zip(prompts, done, strict=True):
            held = [entry[token] for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
            logprobs = np.array([it.logprob for it in held], np.float64)
            found.append(Scores(logprobs, np.array([it.rank == 1 for it in held], np.bool_)))
        return found

    def describe(self) -> dict[str, Any]:
        """Return what a record has to say of this engine."""
        torch: Any = importlib.import_module("torch")
        return {
            "engine": "vllm",
            "version": vllm_version(),
            "torch": torch.__version__,
            "dtype": self.settings.dtype,
            "head": "float32",
            "device": "cpu" if self._platform.is_cpu() else self._platform.get_device_name(),
            "threads": torch.get_num_threads(),
            "batch": 1 if self._adapter else self.settings.batch,
            "eager": True,
            "prefix_caching": False,
            "seed": self.settings.seed,
            "logits": "raw",
        }

    def close(self) -> None:
        """Let go of the model, if one was taken."""
        if not self._taken:
            return
        self.llm, self._taken = None, False
        importlib.import_module("vllm.distributed").cleanup_dist_env_and_memory()
        # vLLM collects garbage five times for each model; what stays, which is mostly vLLM itself, need not be looked
        # through every time. Its own cleaning up begins with taking this back.
        gc.freeze()


def _given(prompt: Prompt | Pictured) -> dict[str, Any]:
    if isinstance(prompt, Pictured):
        return {"prompt_token_ids": prompt.marked, "multi_modal_data": {"image": prompt.picture.image}}
    return {"prompt_token_ids": list(prompt)}


def _silently(function: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """Call a function without warnings of what vLLM itself uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*given, **options)


def _cache(directory: Path, length: int, batch: int) -> int:
    """Return bytes for keys and values of so many tokens in float32, and as many again for whole blocks."""
    config = open_checkpoint(directory).text_config
    layers, heads = (int(config.get(key) or 1) for key in ("num_hidden_layers", "num_attention_heads"))
    width = config.get("head_dim") or int(config.get("hidden_size") or 1) // heads
    return max(
        CACHE, 2 * 2 * 4 * layers * int(config.get("num_key_value_heads") or heads) * int(width) * length * batch
    )


def _rank(adapter: Path) -> int:
    """Return the least --max-lora-rank with which vLLM takes an adapter."""
    rank = served_rank(max((it.rank for it in read_lora(open_checkpoint(adapter)).modules.values()), default=1))
    if rank is None:
        raise EngineError(f"{adapter}: its rank is higher than vLLM serves.")
    return rank


def _generation(output: Any, ends: Sequence[int], seconds: float) -> Generation:
    tokens = tuple(output.outputs[0].token_ids)
    ended = bool(tokens) and tokens[-1] in ends
    return Generation(tokens[:-1] if ended else tokens, ended, seconds)
