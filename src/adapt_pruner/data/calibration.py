"""Calibration: token windows cut at random places out of random documents.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, DataError, shortened, shown
from . import pydocs
from .reading import (
    DOCUMENT_SEPARATOR,
    READERS,
    check_depth_of,
    explain_hub,
    files_in,
    local_path,
    local_rows,
)
from .reading import EMBEDDED as EMBEDDED


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
    texts = islice(read_documents(source, text_column, seed), max_documents)
    documents = list(_tokenise(texts, tokenizer))
    largest = max((int(tokens.max()) for tokens in documents), default=0)
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


def _tokenise(texts: Iterable[str], tokenizer: Any) -> Iterator[Tensor]:
    texts = iter(texts)
    while batch := list(islice(texts, 256)):
        for ids in tokenizer(batch, verbose=False)["input_ids"]:
            if ids:
                yield torch.tensor(ids, dtype=torch.int32)


def read_documents(source: str, text_column: str = "text", seed: int = 0) -> Iterator[str]:
    """Yield the documents of a source in a seeded random order. See `load_calibration`."""
    if source == EMBEDDED:
        yield from _shuffled(list(pydocs.documents("train")), seed)
        return
    try:
        path = local_path(source)
    except DataError as error:
        raise CalibrationError(str(error)) from None
    if path is None:
        yield from _read_rows(None, source, text_column, seed)
        return
    files = files_in(path)
    plain = [file for file in files if file.suffix == ".txt"]
    yield from _shuffled([d for file in plain for d in split_documents(_read(file))], seed)
    for reader in ("json", "parquet"):
        chosen = [file for file in files if READERS[file.suffix] == reader]
        if chosen:
            yield from _read_rows(chosen, source, text_column, seed)


def split_documents(text: str) -> list[str]:
    """Split plain text at lines of `<|endoftext|>`; without them it is one document."""
    pieces = (piece.strip() for piece in text.split(DOCUMENT_SEPARATOR))
    return [piece for piece in pieces if piece]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"'{file}' is not UTF-8 text (byte {error.start}). Convert it to UTF-8."
        ) from error
    except OSError as error:
        raise CalibrationError(f"'{file}' cannot be read: {error.strerror}.") from error


def _read_rows(files: list[Path] | None, source: str, column: str, seed: int) -> Iterator[str]:
    """The texts of local files, or of a data set on the hub, in a seeded random order."""
    lacking, is_known = 0, False
    for row in _stream(files, source, seed):
        if column in row:
            is_known = True
            yield from _text_in(row, source, column)
            continue
        lacking += 1
        if not is_known and (files is None or lacking == PATIENCE):
            raise CalibrationError(_no_column(source, column, row))
    if lacking and not is_known:
        raise CalibrationError(_no_column(source, column, row))


PATIENCE = 1_000
"""Rows without the column of the text, after which there is none; single rows may lack it."""


def _text_in(row: dict[str, Any], source: str, column: str) -> Iterator[str]:
    text = row[column]
    if not isinstance(text, str | None):
        raise CalibrationError(
            f"Column '{column}' of '{source}' holds {shown(text)}, which is not text. Name another "
            "with --text-column."
        )
    if text and text.strip():
        yield text


def _no_column(source: str, column: str, row: dict[str, Any]) -> str:
    has = ", ".join(sorted(map(str, row))[:20]) or "none"
    return f"'{source}' has no column '{column}'; it has {has}. Name one with --text-column."


def _stream(files: list[Path] | None, source: str, seed: int) -> Iterator[dict[str, Any]]:
    """Rows, shuffled by `datasets`: the order of files, and the rows in a buffer."""
    import datasets

    options: dict[str, Any] = {}
    try:
        if files is not None:
            check_depth_of(files)
            options = {"data_files": [str(file) for file in files]}
        name = source if files is None else READERS[files[0].suffix]
        data: Any = datasets.load_dataset(name, split="train", streaming=True, **options)
        yield from data.shuffle(seed=seed, buffer_size=10_000)
    except DataError as error:
        raise CalibrationError(str(error)) from error
    except Exception as error:  # of many libraries
        raise CalibrationError(_explain(error, files, source)) from error


def _explain(error: Exception, files: list[Path] | None, source: str) -> str:
    """Where the trouble is: our own reader names file and line."""
    if files is None:
        return explain_hub(source, error)
    for file in files:
        try:
            for _ in local_rows(file):
                pass
        except DataError as found:
            return str(found)
    what = shortened((str(error).strip() or repr(error)).splitlines()[0].rstrip("."))
    return f"'{source}' cannot be read: its rows do not fit together ({what}). Correct the files."


def _shuffled(items: list[str], seed: int) -> list[str]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[i] for i in order.tolist()]
