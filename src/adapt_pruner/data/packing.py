"""Tokenise a mixture once, pack it into windows, and keep it on disk, memory-mapped.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ..checkpoint import atomic_directory, check_output, write_json
from ..errors import DataError
from .calibration import check_vocabulary
from .fingerprints import of_source, of_texts, of_tokenizer
from .formats import ChatTemplate, Document, Layout, TemplateRefusal, detect
from .mixture import Mixture, Source, read_mixture
from .overlap import Overlap
from .reading import EMBEDDED, pydocs, read_rows, strings_in

GROWTH = 4
"""With the dynamic policy, each domain is prepared for so many times its first share: the weight
that grew most in Sheared-LLaMA, that of C4, grew 3.3-fold (0.15 to 0.492)."""
FORMAT = 1
"""Of the cache; part of its key."""
_BATCH = 256

Progress = Callable[[str, int, int], None]
"""Hears the name of a domain, its tokens so far, and the tokens it needs."""
LossOn = Literal["all", "answers"]


@dataclass(frozen=True)
class PackedDomain:
    """The windows of one source."""

    name: str
    weight: float
    tokens: np.ndarray
    """(N, T) unsigned integers, memory-mapped: documents joined by EOS, no padding."""
    answers: np.ndarray | None
    """(N, T) bool, memory-mapped: where there is loss; None: everywhere."""
    account: dict[str, Any] = field(default_factory=dict)
    """What was read: format, columns, documents, dropped, refused, answer_tokens, exhausted."""

    @property
    def num_windows(self) -> int:
        return len(self.tokens)

    @property
    def num_tokens(self) -> int:
        return self.tokens.size


@dataclass(frozen=True)
class PackedData:
    """All domains of a mixture, ready to draw from with a `WindowSampler`."""

    domains: list[PackedDomain]
    sequence_length: int
    repeat: bool
    mixture: Mixture
    fingerprint: str
    """Changes with whatever changes the windows or their order."""

    @property
    def num_tokens(self) -> int:
        return sum(domain.num_tokens for domain in self.domains)

    def describe(self) -> list[str]:
        """A line per domain on what was found and taken."""
        return [_describe(domain, self.sequence_length) for domain in self.domains]


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    eos_token_id: int | None
    bos_token: str | None
    chat_template: Any
    is_fast: bool

    def __call__(self, text: Any, **options: Any) -> Any: ...
    def __len__(self) -> int: ...


def prepare(
    mixture: Mixture | str | Path,
    tokenizer: Any,
    *,
    sequence_length: int = 1024,
    tokens: int,
    cache: str | Path,
    loss_on: LossOn = "all",
    repeat: bool = False,
    exclude: str | Path | Iterable[str] | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
    on_progress: Progress | None = None,
) -> PackedData:
    """Tokenise what a budget needs of each source, or take it from the cache.

    Processes that prepare the same at the same time do it once: one works, the others wait.

    Args:
        mixture: see `read_mixture`.
        sequence_length: T. Windows are filled without padding; a document may go on in the next.
        tokens: budget of the run, a multiple of `sequence_length` or rounded up to one.
        cache: directory of what was tokenised, one directory per domain.
        loss_on: "answers": instruction and chat data have loss on the answers alone. Plain text
            has it everywhere.
        repeat: let a source that is too small be drawn again and again.
        exclude: text, as a path or name like that of a source, or documents; what overlaps with
            it is dropped. See `Overlap`.
        seed: of the order in which documents are read.
        vocab_size: rows of the model's embedding, to notice a tokenizer of another model.

    Raises:
        DataError: for data that are missing, malformed or too small, see `read_rows`, `detect`.
        WritingError: if the cache cannot be written.
    """
    mixture = read_mixture(mixture)
    _check(tokenizer, sequence_length, tokens, mixture)
    if isinstance(exclude, Iterable) and not isinstance(exclude, str | Path):
        exclude = list(exclude)
    job = _Job(
        tokenizer=tokenizer,
        template=ChatTemplate(tokenizer, mixture.default_chat_template),
        sequence_length=sequence_length,
        cache=Path(cache).expanduser(),
        loss_on=loss_on,
        exclude=exclude,
        seed=seed,
        vocab_size=vocab_size or len(tokenizer),
        common=_common_key(tokenizer, mixture, sequence_length, loss_on, exclude, seed, vocab_size),
        on_progress=on_progress or (lambda name, done, needed: None),
    )
    total = -(-tokens // sequence_length)
    domains, keys = [], []
    for source in (source for source in mixture.sources if source.weight):
        share, most = windows_needed(total, source.weight, len(mixture.sources), mixture.policy)
        key = job.key(source, most)
        domain = job.domain(source, most, key)
        _check_size(domain, share, total, sequence_length, repeat)
        domains.append(domain)
        keys.append([source.name, source.weight, key])
    return PackedData(domains, sequence_length, repeat, mixture, _hash([keys, repeat]))


def windows_needed(total: int, weight: float, domains: int, policy: str) -> tuple[int, int]:
    """Windows that a domain must have for a run of `total`, and those that are prepared of it.

    With fixed weights they are the same, the most that `WindowSampler` draws.
    """
    slack = 1 - 1 / (2 * domains - 2) if domains > 1 else 0
    needed = min(math.floor(total * weight + slack + 1e-9), total)
    if policy == "fixed":
        return needed, needed
    return needed, min(GROWTH * needed, total)


def _check(tokenizer: Any, sequence_length: int, tokens: int, mixture: Mixture) -> None:
    if sequence_length < 2:
        raise DataError(f"A window must have at least 2 tokens; got {sequence_length}.")
    if tokens < sequence_length:
        raise DataError(
            f"The budget must be at least one window of {sequence_length:,} tokens; got {tokens:,}."
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            "The tokenizer has no EOS token to join documents with. Set tokenizer.eos_token."
        )


def _check_size(
    domain: PackedDomain, needed: int, total: int, sequence_length: int, repeat: bool
) -> None:
    """Refuse a domain that cannot give what it must."""
    name, has = domain.name, domain.num_windows
    if not has:
        raise DataError(
            f"Domain '{name}' has {domain.account['tokens_read']:,} tokens in "
            f"{domain.account['documents']:,} documents, not one window of {sequence_length:,}. "
            "Give it more text, or shorten the windows."
        )
    if has < needed and not repeat:
        possible = int(total * has / needed) * sequence_length
        raise DataError(
            f"Domain '{name}' has {has * sequence_length:,} tokens, but its share "
            f"{domain.weight:.4g} of {total * sequence_length:,} needs "
            f"{needed * sequence_length:,}: the budget is larger than the data. Pass --repeat to "
            f"draw them again, or lower --tokens to about {possible:,}."
        )


def _describe(domain: PackedDomain, sequence_length: int) -> str:
    account = domain.account
    columns = ", ".join(account["columns"].values())
    parts = [
        f"{domain.name}: {account['format']} ({columns})",
        f"{domain.num_tokens:,} tokens in {domain.num_windows:,} windows of {sequence_length:,}",
        f"from {account['documents']:,} documents",
    ]
    if domain.answers is not None:
        parts.append(f"loss on {account['answer_tokens'] / max(domain.num_tokens, 1):.1%}")
    if account["dropped"]:
        parts.append(f"{account['dropped']:,} dropped (overlap with the evaluation text)")
    if account["refused"]:
        parts.append(f"{account['refused']:,} refused by the chat template")
    if account["exhausted"]:
        parts.append("all there is")
    return ", ".join(parts)


# The cache


def _common_key(
    tokenizer, mixture, sequence_length, loss_on, exclude, seed, vocab_size
) -> dict[str, Any]:
    if exclude is None or isinstance(exclude, list):
        excluded = exclude and of_texts(exclude)
    else:
        excluded = of_source(read_mixture(exclude).sources[0])
    return {
        "cache": FORMAT,
        "tokenizer": of_tokenizer(tokenizer),
        "template": ChatTemplate(tokenizer, mixture.default_chat_template).text,
        "sequence_length": sequence_length,
        "loss_on": loss_on,
        "exclude": excluded,
        "seed": seed,
        "vocab_size": vocab_size,
    }


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass
class _Job:
    """What all domains of one `prepare` have in common."""

    tokenizer: Any
    template: ChatTemplate
    sequence_length: int
    cache: Path
    loss_on: LossOn
    exclude: str | Path | list[str] | None
    seed: int
    vocab_size: int
    common: dict[str, Any]
    on_progress: Progress
    overlap: Overlap | None = None

    def key(self, source: Source, windows: int) -> str:
        own = {"format": source.format, "columns": source.columns, "windows": windows}
        return _hash([self.common, own, of_source(source)])

    def domain(self, source: Source, windows: int, key: str) -> PackedDomain:
        """Open a domain's windows; tokenise them if they are not in the cache."""
        from filelock import FileLock

        name = re.sub(r"[^\w.-]+", "-", source.name)
        place = self.cache / f"{name}-{key}"
        if packed := _open(place, source):
            return packed
        check_output(place, overwrite=True)
        self.cache.mkdir(parents=True, exist_ok=True)
        with FileLock(self.cache / f".{place.name}.lock"):
            if packed := _open(place, source):  # by whoever held the lock before
                return packed
            for leftover in self.cache.glob(f".{place.name}.*-*"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            self._load_overlap()
            with atomic_directory(place, overwrite=True) as partial:
                self._pack(source, windows, partial)
        packed = _open(place, source)
        assert packed is not None
        return packed

    def _load_overlap(self) -> None:
        if self.exclude is None or self.overlap is not None:
            return
        if isinstance(self.exclude, list):
            self.overlap = Overlap(self.exclude)
        elif str(self.exclude) == EMBEDDED:
            self.overlap = Overlap(pydocs.documents("heldout"))
        else:
            source = read_mixture(self.exclude).sources[0]
            rows = read_rows(source.path, source.subset, source.split, source.revision)
            self.overlap = Overlap(chain.from_iterable(strings_in(row.values) for row in rows))

    def _pack(self, source: Source, windows: int, directory: Path) -> None:
        """Write the first `windows` windows of a source, or all there are."""
        length, account = self.sequence_length, _new_account()
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        pieces = self._tokenised(self._documents(source, account), account)
        with _Writer(directory / "tokens.npy", length, dtype) as tokens:
            marked = _Writer(directory / "answers.npy", length, np.bool_)
            with marked as answers:
                for ids, is_answer in pieces:
                    missing = (windows - tokens.num_rows) * length - len(tokens.rest)
                    tokens.add(ids[:missing])
                    answers.add(is_answer[:missing])
                    account["answer_tokens"] = answers.num_true
                    self.on_progress(source.name, tokens.num_rows * length, windows * length)
                    if tokens.num_rows == windows:
                        break
                else:
                    account["exhausted"] = True
        if not account["documents"]:
            raise DataError(_nothing(source, account))
        if self.loss_on == "all" or account["format"] == "text":
            (directory / "answers.npy").unlink()
        elif tokens.num_rows and not account["answer_tokens"]:
            raise DataError(
                f"Domain '{source.name}' has no answer token to take the loss on (read as "
                f"{account['format']}). Name its columns in a mixture file, or take the loss on "
                "everything."
            )
        write_json(directory / "account.json", account)

    def _documents(self, source: Source, account: dict[str, Any]) -> Iterator[Document]:
        """The documents of a source that are to be trained on; what is left out is counted."""
        layout, template = None, self.template
        rows = read_rows(source.path, source.subset, source.split, source.revision, self.seed)
        for row in rows:
            if layout is None:
                layout = detect(row, source.path, source.format, source.columns)
                account |= {"format": layout.format, "columns": layout.columns}
                template = self._template_for(layout, source)
            try:
                documents = layout.documents(row, source.path, template)
            except TemplateRefusal as error:
                account["refused"] += 1
                account["refusal"] = str(error)
                continue
            for document in documents:
                if self.overlap is not None and self.overlap.contains(document.text):
                    account["dropped"] += 1
                else:
                    yield document

    def _template_for(self, layout: Layout, source: Source) -> ChatTemplate:
        if self.template.text is not None:
            return self.template
        if layout.format == "chat":
            raise DataError(
                f"'{source.path}' holds chats, but the tokenizer has no chat template. Take the "
                "tokenizer of a chat model, or say `default_chat_template: alpaca` (or a Jinja "
                "file) in a mixture file."
            )
        return ChatTemplate(self.tokenizer, "alpaca")

    def _tokenised(
        self, documents: Iterator[Document], account: dict[str, Any]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens of each document with its EOS, (n,) each, and which of them are answers."""
        eos, follows_eos = self.tokenizer.eos_token_id, False
        while batch := list(islice(documents, _BATCH)):
            for ids, is_answer in _tokenise(batch, self.tokenizer):
                if not len(ids):
                    continue
                check_vocabulary(int(ids.max()), self.vocab_size)
                account["documents"] += 1
                if eos not in ids[-2:]:  # chat templates often end with it, and a line break
                    ids = np.append(ids, eos)
                    is_answer = np.append(is_answer, is_answer[-1])
                if follows_eos and ids[0] == eos:  # where BOS is EOS, one of them parts two texts
                    ids, is_answer = ids[1:], is_answer[1:]
                follows_eos = ids[-1] == eos
                account["tokens_read"] += len(ids)
                yield ids, is_answer


def _new_account() -> dict[str, Any]:
    counts = dict.fromkeys(("documents", "tokens_read", "answer_tokens", "dropped", "refused"), 0)
    return {"format": "", "columns": {}, **counts, "exhausted": False}


def _nothing(source: Source, account: dict[str, Any]) -> str:
    if account["refused"]:
        return (
            f"The chat template refuses all of '{source.path}': {account['refusal']}. Take another "
            "template, or correct the data."
        )
    if account["dropped"]:
        return (
            f"All {account['dropped']:,} documents of '{source.path}' overlap with the text to "
            "exclude; nothing is left to train on. Take other text."
        )
    return f"'{source.path}' is empty: it has no document to train on. Name other text."


def _tokenise(batch: list[Document], tokenizer: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    options = {"verbose": False, "return_attention_mask": False}
    encoded: dict[int, tuple[list[int], Any]] = {}
    for special in {document.add_special_tokens for document in batch}:
        chosen = [i for i, d in enumerate(batch) if d.add_special_tokens == special]
        needs_offsets = tokenizer.is_fast and any(batch[i].answers is not None for i in chosen)
        result = tokenizer(
            [batch[i].text for i in chosen],
            add_special_tokens=special,
            return_offsets_mapping=needs_offsets,
            **options,
        )
        for place, i in enumerate(chosen):
            offsets = result["offset_mapping"][place] if needs_offsets else None
            encoded[i] = result["input_ids"][place], offsets
    for i, document in enumerate(batch):
        ids, offsets = encoded[i]
        yield np.array(ids, dtype=np.int64), _answer_tokens(document, ids, offsets, tokenizer)


def _answer_tokens(document: Document, ids: list[int], offsets: Any, tokenizer: Any) -> np.ndarray:
    """(n,) bool: tokens with any character of an answer."""
    if document.answers is None:
        return np.ones(len(ids), dtype=bool)
    marked = np.zeros(len(ids), dtype=bool)
    if offsets is not None:
        starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        for first, last in document.answers:
            marked |= (starts < last) & (ends > first)
        return marked
    for first, last in document.answers:  # tokenizers in Python know no offsets
        before, until = (
            tokenizer(document.text[:end], add_special_tokens=document.add_special_tokens)
            for end in (first, last)
        )
        start, end = (_shared(ids, part["input_ids"]) for part in (before, until))
        marked[start : len(ids) if last == len(document.text) else end] = True
    return marked


def _shared(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _open(place: Path, source: Source) -> PackedDomain | None:
    """Open a domain in the cache, or return None if it is not there or damaged."""
    if not (place / "account.json").is_file():
        return None
    try:
        account = json.loads((place / "account.json").read_text("utf-8"))
        tokens = np.load(place / "tokens.npy", mmap_mode="r")
        marked = place / "answers.npy"
        answers = np.load(marked, mmap_mode="r") if marked.exists() else None
    except (OSError, ValueError):
        return None
    return PackedDomain(source.name, source.weight, tokens, answers, account)


class _Writer:
    """Writes rows to an .npy file without knowing beforehand how many there will be."""

    def __init__(self, file: Path, length: int, dtype: Any):
        self.file, self.length, self.dtype = file, length, np.dtype(dtype)
        self.num_rows = self.num_true = 0
        self.rest = np.empty(0, dtype=self.dtype)

    def __enter__(self) -> _Writer:
        self.stream = self.file.open("wb")
        self._write_header()
        return self

    def __exit__(self, *exc: Any) -> None:
        if exc[0] is None:
            self.stream.seek(0)
            self._write_header()  # numpy leaves room in it for the first axis to grow
        self.stream.close()

    def add(self, values: np.ndarray) -> None:
        """Append values; what does not fill a row is kept for the next."""
        values = np.concatenate([self.rest, values.astype(self.dtype)])
        rows = len(values) // self.length
        filled, self.rest = np.split(values, [rows * self.length])
        self.stream.write(filled.tobytes())
        self.num_rows += rows
        self.num_true += int(np.count_nonzero(filled))

    def _write_header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self.stream,
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (self.num_rows, self.length),
            },
        )
