"""One domain of a mixture, tokenised once and kept on disk, whole or not at all.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import DataError, WritingError
from ..files import atomic_directory, check_output, refusal, write_json
from . import pydocs
from .fingerprints import of_source, of_texts, of_tokenizer, short_hash
from .formats import ChatTemplate, Document, RowLayout, detect
from .mixture import Mixture, Source
from .npy import RowWriter
from .overlap import Overlap
from .reading import EMBEDDED, files_in, hub_revision, read_rows, rows_by_file, strings_in
from .templates import TemplateRefusal
from .tokenising import tokenised

LossOn = Literal["all", "answers"]
OnTokenised = Callable[[str, int, int], None]
"""Hears the name of a domain, its tokens so far, and the tokens it needs at most."""

_VERSION = 1
_COMPRESSION = 20
"""Bytes of text in a byte of a parquet file, at most."""
_TOKENS, _ANSWERS, _ACCOUNT = "tokens.npy", "answers.npy", "account.json"


@dataclass
class Account:
    """What was read of a source, and what became of it."""

    format: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    """Column by role."""
    revision: str | None = None
    """Commit of a data set on the hub."""
    documents: int = 0
    tokens_read: int = 0
    """Tokens of these documents; what does not fill the last window is not used."""
    answer_tokens: int = 0
    dropped: int = 0
    """Documents left out because they overlap with the text to exclude."""
    refused: int = 0
    """Rows that the chat template does not take, as `refusal` says of the last one."""
    refusal: str = ""
    exhausted: bool = False
    """Whether the source has no more."""
    digest: str = ""
    """Hash of tokens and answers."""


@dataclass(frozen=True, eq=False)
class PackedDomain:
    """The windows of one source."""

    name: str
    weight: float
    tokens: np.ndarray
    """(N, T) unsigned integers, memory-mapped: documents joined by EOS, no padding."""
    answers: np.ndarray | None
    """(N, T) bool, memory-mapped: where there is loss; None: everywhere."""
    account: Account

    @property
    def num_windows(self) -> int:
        return len(self.tokens)

    @property
    def num_tokens(self) -> int:
        return self.tokens.size


class DomainCache:
    """Packs domains into a directory, and finds them there again.

    Args:
        exclude: sources or documents that nothing to train on may overlap with.
        seed: of the order in which documents are read.
    """

    def __init__(
        self,
        directory: Path,
        mixture: Mixture,
        tokenizer: Any,
        sequence_length: int,
        vocab_size: int | None = None,
        loss_on: LossOn = "all",
        exclude: Mixture | list[str] | None = None,
        seed: int = 0,
    ):
        self.directory, self.tokenizer = directory, tokenizer
        self.sequence_length, self.vocab_size = sequence_length, vocab_size or len(tokenizer)
        self.loss_on, self.exclude, self.seed = loss_on, exclude, seed
        self._template = self._make_template(mixture.default_chat_template)
        self._overlap: Overlap | None = None
        if isinstance(exclude, Mixture):
            excluded = [of_source(source) for source in exclude.sources]
        else:
            excluded = exclude and of_texts(exclude)
        self._key = [
            _VERSION, of_tokenizer(tokenizer), self.vocab_size, sequence_length, loss_on, seed,
            excluded, self._template.text,
        ]  # fmt: skip

    def key(self, source: Source, windows: int) -> str:
        """Changes with whatever changes the windows of a domain."""
        how = [source.format, source.columns, windows]
        return short_hash([self._key, how, of_source(source)])

    def check(self, source: Source, windows: int) -> None:
        """Look at the first row of a source that is not in the cache, before others take hours.

        Raises:
            DataError: as `domain` does of whatever shows in it.
        """
        if _open(self._place(source, windows), source):
            return
        rows = rows_by_file(source.path, source.subset, source.split, source.revision, self.seed)
        for row in islice(rows, 1):
            self._template_for(detect(row, source.path, source.format, source.columns), source)

    def domain(self, source: Source, windows: int, on_progress: OnTokenised) -> PackedDomain:
        """Open the first `windows` windows of a source, or all; tokenise them if need be.

        Raises:
            DataError: if the source is malformed or empty.
            WritingError: if the cache cannot be written.
        """
        place = self._place(source, windows)
        if packed := _open(place, source):
            return packed
        check_output(place, overwrite=True, needed_bytes=self._largest_size(source, windows))
        self.directory.mkdir(parents=True, exist_ok=True)
        with _lock(place.with_name(f".{place.name}.lock")) as is_alone:
            if packed := _open(place, source):  # by whoever held the lock before
                return packed
            if is_alone:
                for leftover in self.directory.glob(f".{place.name}.*-*"):  # of a killed process
                    shutil.rmtree(leftover, ignore_errors=True)
            self._read_excluded()
            with atomic_directory(place, overwrite=True) as partial:
                self._pack(source, windows, partial, on_progress)
        packed = _open(place, source)
        assert packed is not None
        return packed

    def _place(self, source: Source, windows: int) -> Path:
        name = re.sub(r"[^\w.-]+", "-", source.name)[:40]
        return self.directory / f"{name}-{self.key(source, windows)}"

    @property
    def _dtype(self) -> type[np.unsignedinteger]:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def _largest_size(self, source: Source, windows: int) -> int:
        """Bytes that a domain takes on disk at most."""
        tokens = windows * self.sequence_length
        if source.path != EMBEDDED and source.place is not None:
            sizes = [
                file.stat().st_size * (_COMPRESSION if file.suffix == ".parquet" else 1)
                for file in files_in(source.place)
            ]
            tokens = min(tokens, sum(sizes))  # a token has at least a byte
        return tokens * (np.dtype(self._dtype).itemsize + 1)

    def _make_template(self, default: str | None) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, default, mark_answers=self.loss_on == "answers")

    def _read_excluded(self) -> None:
        if self.exclude is None or self._overlap is not None:
            return
        texts = self.exclude if isinstance(self.exclude, list) else _texts_of(self.exclude)
        self._overlap = Overlap(texts)

    def _pack(
        self, source: Source, windows: int, directory: Path, on_progress: OnTokenised
    ) -> None:
        length, account = self.sequence_length, Account()
        documents = self._documents(source, account)
        with (
            RowWriter(directory / _TOKENS, length, self._dtype) as tokens,
            RowWriter(directory / _ANSWERS, length, np.bool_) as answers,
        ):
            for ids, has_loss in tokenised(documents, self.tokenizer, self.vocab_size):
                account.documents += 1
                account.tokens_read += len(ids)
                missing = windows * length - tokens.num_values
                tokens.add(ids[:missing])
                account.answer_tokens += int(answers.add(has_loss[:missing]).sum())
                on_progress(source.name, tokens.num_values, windows * length)
                if tokens.num_rows == windows:
                    break
            else:
                account.exhausted = True
        account.digest = short_hash([tokens.digest.hexdigest(), answers.digest.hexdigest()])
        if not account.documents:
            raise DataError(_nothing(source, account))
        if account.answer_tokens == tokens.num_rows * length:
            (directory / _ANSWERS).unlink()  # loss is everywhere
        elif not account.answer_tokens:
            raise DataError(
                f"Domain '{source.name}' has no answer token to take the loss on (read as "
                f"{account.format}). Name its columns in a mixture file, or take the loss on "
                "everything."
            )
        write_json(directory / _ACCOUNT, asdict(account))

    def _documents(self, source: Source, account: Account) -> Iterator[Document]:
        """The documents of a source that are to be trained on; what is left out is counted."""
        layout, template = None, self._template
        if source.path != EMBEDDED and source.place is None:
            account.revision = hub_revision(source.path, source.revision)
        rows = read_rows(source.path, source.subset, source.split, account.revision, self.seed)
        for row in rows:
            if layout is None:
                layout = detect(row, source.path, source.format, source.columns)
                account.format, account.columns = layout.format, layout.columns
                template = self._template_for(layout, source)
            try:
                documents = layout.documents(row, source.path, template)
            except TemplateRefusal as error:
                account.refused += 1
                account.refusal = str(error)
                continue
            for document in documents:
                if self._overlap is not None and self._overlap.contains(document.text):
                    account.dropped += 1
                else:
                    yield document

    def _template_for(self, layout: RowLayout, source: Source) -> ChatTemplate:
        if self._template.text is not None:
            return self._template
        if layout.format == "chat":
            raise DataError(
                f"'{source.path}' holds chats, but the tokenizer has no chat template. Take the "
                "tokenizer of a chat model, or say `default_chat_template: alpaca` (or a Jinja "
                "file) in a mixture file."
            )
        return self._make_template("alpaca")


def _texts_of(mixture: Mixture) -> Iterator[str]:
    """All text of all columns; of the embedded text the part that is held out from training."""
    for source in mixture.sources:
        if source.path == EMBEDDED:
            yield from pydocs.documents("heldout")
        else:
            rows = read_rows(source.path, source.subset, source.split, source.revision)
            yield from chain.from_iterable(strings_in(row.values) for row in rows)


def _nothing(source: Source, account: Account) -> str:
    if account.refused:
        return (
            f"The chat template refuses all of '{source.path}': {account.refusal}. Take another "
            "template, or correct the data."
        )
    if account.dropped:
        return (
            f"All {account.dropped:,} documents of '{source.path}' overlap with the text to "
            "exclude; nothing is left to train on. Take other text."
        )
    return f"'{source.path}' is empty: it has no document to train on. Name other text."


def _open(place: Path, source: Source) -> PackedDomain | None:
    """Open a domain in the cache, or return None if it is not there, or damaged."""
    try:
        account = Account(**json.loads((place / _ACCOUNT).read_text("utf-8")))
        tokens = np.load(place / _TOKENS, mmap_mode="r")
        marked = place / _ANSWERS
        answers = np.load(marked, mmap_mode="r") if marked.exists() else None
    except (OSError, ValueError, TypeError):
        return None
    return PackedDomain(source.name, source.weight, tokens, answers, account)


@contextmanager
def _lock(file: Path) -> Iterator[bool]:
    """Hold a lock that ends with the process. Yields whether the file system can do that."""
    from filelock import FileLock

    lock = FileLock(file)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", None) not in (None, errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
            raise WritingError(
                f"'{file.parent}' could not be written: {refusal(error)}."
            ) from error
        yield False  # then two may do the same work, and either result is whole
        return
    try:
        yield True
    finally:
        lock.release()
