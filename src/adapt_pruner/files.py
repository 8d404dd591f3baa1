"""Files and directories that appear whole or not at all, and what users write by hand."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .durable import hidden_beside, replace_file, take_place
from .errors import AdaptPrunerError, Interrupted, LoadingError, WritingError, shown
from .figures import in_bytes
from .parsing import ParsingError, parse_json, parse_yaml


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_json_atomically(file: Path, content: Any) -> None:
    """Write JSON as `write_atomically` does. Raises ValueError for NaN or infinity."""
    write_atomically(file, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write beside `file`, flush, and rename it into place, making directories as needed. Any
    number of processes may do so at once: the last one wins.

    Raises:
        WritingError: for whatever the disk refuses; what was there is unchanged.
    """
    partial = hidden_beside(file, "partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as stream:
            stream.write(content.encode("utf-8") if isinstance(content, str) else content)
        replace_file(partial, file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise WritingError(
            f"'{file}' could not be written: {refusal(error)}. Free some space, or name another "
            "place."
        ) from error


LONGEST_NAME = 200
"""Bytes of a directory's name: while it is written it has a longer one, of at most 255."""


def check_output(directory: Path, overwrite: bool, needed_bytes: int = 0) -> None:
    """Raise WritingError now if `directory` could not be written later."""
    place = place_of(directory)
    if place.exists() and not place.is_dir():
        raise WritingError(f"'{directory}' is a file; name a directory.")
    if place.exists() and any(place.iterdir()) and not overwrite:
        raise WritingError(
            f"'{directory}' exists and is not empty. Name another directory, or pass --overwrite."
        )
    if os.path.ismount(place):
        raise WritingError(f"'{directory}' is a mount point; name a directory inside it.")
    parent = _existing_parent(place)
    if not parent.is_dir():
        raise WritingError(f"'{directory}' lies below '{parent}', a file; name another directory.")
    if not os.access(parent, os.W_OK):
        raise WritingError(f"'{parent}' cannot be written to; name a directory elsewhere.")
    free = shutil.disk_usage(parent).free
    if needed_bytes > free:
        raise WritingError(
            f"The result needs about {in_bytes(needed_bytes)}, but only {in_bytes(free)} are "
            f"free at '{parent}'. Free some space, or name a directory on another disk."
        )


def place_of(directory: Path) -> Path:
    """The absolute path of a directory to write. Links above it are followed. The directory itself
    must be no link: what a link leads to belongs to somebody else.

    Raises:
        WritingError: for a link, and a name that no file system takes.
    """
    named = Path(os.path.abspath(directory.expanduser()))
    try:
        if named.is_symlink():
            raise WritingError(
                f"'{directory}' is a link to '{os.readlink(named)}'; name the directory itself."
            )
        place = named.parent.resolve() / named.name
        if "\0" in str(named):
            raise ValueError
        place.exists()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a NUL, a long name
        if isinstance(error, WritingError):
            raise
        reason = getattr(error, "strerror", None) or "it is no path"
        raise WritingError(f"'{shown(directory)}' cannot be written: {reason}.") from error
    if len(os.fsencode(place.name)) > LONGEST_NAME:
        raise WritingError(
            f"'{shown(directory)}' cannot be written: its name has more than {LONGEST_NAME} bytes. "
            "Take a shorter one."
        )
    return place


def _existing_parent(place: Path) -> Path:
    return next(parent for parent in place.parents if parent.exists())


@contextmanager
def atomic_directory(directory: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden directory beside `directory` that takes its place when the block succeeds.

    If the block fails, the process is killed or the machine crashes, what was there before is still
    there. See `durable.take_place`.

    Raises:
        WritingError: for whatever the disk refuses.
        Interrupted: if the user stopped the run when all was written.
    """
    check_output(directory, overwrite)
    place = place_of(directory)
    partial, is_written = hidden_beside(place, "partial"), False
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        old = take_place(partial, place)
        is_written = True
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_written and isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"Interrupted, when '{directory}' was written already.") from None
        cause = _of_the_disk(error)
        if cause is None:
            raise
        raise WritingError(
            f"'{directory}' could not be written: {refusal(cause)}. What was there is unchanged; "
            "free some space or name another directory, and run again."
        ) from cause


@contextmanager
def writing(place: Path, advice: str) -> Iterator[None]:
    """Turn whatever the disk refuses into a WritingError of a sentence, and then the `advice`: what
    is kept, and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = _of_the_disk(error)
        if cause is None:
            raise
        raise WritingError(f"'{place}' could not be written: {refusal(cause)}. {advice}") from cause


def _of_the_disk(error: BaseException) -> BaseException | None:
    """What the disk refused, or None. A part of a whole may have said so itself, of a file that is
    gone with the whole: what is said of the whole is of more use."""
    cause = error.__cause__ if isinstance(error, WritingError) else error
    is_own = isinstance(cause, AdaptPrunerError)
    return cause if isinstance(cause, (OSError, SafetensorError)) and not is_own else None


def refusal(error: BaseException) -> str:
    """What the disk said when it refused to write; safetensors tells of a full one in words."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in str(error):
        return "the disk is full"
    return getattr(error, "strerror", None) or str(error)


MAX_TEXT_BYTES, MAX_JSON_BYTES = 1 << 20, 1 << 28
"""Of a file that people write, and of one that programs write."""


def read_bytes(file: Path, what: str, kind: type[AdaptPrunerError], most: int) -> bytes:
    """Read a file that is to be held in memory.

    Raises:
        kind: naming it as `what`, if it is no ordinary file of at most `most` bytes.
    """
    try:
        if file.exists() and not file.is_file() and not file.is_dir():
            raise kind(f"{what.capitalize()} '{file}' is a pipe or a device; name a file.")
        with file.open("rb") as stream:
            content = stream.read(most + 1)
    except FileNotFoundError:
        raise kind(f"There is no {what} file '{shown(file)}'; name one that exists.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, AdaptPrunerError):
            raise
        reason = getattr(error, "strerror", None) or "it is no path"
        raise kind(f"{what.capitalize()} '{shown(file)}' cannot be read: {reason}.") from error
    if len(content) > most:
        raise kind(f"{what.capitalize()} '{file}' has more than {in_bytes(most)}; it is none.")
    return content


def read_yaml(file: Path, what: str, kind: type[AdaptPrunerError]) -> Any:
    """Read a YAML file that users write.

    Raises:
        kind: naming it as `what`, and what is wrong with it.
    """
    content = read_bytes(file, what, kind, MAX_TEXT_BYTES)
    try:
        return parse_yaml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise kind(f"{what.capitalize()} '{file}' is not a text file in UTF-8.") from error
    except ParsingError as error:
        raise kind(f"{what.capitalize()} '{file}' is {error}.") from error


def read_json(file: Path, kind: type[AdaptPrunerError] = LoadingError) -> Any:
    """Read a JSON file.

    Raises:
        kind: naming the file, and what is wrong with it.
    """
    content = read_bytes(file, "file", kind, MAX_JSON_BYTES)
    try:
        return parse_json(content)
    except ParsingError as error:
        raise kind(f"'{file}' cannot be read: it is {error}.") from error


OWN_RESULT = re.compile(rb'\{\s*"format": 1,\s*"(models|model|device|machine)":')
"""How the files of `evaluate`, `bench`, `inspect` and `compare` begin, and tables of times."""


def check_file(file: Path) -> None:
    """Raise WritingError now if results could not be written to `file` later. Only results are
    replaced, no other file."""
    place = check_place_of_file(file)
    if place.exists() and place.stat().st_size:
        with place.open("rb") as stream:
            if not OWN_RESULT.match(stream.read(100)):
                raise WritingError(f"'{file}' exists and holds no results; name another file.")


def check_place_of_file(file: Path, needed_bytes: int = 0) -> Path:
    """The absolute path of a file to write. Raises WritingError now if it could not be written
    later, whatever is there."""
    place = place_of(file)
    if place.is_dir():
        raise WritingError(f"'{file}' is a directory; name a file.")
    if place.exists() and not place.is_file():
        raise WritingError(f"'{file}' is a pipe or a device; name an ordinary file.")
    parent = _existing_parent(place)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise WritingError(f"'{file}' cannot be written to; name a file elsewhere.")
    free = shutil.disk_usage(parent).free
    if needed_bytes > free:
        raise WritingError(
            f"'{file}' needs {in_bytes(needed_bytes)}, but only {in_bytes(free)} are free at "
            f"'{parent}'. Free some space, or name a file on another disk."
        )
    return place


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yield a hidden file beside `file` that is flushed to the disk and takes its place when the
    block succeeds. If the block fails, or the process is killed, what was there is still there.

    Raises:
        WritingError: for whatever the disk refuses.
    """
    place = place_of(file)
    partial = hidden_beside(place, "partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        replace_file(partial, place)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, AdaptPrunerError) or not isinstance(error, OSError):
            raise
        raise WritingError(
            f"'{file}' could not be written: {refusal(error)}. What was there is unchanged; free "
            "some space or name another file, and run again."
        ) from error


def beginning(file: Path, size: int = 2_000) -> str:
    """The first characters of a file, whatever it holds."""
    with file.open("rb") as stream:
        return stream.read(size).decode("utf-8", "ignore")
