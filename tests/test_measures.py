"""Measures, labels, grading and the bilingual problems, against SciPy, every token of a vocabulary, and the study."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats

from tensorsurgeon.evaluate.bilingual import problems
from tensorsurgeon.evaluate.grading import find_numbers, find_script, first_position, is_right
from tensorsurgeon.evaluate.labels import Variant, counted, find_variants
from tensorsurgeon.evaluate.measures import Loss, divergence, entropy, log_softmax, top, total
from tensorsurgeon.evaluate.tokens import Tokens

MANNEQUIN = Path(__file__).parent / "mannequin"


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return Tokens(MANNEQUIN / "bf16")


def draw(seed: int, size: int = 5000, scale: float = 8.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0, 300.0])
def test_distributions_are_scipys(scale: float) -> None:
    one, other = draw(1, scale=scale), draw(2, scale=scale)
    mine = log_softmax(one)
    np.testing.assert_allclose(mine, scipy.special.log_softmax(one.astype(np.float64)), rtol=1e-13, atol=1e-13)
    p, q = np.exp(mine), scipy.special.softmax(other.astype(np.float64))
    assert math.isclose(p.sum(), 1, rel_tol=1e-12)
    assert math.isclose(entropy(mine), scipy.stats.entropy(p), rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(entropy(mine) / math.log(2), scipy.stats.entropy(p, base=2), rel_tol=1e-9, abs_tol=1e-12)
    expected = np.sum(p * (mine - scipy.special.log_softmax(other.astype(np.float64))))
    assert math.isclose(divergence(mine, log_softmax(other)), expected, rel_tol=1e-12)
    if q.min() > 0:
        assert math.isclose(divergence(mine, log_softmax(other)), scipy.stats.entropy(p, q), rel_tol=1e-9)


def test_a_distribution_does_not_diverge_from_itself() -> None:
    assert divergence(log_softmax(draw(3)), log_softmax(draw(3))) == 0


def test_what_has_no_probability_adds_nothing_and_what_is_no_number_stays_none() -> None:
    masked = draw(4)
    masked[::2] = -np.inf
    p = np.exp(log_softmax(masked))
    assert math.isclose(entropy(log_softmax(masked)), scipy.stats.entropy(p), rel_tol=1e-9)
    assert divergence(log_softmax(draw(4)), log_softmax(masked)) == math.inf
    broken = draw(5)
    broken[17] = np.nan
    assert math.isnan(entropy(log_softmax(broken)))
    assert math.isnan(divergence(log_softmax(draw(5)), log_softmax(broken)))


def test_the_most_probable_are_in_order_and_ties_in_that_of_their_numbers() -> None:
    assert top(log_softmax(np.array([1, 3, 2, 3, 0], np.float32)), 4).tolist() == [1, 3, 2, 0]


def test_losses_add_up() -> None:
    both = total([Loss(10.0, 4, 8), Loss(20.0, 6, 12)])
    assert both == Loss(30.0, 10, 20)
    assert both.perplexity == math.exp(3)
    assert both.bits_per_byte == 30 / math.log(2) / 20
    assert Loss(1e6, 1, 1).perplexity == math.inf
    assert math.isnan(Loss(math.nan, 1, 1).perplexity)


def test_every_token_that_spells_a_word_is_found(tokens: Tokens) -> None:
    """The oracle decodes each token of the vocabulary by itself."""
    found = find_variants(tokens, {"affirm": ["yes"], "deny": ["no"], "more": ["a", "coins"]})
    for label in ("yes", "no", "a", "coins"):
        expected = {
            token
            for token in range(len(tokens.tokenizer))
            for text in [tokens.tokenizer.decode([token])]
            if text.casefold() in (label, f" {label}") and token not in tokens.special
        }
        assert {it.tokens[0] for it in found if it.label == label and it.single} == expected
        assert expected


def test_words_of_several_tokens_are_marked_and_spelled_in_all_cases(tokens: Tokens) -> None:
    found = {it.spelling: it for it in find_variants(tokens, {"affirm": ["yes"]})}
    assert set(found) == {"yes", " yes", "Yes", " Yes", "YES", " YES"}
    assert found["Yes"].single
    assert not found[" YES"].single
    for spelling, it in found.items():
        assert tokens.tokenizer.decode(list(it.tokens)) == spelling


def test_a_spelling_that_begins_as_another_ends_counts_once() -> None:
    whole = [
        Variant("no", "deny", "no", (5,)),
        Variant("nope", "deny", "nope", (5, 9)),
        Variant("nah", "deny", "nah", (6, 7)),
    ]
    assert [it.spelling for it in counted(whole)] == ["no", "nah"]


def test_a_token_belongs_to_each_set_once(tokens: Tokens) -> None:
    found = find_variants(tokens, {"one": ["yes", "YES"], "other": ["Yes"]})
    keys = [(it.set, it.tokens) for it in found]
    assert len(keys) == len(set(keys))
    assert {it.set for it in found if it.spelling == "Yes"} == {"one", "other"}


def test_the_twenty_problems_are_those_of_the_study() -> None:
    """Made by the study's own script: category, numbers in the order in which they were drawn, answer."""
    assert [(it.category, *it.numbers.values(), it.answer) for it in problems(42, 4)] == [
        ("combinatorics", 7, 6, 7), ("combinatorics", 12, 1, 12), ("combinatorics", 12, 3, 220),
        ("combinatorics", 7, 3, 35), ("sequences", 9, 6, 25, 2025), ("sequences", 12, 6, 18, 1134),
        ("sequences", 5, 9, 6, 165), ("sequences", 15, 9, 27, 3564), ("modular", 1285, 31, 14),
        ("modular", 4395, 32, 11), ("modular", 85, 27, 4), ("modular", 6708, 34, 10), ("geometry", 12, 5, 60),
        ("geometry", 17, 18, 306), ("geometry", 39, 40, 1560), ("geometry", 8, 49, 392),
        ("arithmetic", 990, 791, 783090), ("arithmetic", 238, 152, 390), ("arithmetic", 556, 756, 1312),
        ("arithmetic", 702, 768, 1470),
    ]  # fmt: skip


def test_every_problem_is_answered_rightly() -> None:
    """Each answer by another way than the generator's formula: counting."""
    for it in problems(42, 40):
        n = it.numbers
        counted_out = {
            "plus": lambda n=n: n["a"] + n["b"],
            "times": lambda n=n: sum(n["a"] for _ in range(n["b"])),
            "combinatorics": lambda n=n: (
                math.factorial(n["n"]) // math.factorial(n["k"]) // math.factorial(n["n"] - n["k"])
            ),
            "modular": lambda n=n: n["a"] - n["b"] * (n["a"] // n["b"]),
            "geometry": lambda n=n: len(range(n["w"] * n["h"])),
            "sequences": lambda n=n: sum(n["a"] + place * n["d"] for place in range(n["n"])),
        }
        assert it.answer == counted_out[it.kind]()
    assert len(problems(42, 40)) == 200
    assert problems(43) != problems(42)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("The answer is 42.", ["42"]),
        ("12 - 5 = 7", ["12", "5", "7"]),
        ("12-5=7, and 3-12=-9", ["12", "5", "7", "3", "12", "-9"]),
        ("-4", ["-4"]),
        ("783,090 in all", ["783090"]),
        ("1,23 and 4,5678", ["1", "23", "4", "5678"]),
        ("3.14 is no 3", ["3.14", "3"]),
        ("答案是35。", ["35"]),
        ("x2 and 10th", ["2", "10"]),
    ],
)
def test_numbers_are_taken_whole(text: str, numbers: list[str]) -> None:
    assert [number for _, number in find_numbers(text)] == numbers


def test_what_counts_as_right() -> None:
    assert is_right("It is 12.", ["12"], "number")
    assert not is_right("It is 125 or 12.5", ["12"], "number")
    assert is_right("Yes, it is.", ["yes"], "word")
    assert not is_right("Yesterday", ["yes"], "word")
    assert is_right(" STONE\n", ["STONE"], "exact")
    assert not is_right("STONE!", ["STONE"], "exact")


@pytest.mark.parametrize(
    "text", ["5 + 9 = 14, so 14", "所以答案是 14。", "an answer: 114, no, 14!", "1 4 14", "没有", "14"]
)
def test_positions_are_those_found_by_hand(tokens: Tokens, text: str) -> None:
    """The oracle looks at each token's own offsets, which the tokenizer tells, and at the words one by one."""
    encoded = tokens.tokenizer(text, return_offsets_mapping=True)
    found = first_position(text, "14", encoded["input_ids"], tokens.decode)
    start = next((place for place, number in find_numbers(text) if number == "14"), None)
    if start is None:
        assert found is None
        return
    assert found is not None
    offsets = [place for place, (first, last) in enumerate(encoded["offset_mapping"]) if first <= start < last]
    assert found.token == offsets[-1]
    assert found.word == len(text[: start + 1].split()) - 1


def test_scripts() -> None:
    assert find_script("the answer is 5").language == "en"
    assert find_script("答案是 5 ok").language == "zh"
    assert find_script("42").language is None
    assert find_script("") == (0, 0, None)
    assert find_script("答a 1") == (1 / 3, 1 / 3, "en")
