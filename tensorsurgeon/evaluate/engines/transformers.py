"""transformers as an engine: one prompt at a time, nothing cached between them."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from tensorsurgeon.errors import EngineError
from tensorsurgeon.evaluate.engine import Foreseen, Generation, Pictured, Prompt, Sampling, Scores, Settings
from tensorsurgeon.evaluate.measures import Logits
from tensorsurgeon.evaluate.pictures import Processor, takes_pictures


class TransformersEngine:
    """Runs a model by its class in transformers, on a GPU where torch has one."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings._replace(batch=1)
        self.reloads = False
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = None
        self._processor: Processor | None = None
        self._directory = Path()
        if settings.threads:
            torch.set_num_threads(settings.threads)

    def load(self, directory: Path, length: int, adapter: Path | None = None) -> None:
        """Take a model in place of any other, with an adapter by PEFT; its length needs no room beforehand."""
        self.close()
        self._directory = directory
        shown_to = takes_pictures(directory)
        bars = transformers.utils.logging
        shown = bars.is_progress_bar_enabled()
        bars.disable_progress_bar()
        try:
            # A model of text and pictures has a class of its own, and asked of texts alone it is the same.
            kind = transformers.AutoModelForImageTextToText if shown_to else transformers.AutoModelForCausalLM
            model = kind.from_pretrained(
                str(directory), dtype=getattr(torch, self.settings.dtype), local_files_only=True
            )
            if adapter:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        except Exception as problem:
            first = next(iter(str(problem).strip().splitlines()), "no reason given")
            raise EngineError(f"{directory}: transformers refuses it: {type(problem).__name__}: {first}") from problem
        finally:
            if shown:
                bars.enable_progress_bar()
        self._model = model.eval().to(self.device)
        head = self._model.get_output_embeddings()
        if head is not None and self.settings.dtype != "float32":
            # The products of the head in float32, so that logits differ where half precision would tie them.
            head.forward = _in_float32(head)

    def reload(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Refuse: names in a checkpoint are not always those in the class."""
        raise EngineError("transformers: takes no other weights into a model that is there.")

    def foresee(self, foreseen: Foreseen) -> None:
        """Do nothing: what is asked is computed when it is asked."""

    def generate(
        self, prompts: Sequence[Prompt | Pictured], sampling: Sampling, ends: Sequence[int]
    ) -> list[Generation]:
        """Continue each prompt; the settings that the model brings along for sampling do not count."""
        return [self._generate(prompt, sampling, ends) for prompt in prompts]

    def _generate(self, prompt: Prompt | Pictured, sampling: Sampling, ends: Sequence[int]) -> Generation:
        given = self._inputs(prompt)
        ids = given["input_ids"]
        chance = {"temperature": sampling.temperature, "top_k": 0} if sampling.temperature else {}
        config = transformers.GenerationConfig(
            max_new_tokens=sampling.tokens,
            do_sample=bool(chance),
            eos_token_id=list(ends) or None,
            pad_token_id=next(iter(ends), 0),
            **chance,
        )
        # What is unset in a config, generate takes from the model's own.
        self._model.generation_config = transformers.GenerationConfig()
        torch.manual_seed(sampling.seed)
        started = time.perf_counter()
        with torch.inference_mode():
            made = self._model.generate(**given, generation_config=config)
        tokens = made[0, ids.shape[1] :].tolist()
        ended = bool(tokens) and tokens[-1] in ends
        return Generation(tuple(tokens[:-1] if ended else tokens), ended, time.perf_counter() - started)

    def next_logits(self, prompts: Sequence[Prompt | Pictured]) -> Iterator[Logits]:
        """Yield the raw logits after each prompt."""
        for prompt in prompts:
            yield self._logits(prompt, 1)[0].numpy()

    def score(self, prompts: Sequence[Prompt]) -> list[Scores]:
        """Return log probabilities by a softmax in float64."""
        return [self._score(prompt) for prompt in prompts]

    def _score(self, prompt: Prompt) -> Scores:
        logits = self._logits(prompt, len(prompt))[:-1].double()
        given = torch.tensor(list(prompt[1:]))[:, None]
        chosen = logits.gather(1, given)[:, 0]
        logprobs = chosen - logits.logsumexp(1)
        return Scores(logprobs.numpy(), (chosen >= logits.max(1).values).numpy())

    def _logits(self, prompt: Prompt | Pictured, last: int) -> torch.Tensor:
        with torch.inference_mode():
            made = self._model(**self._inputs(prompt), use_cache=False, logits_to_keep=last).logits
        return made[0, -last:].float().cpu()  # type: ignore[no-any-return]

    def _inputs(self, prompt: Prompt | Pictured) -> dict[str, torch.Tensor]:
        if not isinstance(prompt, Pictured):
            ids = torch.tensor([list(prompt)], device=self.device)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self._processor = self._processor or Processor(self._directory)
        given = self._processor.inputs(prompt).to(self.device)
        dtype = getattr(torch, self.settings.dtype)
        return {name: it.to(dtype) if it.is_floating_point() else it for name, it in given.items()}

    def describe(self) -> dict[str, Any]:
        """Return what a record has to say of this engine."""
        return {
            "engine": "transformers",
            "version": transformers.__version__,
            "torch": torch.__version__,
            "dtype": self.settings.dtype,
            "head": "float32",
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "batch": 1,
            "eager": True,
            "prefix_caching": False,
            "seed": self.settings.seed,
            "logits": "raw",
        }

    def close(self) -> None:
        """Let go of the model."""
        if self._model is not None:
            self._model = self._processor = None
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()


def _in_float32(head: Any) -> Any:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        bias = None if head.bias is None else head.bias.float()
        return torch.nn.functional.linear(hidden.float(), head.weight.float(), bias)

    return forward
