"""The interface that all engines have: they continue, give the logits of the next token, and score prompts.

Prompts are lists of token ids, so that all engines are asked the same; one with a picture has more to it. An engine
holds one model at a time; `load` puts another in its place, and `describe` tells what a record has to say for its
numbers to be made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

from tensorsurgeon.errors import EngineError

if TYPE_CHECKING:
    from tensorsurgeon.evaluate.measures import Array, Flags, Logits

Kind = Literal["vllm", "transformers", "stream"]
"""An engine that runs in this process; the streamed one has a layer of the model in memory at a time."""
Dtype = Literal["float32", "bfloat16", "float16"]
"""What an engine computes in; quantised weights are served in half precision only."""
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

Prompt = Sequence[int]


class Picture(NamedTuple):
    """A picture: its file's name and SHA-256, and the picture itself, of Pillow's, in red, green and blue."""

    name: str
    digest: str
    image: Any


class Pictured(NamedTuple):
    """A chat with a picture, in the form that each engine takes.

    Attributes:
        tokens: As the model sees it, with all tokens that stand for the picture.
        marked: As the template has it, with the mark where the picture goes; vLLM puts those tokens there itself.
        text: The same as a text, for the model's processor.
        messages: Who says what, for a server, which has the template.
        template: Options of the template.
        picture: The picture that is meant.
    """

    tokens: list[int]
    marked: list[int]
    text: str
    messages: list[dict[str, Any]]
    template: dict[str, Any]
    picture: Picture


class Settings(NamedTuple):
    """How an engine computes; the defaults give the same bits whatever else is asked.

    Attributes:
        dtype: What it computes in; the head, and so the logits, always in float32.
        batch: Most requests that are computed together: more are faster, and move the last digits.
        seed: Where the engine's own chance begins.
        threads: Threads of the processor; as many as the engine takes where 0.
    """

    dtype: Dtype = "float32"
    batch: int = 1
    seed: int = 0
    threads: int = 0


class Sampling(NamedTuple):
    """How a prompt is continued: greedily where the temperature is 0, else by chance from the seed."""

    tokens: int = 128
    temperature: float = 0.0
    seed: int = 0


class Generation(NamedTuple):
    """A continuation: its tokens without the one that ended it, whether one did, and the seconds that it took."""

    tokens: tuple[int, ...]
    ended: bool
    seconds: float


class Scores(NamedTuple):
    """Of every token of a prompt but the first: its log probability, and whether no other is more probable."""

    logprobs: Array
    greedy: Flags


class Foreseen(NamedTuple):
    """What will be asked of a model, as far as that can be known before.

    Attributes:
        logits: Prompts whose next token's logits will be asked for.
        scores: Prompts that will be scored.
        following: Which more are scored because of the logits after a prompt, where that depends on them.
        continued: Prompts that will be continued, and how.
    """

    logits: Sequence[Prompt] = ()
    scores: Sequence[Prompt] = ()
    following: Callable[[Prompt, Logits], Sequence[Prompt]] | None = None
    continued: Sequence[tuple[Prompt | Pictured, Sampling]] = ()


class Engine(Protocol):
    """What runs a model."""

    settings: Settings
    reloads: bool
    """Whether `reload` can put other weights into the model that is there."""

    def load(self, directory: Path, length: int, adapter: Path | None = None) -> None:
        """Take a model in place of any other, for prompts with their continuations of up to `length` tokens.

        With an `adapter`, every answer is that of the model with it: engines on a processor mix the two up in a batch,
        so that a model and its adapters never share one.

        Raises:
            EngineError: where the engine refuses the model.
        """

    def reload(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Put other weights, torch tensors by their names in a checkpoint, into the model; its config stays."""

    def foresee(self, foreseen: Foreseen) -> None:
        """Be told what will be asked of the model; only an engine that reads all of it for an answer need care.

        Raises:
            EngineError: for what the engine does not do.
        """

    def generate(
        self, prompts: Sequence[Prompt | Pictured], sampling: Sampling, ends: Sequence[int]
    ) -> list[Generation]:
        """Continue each prompt until one of the tokens that are `ends`, or to the most tokens."""

    def next_logits(self, prompts: Sequence[Prompt | Pictured]) -> Iterator[Logits]:
        """Yield for each prompt the logits of the token after it, one for each row of the head.

        A server gives log probabilities instead: logits less a constant, which `describe` tells.
        """

    def score(self, prompts: Sequence[Prompt]) -> list[Scores]:
        """Return the log probability of every token of each prompt but the first, given those before it."""

    def describe(self) -> dict[str, Any]:
        """Return engine, version, dtype, device, threads, batch, eager, prefix caching, seed, and kind of logits."""

    def close(self) -> None:
        """Let go of the model and its memory; another can be loaded then."""


def check_tokens(engine: str, asked: Pictured, tokens: Sequence[int]) -> None:
    """See that an engine put a picture into the same tokens as the model's own processor.

    Raises:
        EngineError: where it did not, and so was asked something else.
    """
    if list(tokens) != asked.tokens:
        raise EngineError(
            f"{engine}: puts {asked.picture.name} into a chat of {len(tokens)} tokens, the model's own processor into "
            f"other {len(asked.tokens)}; ask the model with --engine transformers."
        )
