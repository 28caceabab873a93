"""Words as tokens: every single token that spells one, in all cases, with and without a space before it.

A spelling of several tokens, in small letters, with a capital or in capitals, is measured by the probability of its
tokens one after the other, and marked as a continuation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tensorsurgeon.evaluate.tokens import Tokens


class Variant(NamedTuple):
    """One way to say a label: the label, the set it belongs to, its spelling, and its tokens."""

    label: str
    set: str
    spelling: str
    tokens: tuple[int, ...]

    @property
    def single(self) -> bool:
        """Whether it is one token, whose probability is that of the next token."""
        return len(self.tokens) == 1


def find_variants(tokens: Tokens, sets: Mapping[str, Sequence[str]]) -> list[Variant]:
    """Return every variant of the labels of each set, in their order; each set of tokens once in its set."""
    by_word: dict[str, list[int]] = defaultdict(list)
    for token, spelling in enumerate(tokens.spellings):
        # One space at most: a token with a line break before the word is another answer.
        word = spelling.removeprefix(" ")
        if word and word == word.strip() and token not in tokens.special:
            by_word[word.casefold()].append(token)
    found: dict[tuple[str, tuple[int, ...]], Variant] = {}
    for name, labels in sets.items():
        for label in labels:
            singles = [(tokens.spellings[token], (token,)) for token in by_word[label.casefold()]]
            words = dict.fromkeys((label, label.lower(), label.capitalize(), label.upper()))
            written = [(text, tuple(tokens.after(text))) for word in words for text in (word, f" {word}")]
            several = [(text, ids) for text, ids in written if len(ids) > 1 and text not in dict(singles)]
            for spelling, ids in (*singles, *several):
                found.setdefault((name, ids), Variant(label, name, spelling, ids))
    return list(found.values())


def counted(variants: Iterable[Variant]) -> list[Variant]:
    """Return the variants whose probabilities add up to that of a set: none that goes on where another ends."""
    held = list(variants)
    ids = {it.tokens for it in held}
    return [it for it in held if not any(it.tokens[:cut] in ids for cut in range(1, len(it.tokens)))]
