"""Which documents overlap with a text that they must not contain, such as an evaluation text.

Compared are n-grams of 13 normalised words, as for GPT-3 (arXiv:2005.14165, appendix C).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

WORDS = 13
SHARED = 10
"""Distinct n-grams in common from which a document is dropped: 22 words in a row, or more in
several places. A shorter document is dropped if all of it is in the text."""

_WORD = re.compile(r"\w+")


class Overlap:
    """The n-grams of a text. Immutable."""

    def __init__(self, texts: Iterable[str]):
        self._grams: set[int] = set()
        self._shorter: set[int] = set()
        for text in texts:
            grams = _grams(text)
            (self._grams if len(_words(text)) >= WORDS else self._shorter).update(grams)

    def contains(self, document: str) -> bool:
        """Whether a document shares so much with the text that it is to be dropped."""
        grams = _grams(document)
        if not grams:
            return False
        shared = len(grams & self._grams) + len(grams & self._shorter)
        return shared >= min(SHARED, len(grams))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _grams(text: str) -> set[int]:
    """Hashes of all n-grams, of the whole where it is shorter; valid in this process alone."""
    words = _words(text)
    if not words:
        return set()
    return {hash(tuple(words[i : i + WORDS])) for i in range(max(len(words) - WORDS, 0) + 1)}
