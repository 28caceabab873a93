"""A tiny model that takes pictures, and the worker that asks it in vLLM: pytest never imports vLLM.

usage: sighted.py MODEL OTHER SUITE ANSWERS

MODEL and OTHER are of one shape. ANSWERS gets the records of the suite for MODEL, and logits after its first two
prompts: of MODEL, of OTHER's weights put in its place, and of OTHER loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tensorsurgeon.evaluate.asking import ask
from tensorsurgeon.evaluate.choosing import make_engine
from tensorsurgeon.evaluate.engine import Engine, Settings
from tensorsurgeon.evaluate.questionnaire import Questionnaire
from tensorsurgeon.evaluate.suite import load_suite
from tensorsurgeon.evaluate.tokens import Tokens

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<fake_token_around_image>", "<global-img>",
           "<end_of_utterance>", "<row_1_col_1>")  # fmt: skip
TEMPLATE = (
    "<s>{% for said in messages %}{{ said.role }}: {% for part in said.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}\n{% endfor %}assistant:"
)
POSITIONS = 256
PER_PICTURE = 4
"""Tokens that a picture takes, beside the three that stand around it."""


def make_tokenizer() -> Any:
    """Return a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    plain = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def make_sighted(place: Path, seed: int = 0) -> Path:
    """Write a model of random weights with an encoder of pictures, and its processor; return its directory."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = make_tokenizer()
    config = Idefics3Config(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 56, "patch_size": 14},
        text_config={"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0,
                     "vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS, "bos_token_id": 1,
                     "eos_token_id": 2},
        image_token_id=SPECIAL.index("<image>"), scale_factor=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config).float()
    for weights in model.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights, std=0.15)
    model.save_pretrained(place)
    side = {"longest_edge": 56}
    pixels = Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    Idefics3Processor(pixels, tokenizer, image_seq_len=PER_PICTURE, chat_template=TEMPLATE).save_pretrained(place)
    return place


def logits_of(engine: Engine, asked: Questionnaire) -> list[list[float]]:
    """Return the logits after the first two open prompts."""
    prompts = [asked.prompts[it.id].given for it in asked.suite.all_open[:2]]
    return [row.tolist() for row in engine.next_logits(prompts)]


def main(model: str, other: str, suite: str, answers: str) -> None:
    """Do all that is asked in one process."""
    from safetensors.torch import load_file

    engine = make_engine("vllm", Settings())
    asked = Questionnaire(load_suite(suite), Tokens(Path(model)), POSITIONS)
    records: list[dict[str, Any]] = []
    engine.load(Path(model), asked.length)
    ask(engine, asked, {"model_name": "sighted"}, records.append)
    found = {"records": records, "logits": logits_of(engine, asked)}
    engine.reload(load_file(Path(other) / "model.safetensors").items())
    found["reloaded"] = logits_of(engine, asked)
    engine.load(Path(other), asked.length)
    found["loaded"] = logits_of(engine, asked)
    engine.close()
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
