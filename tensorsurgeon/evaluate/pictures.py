"""Pictures in prompts: a chat with one of them in it, as a model's own processor puts it.

A model that takes pictures has a processor beside its tokenizer: it scales a picture to the pixels that the model's
encoder reads, and puts as many tokens into the text as the encoder will give embeddings. Where the picture stands in a
chat, the chat's template decides. Every engine is given the same pixels: upright, and on white where they are clear.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tensorsurgeon.checkpoint import open_checkpoint
from tensorsurgeon.errors import CheckpointError, UsageError
from tensorsurgeon.evaluate.engine import Picture, Pictured


def read_picture(file: str) -> Picture:
    """Return a picture from a file in any format that Pillow reads.

    Raises:
        UsageError: where it is none.
    """
    from PIL import Image, ImageOps

    path = Path(file)
    try:
        data = path.read_bytes()
        with Image.open(path) as opened:
            clear = ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise UsageError(f"{file}: is no picture that can be read: {problem}.") from None
    white = Image.new("RGBA", clear.size, "white")
    return Picture(path.name, hashlib.sha256(data).hexdigest(), Image.alpha_composite(white, clear).convert("RGB"))


class Processor:
    """The processor in a checkpoint's directory.

    Raises:
        CheckpointError: where the model takes no pictures, or transformers cannot load its processor; no code of the
            checkpoint is run.
    """

    def __init__(self, directory: Path) -> None:
        from transformers import AutoProcessor

        self.directory = directory
        way_out = "name a model that takes them, or a suite without 'image'"
        if not takes_pictures(directory):
            raise CheckpointError(f"{directory}: takes no pictures, and the suite has some; {way_out}.")
        try:
            self._processor: Any = AutoProcessor.from_pretrained(str(directory), local_files_only=True)
        except Exception as problem:
            first = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
            raise CheckpointError(
                f"{directory}: its processor of pictures cannot be loaded: {first}; mend that, or {way_out}."
            ) from None
        if getattr(self._processor, "image_processor", None) is None:
            raise CheckpointError(
                f"{directory}: has no processor of pictures (preprocessor_config.json or processor_config.json), and "
                f"the suite has some; add the file that the model was published with, or {way_out}."
            )
        if not self._template:
            raise CheckpointError(
                f"{directory}: has no chat template, which alone says where a picture stands; add its "
                f"chat_template.jinja, or {way_out}."
            )

    @cached_property
    def _template(self) -> str | None:
        found: str | None = self._processor.chat_template or self._processor.tokenizer.chat_template
        return found

    def chat(self, text: str, system: str | None, picture: Picture, options: Mapping[str, Any]) -> tuple[Pictured, str]:
        """Return a chat about a picture, up to where the answer begins, and in which form it was put.

        A template that knows no system prompt gets it at the head of the question.

        Raises:
            CheckpointError: where the template has no place for a picture.
        """
        messages = [_said("user", text, picture=True)]
        if system is None:
            return self._put(messages, picture, options), "chat"
        try:
            return self._put([_said("system", system), *messages], picture, options), "chat"
        except CheckpointError:
            raise
        except Exception:  # a template refuses in whichever way it likes
            joined = [_said("user", f"{system}\n\n{text}", picture=True)]
            return self._put(joined, picture, options), "chat: no system prompt"

    def _put(self, messages: Sequence[Any], picture: Picture, options: Mapping[str, Any]) -> Pictured:
        rendered = str(
            self._processor.apply_chat_template(
                messages, chat_template=self._template, add_generation_prompt=True, tokenize=False, **options
            )
        )
        marked = list(self._processor.tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])
        found = Pictured([], marked, rendered, list(messages), dict(options), picture)
        try:
            tokens = self.inputs(found)["input_ids"][0].tolist()
        except Exception as problem:
            first = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
            raise CheckpointError(f"{self.directory}: cannot put {picture.name} into a chat: {first}") from None
        if tokens == marked:
            raise CheckpointError(f"{self.directory}: its chat template has no place for a picture.")
        return found._replace(tokens=tokens)

    def inputs(self, asked: Pictured) -> Any:
        """Return what the model's class in transformers takes: tokens, pixels, and whatever else it needs."""
        return self._processor(
            text=[asked.text], images=[asked.picture.image], return_tensors="pt", add_special_tokens=False
        )


def takes_pictures(directory: Path) -> bool:
    """Tell whether a model has an encoder of pictures, by its config."""
    return isinstance(open_checkpoint(directory).config.value.get("vision_config"), dict)


def _said(role: str, text: str, picture: bool = False) -> dict[str, Any]:
    shown = [{"type": "image"}] if picture else []
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}
