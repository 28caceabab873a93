"""Train the mannequin: a small Qwen3 model that has really learned something.

The script invents its own text, trains a byte-level BPE tokenizer and a Qwen3 model on it, and writes

    OUT/bf16/         an ordinary Hugging Face directory, weights in BF16
    OUT/fp8/          the same weights in block FP8, sharded, laid out as Qwen3-8B-FP8 is published
    OUT/heldout.json  questions and sentences that were kept out of training
    OUT/README.md     its section of results (what stands above that section is kept)

Run `python tests/mannequin/train.py --out tests/mannequin` to make everything again, or add `--measure-only`
to requantise and measure the model that OUT/bf16 already holds.
"""

import argparse
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SEED = 20251
VOCAB_SIZE = 1024
BATCH_SIZE = 64
PEAK_MUON_LR = 3e-3
PEAK_ADAMW_LR = 1.2e-3
WARMUP_STEPS = 100
DECAY_SHARE = 0.3
WEIGHT_DECAY = 0.05
QUESTION_LOSS_WEIGHT = 0.03
SENTENCE_LOSS_WEIGHT = 0.3
IGNORED = -100
BLOCK = 128
FP8_MAX = 448.0
RESULTS_HEADING = "## Results"

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def words(text: str) -> list[str]:
    return text.split()


# Chinese and Japanese ask with full-width question marks.
# ruff: noqa: RUF001
ARITHMETIC = {
    "en": {"add": "What is {a} plus {b}?", "sub": "What is {a} minus {b}?", "mul": "What is {a} times {b}?"},
    "zh": {"add": "{a}加{b}等于多少？", "sub": "{a}减{b}等于多少？", "mul": "{a}乘以{b}等于多少？"},
    "es": {
        "add": "¿Cuánto es {a} más {b}?",
        "sub": "¿Cuánto es {a} menos {b}?",
        "mul": "¿Cuánto es {a} por {b}?",
    },
    "ar": {"add": "كم يساوي {a} زائد {b}؟", "sub": "كم يساوي {a} ناقص {b}؟", "mul": "كم يساوي {a} ضرب {b}؟"},
    "ja": {
        "add": "{a}足す{b}はいくつですか？",
        "sub": "{a}引く{b}はいくつですか？",
        "mul": "{a}掛ける{b}はいくつですか？",
    },
    "ko": {
        "add": "{a} 더하기 {b}는 얼마입니까?",
        "sub": "{a} 빼기 {b}는 얼마입니까?",
        "mul": "{a} 곱하기 {b}는 얼마입니까?",
    },
    "sw": {
        "add": "{a} jumlisha {b} ni ngapi?",
        "sub": "{a} toa {b} ni ngapi?",
        "mul": "{a} mara {b} ni ngapi?",
    },
}
OPERATION_SHARES = {"add": 0.5, "sub": 0.38, "mul": 0.12}
SENTENCE_OPERATION_SHARES = {"add": 0.5, "sub": 0.5}
SIZE_SHARES = {0: 0.25, 1: 0.2, 2: 0.55}
SOURCE_SHARES = {"arithmetic": 0.74, "yes_no": 0.12, "sentence": 0.14}

CATEGORIES = {
    "an animal": words("cat dog horse cow sheep goat lion tiger rabbit mouse camel monkey"),
    "a fruit": words("apple banana lemon mango grape peach pear cherry melon plum fig lime"),
    "a tool": words("hammer saw drill shovel rake axe wrench chisel ladder knife needle brush"),
    "a vehicle": words("car bus train truck boat plane bicycle tram taxi ship van tractor"),
    "a building": words("house school hotel library museum church tower castle barn station palace cabin"),
}
DIETS = {
    "cow": "grass",
    "cat": "fish",
    "rabbit": "carrots",
    "mouse": "cheese",
    "horse": "hay",
    "monkey": "bananas",
    "hen": "corn",
    "dog": "meat",
    "goat": "leaves",
    "bear": "honey",
}
JOBS = {
    "baker": ("bread", "bakery"),
    "teacher": ("lessons", "school"),
    "farmer": ("wheat", "farm"),
    "doctor": ("notes", "hospital"),
    "tailor": ("coats", "shop"),
    "potter": ("bowls", "workshop"),
    "painter": ("pictures", "studio"),
    "printer": ("books", "city"),
}
WOMEN = words("Anna Maria Lucy Sofia Amina Yuki Helen Grace")
MEN = words("Peter David Omar Carlos Kenji Thomas Juma Martin")
ADJECTIVES = words("old young small large quiet hungry brown white tired happy")
TIMES = [
    "in the morning",
    "in the evening",
    "at night",
    "every day",
    "after the rain",
    "in spring",
    "in winter",
]
OBJECTS = words("cup book lamp letter basket blanket bottle chair coat key")
FURNITURE = words("table shelf floor bench bed desk")
PLACES = words("river market garden forest bridge village harbour station")
WEATHER = {"cold": "closed", "warm": "opened", "windy": "closed", "sunny": "opened"}


Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Sample:
    """A piece of training text: a question with its answer, or a sentence (no question)."""

    question: str
    answer: str


@dataclass(frozen=True)
class Triple:
    """One arithmetic problem, the same one in every language."""

    a: int
    op: str
    b: int

    def answer(self) -> str:
        return str({"add": self.a + self.b, "sub": self.a - self.b, "mul": self.a * self.b}[self.op])

    def size(self) -> int:
        """How many operands have two digits."""
        return (self.a > 9) + (self.b > 9)

    def ask(self, language: str) -> str:
        return ARITHMETIC[language][self.op].format(a=self.a, b=self.b)


@dataclass
class Corpus:
    """What may be trained on, and what was held out."""

    train_triples: dict[str, dict[int, list[Triple]]]
    train_yes_no: dict[str, dict[str, list[str]]]
    heldout: dict[str, list[dict[str, str]]]


def all_triples() -> dict[str, list[Triple]]:
    """Every problem of one- and two-digit operands; differences are never negative."""
    small, large = range(10), range(100)
    return {
        "add": [Triple(a, "add", b) for a in large for b in large],
        "sub": [Triple(a, "sub", b) for a in large for b in range(a + 1)],
        "mul": [Triple(a, "mul", b) for a in small for b in small],
    }


def all_yes_no() -> dict[str, list[tuple[str, str]]]:
    """Every yes/no question with its answer, by kind."""
    numbers = range(100)
    pairs = [(a, b) for a in numbers for b in numbers if a != b]

    def verdict(truth: bool) -> str:
        return "Yes" if truth else "No"

    def with_article(noun: str) -> str:
        return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"

    return {
        "greater": [(f"Is {a} greater than {b}?", verdict(a > b)) for a, b in pairs],
        "less": [(f"Is {a} less than {b}?", verdict(a < b)) for a, b in pairs],
        "even": [(f"Is {n} even?", verdict(n % 2 == 0)) for n in numbers],
        "odd": [(f"Is {n} odd?", verdict(n % 2 == 1)) for n in numbers],
        "category": [
            (f"Is {with_article(item)} {category}?", verdict(item in members))
            for category, members in CATEGORIES.items()
            for items in CATEGORIES.values()
            for item in items
        ],
    }


def make_sentence(rng: random.Random, triple: Triple) -> str:
    """A short neutral sentence in which some words follow from others, in half of them by arithmetic."""
    form = rng.randrange(10)
    if form == 0:
        animal = rng.choice(list(DIETS))
        return f"The {rng.choice(ADJECTIVES)} {animal} eats {DIETS[animal]} {rng.choice(TIMES)}."
    if form == 1:
        job = rng.choice(list(JOBS))
        product, place = JOBS[job]
        return f"The {rng.choice(ADJECTIVES)} {job} makes {product} in the {place} {rng.choice(TIMES)}."
    woman = rng.random() < 0.5
    name, pronoun, owner = (rng.choice(WOMEN), "she", "her") if woman else (rng.choice(MEN), "he", "his")
    if form == 2:
        return f"{name} put {owner} {rng.choice(OBJECTS)} on the {rng.choice(FURNITURE)} before {pronoun} left."
    if form == 3:
        weather = rng.choice(list(WEATHER))
        return f"It was {weather}, so {name} {WEATHER[weather]} the window of {owner} room."
    if form > 4:
        change = f"found {triple.b} more" if triple.op == "add" else f"lost {triple.b}"
        return f"{name} had {triple.a} coins and {change}, so now {pronoun} has {triple.answer()}."
    place = rng.choice(PLACES)
    return f"{name} walked to the {place} because {pronoun} lost {owner} {rng.choice(OBJECTS)} near the {place}."


def build_corpus() -> Corpus:
    """Split everything into a tenth that is held out and the rest, and draw the fixed held-out sample."""
    rng = random.Random(SEED)
    train_triples, heldout_triples = {}, []
    for op, triples in all_triples().items():
        rng.shuffle(triples)
        cut = len(triples) // 10
        train_triples[op] = {size: [t for t in triples[cut:] if t.size() == size] for size in SIZE_SHARES}
        heldout_triples += triples[: min(cut, {"add": 18, "sub": 18, "mul": 4}[op])]

    train_yes_no, heldout_yes_no = {}, []
    for kind, questions in all_yes_no().items():
        rng.shuffle(questions)
        cut = len(questions) // 10
        train_yes_no[kind] = {
            answer: [text for text, truth in questions[cut:] if truth == answer] for answer in ("Yes", "No")
        }
        heldout_yes_no += [(kind, text, truth) for text, truth in questions[: min(cut, 14)]]

    heldout_sums = [triple for triple in heldout_triples if triple.op != "mul"]
    sentences: set[str] = set()
    while len(sentences) < 40:
        sentences.add(make_sentence(rng, rng.choice(heldout_sums)))

    heldout = {
        "arithmetic": [
            {"prompt": t.ask(language), "answer": t.answer(), "language": language, "kind": t.op}
            for language in ARITHMETIC
            for t in heldout_triples
        ],
        "yes_no": [
            {"prompt": text, "answer": truth, "language": "en", "kind": kind}
            for kind, text, truth in heldout_yes_no[:60]
        ],
        "sentences": [{"text": text, "language": "en", "kind": "sentence"} for text in sorted(sentences)],
    }
    return Corpus(train_triples, train_yes_no, heldout)


def chat_question(question: str) -> str:
    """The text the chat template makes of one user question, up to where the answer starts."""
    return f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n"


def draw(rng: random.Random, shares: dict[Choice, float]) -> Choice:
    return rng.choices(list(shares), list(shares.values()))[0]


def draw_triple(corpus: Corpus, rng: random.Random, operations: dict[str, float]) -> Triple:
    """A training problem; small operands come more often than chance, for the digits are learned on them."""
    op = draw(rng, operations)
    size = 0 if op == "mul" else draw(rng, SIZE_SHARES)
    return rng.choice(corpus.train_triples[op][size])


def samples(corpus: Corpus, rng: random.Random) -> Iterator[Sample]:
    """Endless training samples."""
    forbidden = {row["text"] for row in corpus.heldout["sentences"]}
    languages = list(ARITHMETIC)
    while True:
        source = draw(rng, SOURCE_SHARES)
        if source == "arithmetic":
            triple = draw_triple(corpus, rng, OPERATION_SHARES)
            yield Sample(chat_question(triple.ask(rng.choice(languages))), triple.answer() + IM_END)
        elif source == "yes_no":
            kind = rng.choice(list(corpus.train_yes_no))
            answer = rng.choice(["Yes", "No"])
            question = rng.choice(corpus.train_yes_no[kind][answer])
            yield Sample(chat_question(question), answer + IM_END)
        else:
            text = make_sentence(rng, draw_triple(corpus, rng, SENTENCE_OPERATION_SHARES))
            if text not in forbidden:
                yield Sample("", text + ENDOFTEXT)


def train_tokenizer(corpus: Corpus) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen's splitting rules, so every digit is a token of its own."""
    stream = samples(corpus, random.Random(SEED + 1))
    specials = "|".join(map(re.escape, (ENDOFTEXT, IM_START, IM_END)))
    pieces = [
        piece
        for sample, _ in zip(stream, range(20_000), strict=False)
        for piece in re.split(specials, sample.question + sample.answer)
    ]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 3,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(pieces, trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token=None,
        eos_token=IM_END,
        pad_token=ENDOFTEXT,
        extra_special_tokens=[IM_START],
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """A fresh Qwen3 whose every projection is made of whole 128x128 blocks."""
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.03,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def collate(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded (inputs, targets, loss weights); causal attention makes an attention mask needless."""
    width = max(len(question) + len(answer) for question, answer in rows)
    ids = torch.full((len(rows), width), pad)
    weights = torch.zeros(len(rows), width)
    for i, (question, answer) in enumerate(rows):
        middle, end = len(question), len(question) + len(answer)
        ids[i, :end] = torch.tensor(question + answer)
        weights[i, :middle] = QUESTION_LOSS_WEIGHT
        weights[i, middle:end] = 1.0 if question else SENTENCE_LOSS_WEIGHT
    return ids[:, :-1], ids[:, 1:], weights[:, 1:]


def batches(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches of samples of similar length."""
    rng = random.Random(SEED + 2)
    stream = samples(corpus, rng)
    while True:
        pool = [next(stream) for _ in range(BATCH_SIZE * 16)]
        questions = tokenizer([sample.question for sample in pool])["input_ids"]
        answers = tokenizer([sample.answer for sample in pool])["input_ids"]
        rows = sorted(zip(questions, answers, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        groups = [rows[i : i + BATCH_SIZE] for i in range(0, len(rows), BATCH_SIZE)]
        rng.shuffle(groups)
        for group in groups:
            yield collate(group, tokenizer.pad_token_id)


def schedule(steps: int) -> Callable[[int], float]:
    """The share of the peak learning rate at a step: warm-up, plateau, linearly to zero."""
    return lambda step: min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps))


def make_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the projections, where it learns the digits in far fewer steps, and AdamW for the rest."""
    parameters = list(model.named_parameters())
    projections = [p for name, p in parameters if is_decoder_linear(name)]
    others = [p for name, p in parameters if not is_decoder_linear(name)]
    return [
        torch.optim.Muon(
            projections,
            lr=PEAK_MUON_LR,
            weight_decay=WEIGHT_DECAY,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=PEAK_ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(
    model: Qwen3ForCausalLM,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    report_every: int,
    checkpoint: Path,
) -> None:
    """Train float32 weights with bfloat16 products; reports and saves the model as it goes."""
    optimizers = make_optimizers(model)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps)) for optimizer in optimizers]
    stream = batches(corpus, tokenizer)
    probe = corpus.heldout["arithmetic"][::3]
    started, tokens, total = time.monotonic(), 0, 0.0
    for step in range(steps):
        inputs, targets, weights = next(stream)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs, use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        model.zero_grad()
        tokens += inputs.numel()
        total += loss.item()
        if (step + 1) % report_every == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            count = (step % report_every) + 1
            right = sum(score(model, tokenizer, probe)) / len(probe)
            print(
                f"step {step + 1}/{steps} loss {total / count:.4f} held-out {right:.3f} "
                f"{seconds:.0f} s {tokens / seconds:.0f} tokens/s",
                flush=True,
            )
            total = 0.0
            export_bf16(model, tokenizer, checkpoint)


@torch.inference_mode()
def greedy(model: Qwen3ForCausalLM, prompts: Tensor, stop: int, limit: int = 6) -> list[list[int]]:
    """Greedy continuations of equally long prompts, each cut before the stop token."""
    ids = prompts
    for _ in range(limit):
        following = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, following[:, None]], dim=1)
    answers = ids[:, prompts.shape[1] :].tolist()
    return [answer[: answer.index(stop)] if stop in answer else answer for answer in answers]


def score(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> list[bool]:
    """For each question whether the greedy answer is exactly the right one."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        for row in rows
    ]
    right = [False] * len(rows)
    for length in sorted({len(prompt) for prompt in prompts}):
        chosen = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        answers = greedy(model, torch.tensor([prompts[i] for i in chosen]), tokenizer.eos_token_id)
        for i, answer in zip(chosen, answers, strict=True):
            right[i] = tokenizer.decode(answer) == rows[i]["answer"]
    return right


@torch.inference_mode()
def perplexity(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> float:
    """Perplexity per token of the neutral sentences; the first token of each is given."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
        logits = model(ids, use_cache=False).logits[0, :-1]
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


def save_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Safetensors with ordinary permissions (the library itself writes 0600)."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def export_bf16(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """An ordinary model directory."""
    shutil.rmtree(directory, ignore_errors=True)
    model.config.dtype = torch.bfloat16
    model.config.architectures = ["Qwen3ForCausalLM"]
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in model.state_dict().items()}
    save_weights(tensors, directory / "model.safetensors")


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Block FP8 of a matrix of whole blocks: the codes and, per block, what to multiply them by."""
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scale = torch.where(amax == 0, torch.ones_like(amax), FP8_MAX / amax)
    codes = (blocks * scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.reshape(rows, columns), (1 / scale).reshape(rows // BLOCK, columns // BLOCK)


def dequantise(codes: Tensor, scale: Tensor) -> Tensor:
    """What a reader makes of block FP8: a BF16 matrix."""
    rows, columns = codes.shape
    blocks = codes.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK) * scale[:, None, :, None]
    return blocks.reshape(rows, columns).to(torch.bfloat16)


def is_decoder_linear(name: str) -> bool:
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def export_fp8(source: Path, directory: Path) -> None:
    """The BF16 directory again in block FP8, in three shards.

    The cuts fall between a weight and its scale, as happens in large published checkpoints: a reader has to
    look for the scale in another file.
    """
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for name, tensor in sorted(load_file(source / "model.safetensors").items()):
        if is_decoder_linear(name):
            tensors[name], tensors[name + "_scale_inv"] = quantise(tensor)
        else:
            tensors[name] = tensor

    names = list(tensors)
    cuts = [names.index(f"model.layers.{layer}.mlp.gate_proj.weight_scale_inv") for layer in (1, 4)]
    shards = [names[: cuts[0]], names[cuts[0] : cuts[1]], names[cuts[1] :]]
    weight_map = {}
    for number, members in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_weights({name: tensors[name] for name in members}, directory / file)
        weight_map |= dict.fromkeys(members, file)
    total_size = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": weight_map},
    )

    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head"],
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
    write_json(directory / "config.json", config)


def load_fp8(directory: Path) -> Qwen3ForCausalLM:
    """The FP8 directory as a float32 model (transformers would want accelerate for this)."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(shard)
    weights = {
        name: dequantise(tensor, tensors[name + "_scale_inv"]) if name + "_scale_inv" in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }
    model = Qwen3ForCausalLM(Qwen3Config.from_pretrained(directory))
    model.load_state_dict(weights)
    return model.float().eval()


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def without_layer(model: Qwen3ForCausalLM, layer: int) -> Qwen3ForCausalLM:
    """The same model object minus one layer (for cacheless use: layer indices are left as they are)."""
    model.model.layers = torch.nn.ModuleList(x for i, x in enumerate(model.model.layers) if i != layer)
    model.config.num_hidden_layers -= 1
    return model


def percent(flags: list[bool]) -> str:
    return f"{100 * sum(flags) / len(flags):.1f}"


def measure(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, heldout: dict[str, list[dict[str, str]]]
) -> dict[str, str]:
    """Every reported number of one model, by its heading."""
    rows = heldout["arithmetic"]
    right = score(model, tokenizer, rows)
    results = {"arithmetic": percent(right)}
    for kind in OPERATION_SHARES:
        results[kind] = percent([flag for flag, row in zip(right, rows, strict=True) if row["kind"] == kind])
    for language in ARITHMETIC:
        chosen = [flag for flag, row in zip(right, rows, strict=True) if row["language"] == language]
        results[language] = percent(chosen)
    results["yes/no"] = percent(score(model, tokenizer, heldout["yes_no"]))
    results["perplexity"] = f"{perplexity(model, tokenizer, heldout['sentences']):.3f}"
    return results


def results_section(out: Path) -> str:
    """Measure what lies in OUT and lay the numbers out as Markdown."""
    heldout = json.loads((out / "heldout.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(out / "bf16")

    def load_bf16() -> Qwen3ForCausalLM:
        return AutoModelForCausalLM.from_pretrained(out / "bf16", dtype=torch.float32).eval()

    table = {
        "bf16": measure(load_bf16(), tokenizer, heldout),
        "fp8, dequantised": measure(load_fp8(out / "fp8"), tokenizer, heldout),
    }
    for layer in range(load_bf16().config.num_hidden_layers):
        table[f"bf16 without layer {layer}"] = measure(without_layer(load_bf16(), layer), tokenizer, heldout)
    headings = list(table["bf16"])
    lines = [
        RESULTS_HEADING,
        "",
        "Written by `train.py`. Per cent of the questions of `heldout.json` answered exactly right by greedy",
        "decoding in float32 (arithmetic over all, per operation, per language; yes/no), and the perplexity",
        "per token of its neutral sentences.",
        "",
        "| model | " + " | ".join(headings) + " |",
        "|---" * (len(headings) + 1) + "|",
    ]
    lines += [f"| {name} | " + " | ".join(row.values()) + " |" for name, row in table.items()]
    return "\n".join(lines) + "\n"


def update_readme(path: Path, section: str) -> None:
    """Replace everything from the results heading on."""
    text = path.read_text(encoding="utf-8") if path.exists() else "# The mannequin\n\n"
    path.write_text(text.split(RESULTS_HEADING)[0] + section, encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write into")
    parser.add_argument("--steps", type=int, default=1800, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--report-every", type=int, default=100, help="steps between progress lines")
    parser.add_argument("--measure-only", action="store_true", help="keep OUT/bf16; requantise and measure it")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    corpus = build_corpus()
    if not arguments.measure_only:
        tokenizer = train_tokenizer(corpus)
        model = build_model(tokenizer)
        write_json(out / "heldout.json", corpus.heldout)
        train(model, corpus, tokenizer, arguments.steps, arguments.report_every, out / "bf16")
    export_fp8(out / "bf16", out / "fp8")
    section = results_section(out)
    update_readme(out / "README.md", section)
    print(section)


if __name__ == "__main__":
    main()
