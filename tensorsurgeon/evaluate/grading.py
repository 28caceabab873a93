"""What an answer is worth: whether it is right, where the answer stands in it, and in which script it is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

Match = Literal["number", "word", "exact"]

# Whole numbers with their decimals, as 12.5 is neither 12 nor 5; a dash between two numbers is no sign, and a full stop
# no decimal point. Commas may part thousands.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?")


def find_numbers(text: str) -> Iterator[tuple[int, str]]:
    """Yield where each number of a text begins, and the number without commas."""
    yield from ((it.start(), it[0].replace(",", "")) for it in _NUMBER.finditer(text))


def is_right(text: str, accepted: Sequence[str], match: Match) -> bool:
    """Tell whether an answer holds one of the accepted ones: as a number, as a word, or as all that it says."""
    if match == "exact":
        return text.strip() in accepted
    if match == "number":
        return any(number in accepted for _, number in find_numbers(text))
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in accepted)


class Position(NamedTuple):
    """Where a number first stands in an answer, from 0: in which word, and in which token."""

    word: int
    token: int


def first_position(
    text: str, answer: str, tokens: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> Position | None:
    """Return where a number first stands in an answer, or None.

    The token is the first of those that spell it, found by decoding ever longer beginnings of the answer.
    """
    start = next((place for place, number in find_numbers(text) if number == answer), None)
    if start is None:
        return None
    word = next(place for place, it in enumerate(re.finditer(r"\S+", text)) if it.end() > start)
    lengths = (len(decode(tokens[: place + 1])) for place in range(len(tokens)))
    token = next((place for place, length in enumerate(lengths) if length > start), len(tokens))
    return Position(word, token)


class Script(NamedTuple):
    """The shares of Chinese characters and of Latin letters in a text, and the language that has more."""

    cjk: float
    latin: float
    language: Literal["en", "zh"] | None


def find_script(text: str) -> Script:
    """Return the script of a text: zh where Chinese characters outnumber Latin letters, en where there are letters."""
    shown = [character for character in text if not character.isspace()]
    cjk = sum("\u4e00" <= character <= "\u9fff" for character in shown)
    latin = sum(character.isascii() and character.isalpha() for character in shown)
    length = max(1, len(shown))
    return Script(cjk / length, latin / length, "zh" if cjk > latin else "en" if latin else None)
