"""Documents become tokens, each document with its EOS, and a mark on those that are answers.

Shapes: n tokens of one document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from .calibration import check_vocabulary
from .formats import Document

_DOCUMENTS, _CHARACTERS = 256, 4_000_000
"""Of a batch, at most: the library takes some hundred bytes per token."""

Tokens = tuple[np.ndarray, np.ndarray]
"""(n,) int64 token ids, and (n,) bool whether each has loss."""


def tokenised(documents: Iterable[Document], tokenizer: Any, vocab_size: int) -> Iterator[Tokens]:
    """Yield the tokens of each document, ended by EOS.

    A document that already ends with EOS, as those of chat templates do, gets none more. Where
    BOS and EOS are one token, a single one stands between two documents.

    Raises:
        CalibrationError: for a token that the model's vocabulary does not have.
    """
    eos, follows_eos = tokenizer.eos_token_id, False
    for batch in _batches(documents):
        for ids, has_loss in _tokenise(batch, tokenizer):
            if not len(ids):
                continue
            check_vocabulary(int(ids.max()), vocab_size)
            if eos not in ids[-2:]:  # templates may write a line break behind it
                ids, has_loss = np.append(ids, eos), np.append(has_loss, has_loss[-1])
            if follows_eos and ids[0] == eos:
                ids, has_loss = ids[1:], has_loss[1:]
            follows_eos = ids[-1] == eos
            yield ids, has_loss


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _DOCUMENTS or characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenise(batch: list[Document], tokenizer: Any) -> Iterator[Tokens]:
    """Tokenise all documents in as few calls as possible: the library works in parallel."""
    encoded: dict[int, tuple[list[int], Any]] = {}
    for special in {document.add_special_tokens for document in batch}:
        chosen = [i for i, d in enumerate(batch) if d.add_special_tokens == special]
        needs_offsets = tokenizer.is_fast and any(batch[i].answers is not None for i in chosen)
        result = tokenizer(
            [batch[i].text for i in chosen],
            add_special_tokens=special,
            return_offsets_mapping=needs_offsets,
            return_attention_mask=False,
            verbose=False,
        )
        offsets = result["offset_mapping"] if needs_offsets else [None] * len(chosen)
        encoded |= dict(zip(chosen, zip(result["input_ids"], offsets, strict=True), strict=True))
    for i, document in enumerate(batch):
        ids, offsets = encoded[i]
        yield np.array(ids, dtype=np.int64), _has_loss(document, ids, offsets, tokenizer)


def _has_loss(document: Document, ids: list[int], offsets: Any, tokenizer: Any) -> np.ndarray:
    """(n,) bool: tokens with any character of an answer; all where there are no answers."""
    if document.answers is None:
        return np.ones(len(ids), dtype=bool)
    marked = np.zeros(len(ids), dtype=bool)
    if offsets is not None:
        starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        for first, last in document.answers:
            marked |= (starts < last) & (ends > first)
        return marked
    for first, last in document.answers:  # tokenizers written in Python know no offsets
        start, end = (_tokens_before(end, document, ids, tokenizer) for end in (first, last))
        marked[start:end] = True
    return marked


def _tokens_before(end: int, document: Document, ids: list[int], tokenizer: Any) -> int:
    """How many of a document's tokens belong to its first `end` characters alone."""
    if end == len(document.text):
        return len(ids)
    special = document.add_special_tokens
    part = tokenizer(document.text[:end], add_special_tokens=special, verbose=False)["input_ids"]
    both = zip(ids, part, strict=False)
    return next((i for i, (a, b) in enumerate(both) if a != b), min(len(ids), len(part)))
