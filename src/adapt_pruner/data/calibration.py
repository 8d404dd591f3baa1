"""Calibration: token windows cut at random places out of random documents.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import CalibrationError, DataError, shown
from . import pydocs
from .reading import EMBEDDED as EMBEDDED
from .reading import DataRow, files_in, local_path, local_rows, read_rows


class CalibrationData:
    """Tokenised documents from which windows are drawn, the same ones for the same seed and step.

    Args:
        documents: token ids of each document, 1-D.
        window_length: T, tokens per window. Shorter documents are passed over.
        num_windows: B, windows per draw.
        redraw: draw other windows at every step; else always those of step 0.
    """

    def __init__(
        self,
        documents: Iterable[Tensor],
        window_length: int,
        num_windows: int,
        seed: int = 0,
        redraw: bool = True,
        source: str = "the calibration text",
    ):
        lengths = []
        self.documents = []
        for tokens in documents:
            lengths.append(len(tokens))
            if len(tokens) >= window_length:
                self.documents.append(tokens)
        self.window_length, self.num_windows = window_length, num_windows
        self.seed, self.redraw, self.source = seed, redraw, source
        self.num_tokens = sum(map(len, self.documents))
        if not self.documents:
            found = (
                f"the longest of {len(lengths)} has {max(lengths)}" if lengths else "it is empty"
            )
            raise CalibrationError(
                f"{source} has no document of at least {window_length} tokens; {found}. "
                "Use other text, or a smaller --window-length."
            )

    def reseeded(self, seed: int) -> CalibrationData:
        """The same documents, other windows."""
        return CalibrationData(
            self.documents, self.window_length, self.num_windows, seed, self.redraw, self.source
        )

    def draw(self, step: int = 0) -> Tensor:
        """(B, T) int64 windows for pruning step `step`."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step * self.redraw)
        chosen = torch.randint(len(self.documents), (self.num_windows,), generator=generator)
        places = torch.rand(self.num_windows, generator=generator, dtype=torch.float64)
        windows = []
        for i, place in zip(chosen.tolist(), places.tolist(), strict=True):
            tokens = self.documents[i]
            start = int(place * (len(tokens) - self.window_length + 1))
            windows.append(tokens[start : start + self.window_length])
        return torch.stack(windows).long()


def load_calibration(
    source: str,
    tokenizer: Any,
    window_length: int,
    num_windows: int,
    text_column: str = "text",
    max_documents: int = 10_000,
    seed: int = 0,
    redraw: bool = True,
    vocab_size: int | None = None,
) -> CalibrationData:
    """Read documents, tokenise each once, and return what windows are drawn from.

    Args:
        source: a local txt, jsonl, json or parquet file, a directory of such files, the name of a
            data set on the hub (streamed, its train split), or "pydocs".
        text_column: column of the text in jsonl, json, parquet and hub data.
        max_documents: at most so many, picked through a shuffled stream.
        vocab_size: rows of the model's embedding, to notice a tokenizer of another model.

    Raises:
        CalibrationError: if text, file or column is missing, malformed, empty or too short, or the
            tokenizer does not fit the model.
    """
    documents = load_documents(source, tokenizer, text_column, max_documents, seed, vocab_size)
    name = f"Calibration text '{source}'"
    return CalibrationData(documents, window_length, num_windows, seed, redraw, name)


def load_documents(
    source: str,
    tokenizer: Any,
    text_column: str = "text",
    max_documents: int = 10_000,
    seed: int = 0,
    vocab_size: int | None = None,
) -> list[Tensor]:
    """Read and tokenise the documents of a source, 1-D int32 each. See `load_calibration`."""
    found = sourced_documents(source, tokenizer, text_column, max_documents, seed, vocab_size)
    return [tokens for tokens, _ in found]


def sourced_documents(
    source: str,
    tokenizer: Any,
    text_column: str = "text",
    max_documents: int = 10_000,
    seed: int = 0,
    vocab_size: int | None = None,
) -> list[tuple[Tensor, str]]:
    """The same documents, each with what it comes from: see `DataRow.source`."""
    rows = islice(_read(source, text_column, seed), max_documents)
    documents = list(_tokenise(rows, tokenizer))
    largest = max((int(tokens.max()) for tokens, _ in documents), default=0)
    if vocab_size is not None:
        check_vocabulary(largest, vocab_size)
    return documents


def check_vocabulary(largest_token: int, vocab_size: int) -> None:
    """Raise CalibrationError if the tokenizer is one of another, larger vocabulary."""
    if largest_token >= vocab_size:
        raise CalibrationError(
            f"The tokenizer puts out token {largest_token}, but the model's vocabulary has "
            f"{vocab_size} entries. Use the tokenizer that belongs to the model."
        )


def _tokenise(rows: Iterable[tuple[str, str]], tokenizer: Any) -> Iterator[tuple[Tensor, str]]:
    rows = iter(rows)
    while batch := list(islice(rows, 256)):
        all_ids = tokenizer([text for text, _ in batch], verbose=False)["input_ids"]
        for ids, (_, source) in zip(all_ids, batch, strict=True):
            if ids:
                yield torch.tensor(ids, dtype=torch.int32), source


def read_documents(source: str, text_column: str = "text", seed: int = 0) -> Iterator[str]:
    """Yield the documents of a source in a seeded random order. See `load_calibration`."""
    return (text for text, _ in _read(source, text_column, seed))


def _read(source: str, text_column: str, seed: int) -> Iterator[tuple[str, str]]:
    """Each document with what it comes from."""
    try:
        path = None if source == EMBEDDED else local_path(source)
        files = files_in(path) if path is not None else []
        if source == EMBEDDED:
            texts = list(pydocs.documents("train"))
            yield from ((text, EMBEDDED) for text in _shuffled(texts, seed))
        elif files and all(file.suffix == ".txt" for file in files):
            rows = chain.from_iterable(map(local_rows, files))
            yield from _shuffled([(row.values["text"], row.source) for row in rows], seed)
        else:
            yield from _texts(read_rows(source, seed=seed), source, text_column)
    except DataError as error:
        raise CalibrationError(str(error)) from error


T = TypeVar("T")
FRUITLESS_ROWS = 1_000
"""Rows without the column of the text, after which there is none; single rows may lack it."""


def _texts(rows: Iterable[DataRow], source: str, column: str) -> Iterator[tuple[str, str]]:
    """What the column of the text holds, blank texts left out, and what it comes from."""
    is_known, lacking = False, None
    for number, row in enumerate(rows, 1):
        text = row.values.get(column)
        if not isinstance(text, str | None):
            raise DataError(
                f"Column '{column}' of '{source}' holds {shown(text)}, which is not text "
                f"({row.place}). Name another with --text-column."
            )
        if column in row.values:
            is_known = True
        else:
            lacking = row
        if lacking and not is_known and number == FRUITLESS_ROWS:
            break
        if text and text.strip():
            yield text, row.source
    if lacking and not is_known:
        has = ", ".join(sorted(map(str, lacking.values))[:20]) or "none"
        raise DataError(
            f"'{source}' has no column '{column}'; it has {has}. Name one with --text-column."
        )


def _shuffled(items: list[T], seed: int) -> list[T]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[i] for i in order.tolist()]
