"""Rows of text data, one after the other: local files, directories and data sets of the hub.

Every row knows where it stands, so that whatever is wrong in it can be found. Nothing is held in
memory but the buffer that shuffles.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import DataError, shown
from ..parsing import ParsingError, parse_json
from . import pydocs

EMBEDDED = "pydocs"
"""Name of the text that every Python installation carries: its own documentation."""
DOCUMENT_SEPARATOR = "<|endoftext|>"
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}

LONGEST_DOCUMENT = 4_000_000
"""Characters; longer texts are taken as several documents, so that none fills the memory."""
BLANK = b" \t\r\n\xef\xbb\xbf"
"""White space, and a byte order mark."""
LONGEST_LINE, LONGEST_ARRAY = 1 << 28, 1 << 32
"""Bytes of a line, and of a file that is one JSON value: both are held in memory."""
SHUFFLE_ROWS, SHUFFLE_CHARACTERS = 10_000, 200_000_000


@dataclass(frozen=True)
class DataRow:
    """One record of a data set: its columns, and where it was found ("'a.jsonl' line 7")."""

    values: dict[str, Any]
    place: str

    @property
    def source(self) -> str:
        """What its column `source` says it comes from, or else the file or data set."""
        said = self.values.get("source")
        return said if isinstance(said, str) and said else self.place.rsplit(" ", 2)[0].strip("'")


def local_path(path: str) -> Path | None:
    """The file or directory of this name, or None where it can only be a data set on the hub.

    Raises:
        DataError: for a name that looks like a path but is none.
    """
    try:
        place = Path(path).expanduser()
        is_there = place.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, links in a circle
        raise DataError(f"There is no text file or directory {shown(path)}.") from error
    if is_there:
        return place
    if place.is_absolute() or place.suffix in READERS or path.startswith((".", "~")):
        raise DataError(f"There is no text file or directory '{path}'. Name one that exists.")
    return None


def files_in(path: Path) -> list[Path]:
    """The files below `path` that hold text, without empty ones, in the order of their names."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if file.suffix in READERS]
    if not files:
        raise DataError(
            f"'{path}' holds no text that can be read; expected {', '.join(sorted(READERS))} files."
        )
    return [file for file in files if file.stat().st_size]


def read_rows(
    path: str,
    subset: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> Iterator[DataRow]:
    """Yield the rows of a source in a seeded random order: shuffled files, and a shuffled stream.

    Args:
        path: a local txt, jsonl, json or parquet file, a directory of such files, the name of a
            data set on the hub, which is streamed, or "pydocs".
        subset: configuration of a data set on the hub; split: default train; revision: commit.

    Raises:
        DataError: naming file and line of what cannot be read.
    """
    return shuffled(rows_by_file(path, subset, split, revision, seed), seed)


def rows_by_file(
    path: str, subset: str | None, split: str | None, revision: str | None, seed: int
) -> Iterator[DataRow]:
    """As `read_rows`, but only the files are shuffled: the first row is there at once."""
    if path == EMBEDDED:
        documents = enumerate(pydocs.documents("train"), 1)
        return (DataRow({"text": text}, f"'{path}' document {i}") for i, text in documents)
    if (place := local_path(path)) is not None:
        return _rows_of(files_in(place), seed)
    return _hub_rows(path, subset, split or "train", revision, seed)


def hub_revision(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a data set on the hub stands for now; None if unknown."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except Exception:  # reading the data set will say what is wrong
        return revision


def shuffled(rows: Iterable[DataRow], seed: int) -> Iterator[DataRow]:
    """Shuffle a stream through a buffer, as `datasets` does; small data are shuffled as a whole."""
    generator, buffer, characters = random.Random(seed), [], 0
    for row in rows:
        buffer.append(row)
        characters += _characters(row.values)
        while len(buffer) > SHUFFLE_ROWS or (characters > SHUFFLE_CHARACTERS and len(buffer) > 1):
            chosen = generator.randrange(len(buffer))
            buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
            drawn = buffer.pop()
            characters -= _characters(drawn.values)
            yield drawn
    generator.shuffle(buffer)
    yield from buffer


def _characters(value: Any) -> int:
    return sum(map(len, strings_in(value)))


def strings_in(value: Any) -> Iterator[str]:
    """All text of a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)


def local_rows(file: Path) -> Iterator[DataRow]:
    """The rows of one file, in its order.

    Raises:
        DataError: naming file and line of what cannot be read.
    """
    try:
        yield from _READ[file.suffix](file)
    except OSError as error:
        raise DataError(f"'{file}' cannot be read: {error.strerror or error}.") from error


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, none of which fills the memory."""
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise DataError(
                    f"'{file}' line {number} has more than {LONGEST_LINE >> 20} MB. Cut its text "
                    "into documents."
                )
            yield number, line


def _rows_of(files: list[Path], seed: int) -> Iterator[DataRow]:
    random.Random(seed).shuffle(files)
    for file in files:
        yield from local_rows(file)


def _plain_documents(file: Path) -> Iterator[DataRow]:
    """Documents of a plain text; see `split_documents`. Places are counted in documents."""
    number = 0
    try:
        with file.open(encoding="utf-8") as stream:
            rest = ""
            while chunk := stream.read(LONGEST_DOCUMENT):
                *whole, rest = (rest + chunk).split(DOCUMENT_SEPARATOR)
                if len(rest) > LONGEST_DOCUMENT:
                    *pieces, rest = pieces_of(rest)
                    whole += pieces
                for text in filter(None, map(str.strip, whole)):
                    number += 1
                    yield DataRow({"text": text}, f"'{file}' document {number}")
            if rest.strip():
                yield DataRow({"text": rest.strip()}, f"'{file}' document {number + 1}")
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{file}' line {_undecodable_line(file)} is not UTF-8 text. Convert the file to UTF-8."
        ) from error


def pieces_of(text: str) -> list[str]:
    """Cut a text of more than `LONGEST_DOCUMENT` characters behind white space."""
    pieces = []
    while len(text) > LONGEST_DOCUMENT:
        window = text[:LONGEST_DOCUMENT]
        end = max(window.rfind("\n"), 0) or max(window.rfind(" "), 0)
        # Without white space, a separator that has come in half must stay in the rest.
        end = end + 1 if end else LONGEST_DOCUMENT - len(DOCUMENT_SEPARATOR)
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]


def _undecodable_line(file: Path) -> int:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _json_lines(file: Path) -> Iterator[DataRow]:
    for number, line in _lines(file):
        place = f"'{file}' line {number}"
        if line.strip():
            yield _row(_parsed(line, place, "the line"), place)


def _parsed(content: bytes, place: str, what: str) -> Any:
    try:
        return parse_json(content, allow_nan=True)
    except ParsingError as error:
        raise DataError(f"{place} is {error}. Correct {what}, or leave it out.") from error


def _is_array(file: Path) -> bool:
    """Whether a file is one JSON array, and not one object a line."""
    with file.open("rb") as stream:
        return file.suffix == ".json" and stream.read(1 << 16).lstrip(BLANK).startswith(b"[")


def _json_file(file: Path) -> Iterator[DataRow]:
    if not _is_array(file):
        yield from _json_lines(file)
        return
    if file.stat().st_size > LONGEST_ARRAY:
        raise DataError(
            f"'{file}' is one JSON array of more than {LONGEST_ARRAY >> 30} GB. Write its records "
            "as lines (jsonl)."
        )
    records = _parsed(file.read_bytes(), f"'{file}'", "the file")
    for number, values in enumerate(records, 1):
        yield _row(values, f"'{file}' record {number}")


def _parquet_rows(file: Path) -> Iterator[DataRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield DataRow(values, f"'{file}' row {number}")
    except pyarrow.ArrowException as error:
        after = f" after row {number}" if number else ""
        text = str(error).strip().splitlines()[0].rstrip(".")
        raise DataError(f"'{file}' is no parquet file that can be read{after}: {text}.") from error


def _row(values: Any, place: str) -> DataRow:
    if not isinstance(values, dict):
        raise DataError(f'{place} must be an object such as {{"text": ...}}; got {shown(values)}.')
    return DataRow(values, place)


_READ: dict[str, Callable[[Path], Iterator[DataRow]]] = {
    ".txt": _plain_documents,
    ".jsonl": _json_lines,
    ".json": _json_file,
    ".parquet": _parquet_rows,
}


def _hub_rows(
    name: str, subset: str | None, split: str, revision: str | None, seed: int
) -> Iterator[DataRow]:
    import datasets

    try:
        data: Any = datasets.load_dataset(
            name, subset, split=split, revision=revision, streaming=True
        )
        files = [data.shard(data.num_shards, i) for i in range(data.num_shards)]
        random.Random(seed).shuffle(files)  # read one after the other, as local ones
        for number, values in enumerate(chain.from_iterable(files), 1):
            yield DataRow(values, f"'{name}' row {number}")
    except Exception as error:  # of many libraries
        raise DataError(explain_hub(name, error)) from error


def explain_hub(name: str, error: Exception) -> str:
    """What to say of a data set of the hub that cannot be read."""
    first, *more = (str(error).strip() or repr(error)).splitlines()
    advice = "Name one on the hub that you can reach, or a local txt, jsonl, json or parquet file."
    if more and (found := re.search(r"available configs: (\[.*\])", more[0])):
        first = f"it has several configurations, {found[1]}"
        advice = "Say which as `subset` in a mixture file, or name other text."
    return f"Data set '{name}' cannot be read: {first.rstrip('.')}. {advice}"
