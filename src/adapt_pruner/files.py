"""Files and directories that appear whole or not at all, and what users write by hand."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import AdaptPrunerError, WritingError


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_json_atomically(file: Path, content: Any) -> None:
    """Write JSON as `write_atomically` does. Raises ValueError for NaN or infinity."""
    write_atomically(file, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_atomically(file: Path, text: str) -> None:
    """Write text beside `file` and rename it into place, making directories as needed. Any number
    of processes may do so at once: the last one wins.

    Raises:
        WritingError: for whatever the disk refuses; what was there is unchanged.
    """
    partial = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(partial).chmod(0o666 & ~_umask())  # mkstemp makes files for their owner alone
        os.replace(partial, file)
    except BaseException as error:
        if partial:
            with contextlib.suppress(OSError):
                Path(partial).unlink()
        if not isinstance(error, OSError):
            raise
        raise WritingError(
            f"'{file}' could not be written: {error.strerror}. Free some space, or name another "
            "place."
        ) from error


def check_output(directory: Path, overwrite: bool, needed_bytes: int = 0) -> None:
    """Raise WritingError now if `directory` could not be written later."""
    place = directory.expanduser().resolve()
    if place.exists() and not place.is_dir():
        raise WritingError(f"'{directory}' is a file; name a directory.")
    if place.exists() and any(place.iterdir()) and not overwrite:
        raise WritingError(
            f"'{directory}' exists and is not empty. Name another directory, or pass --overwrite."
        )
    if os.path.ismount(place):
        raise WritingError(f"'{directory}' is a mount point; name a directory inside it.")
    parent = next(parent for parent in place.parents if parent.exists())
    if not parent.is_dir():
        raise WritingError(f"'{directory}' lies below '{parent}', a file; name another directory.")
    if not os.access(parent, os.W_OK):
        raise WritingError(f"'{parent}' cannot be written to; name a directory elsewhere.")
    free = shutil.disk_usage(parent).free
    if needed_bytes > free:
        raise WritingError(
            f"The result needs about {needed_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are "
            f"free at '{parent}'. Free some space, or name a directory on another disk."
        )


@contextmanager
def atomic_directory(directory: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden directory beside `directory` that takes its place when the block succeeds.

    If the block fails, or the process is killed, what was there before is still there.

    Raises:
        WritingError: for whatever the disk refuses.
    """
    check_output(directory, overwrite)
    place = directory.expanduser().resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(place, "partial")
    try:
        partial.mkdir()
        yield partial
        _take_place(partial, place)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, AdaptPrunerError) or not isinstance(error, (OSError, SafetensorError)):
            raise
        raise WritingError(
            f"'{directory}' could not be written: {refusal(error)}. What was there is unchanged; "
            "free some space or name another directory, and run again."
        ) from error


def _beside(place: Path, what: str) -> Path:
    return place.with_name(f".{place.name}.{what}-{secrets.token_hex(4)}")


def _take_place(new: Path, place: Path) -> None:
    """Rename `new` to `place`; if that fails, what is there is put back."""
    if not place.exists():
        os.replace(new, place)
        return
    old = _beside(place, "old")
    os.replace(place, old)
    try:
        os.replace(new, place)
    except BaseException:
        os.replace(old, place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def refusal(error: BaseException) -> str:
    """What the disk said when it refused to write; safetensors tells of a full one in words."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in str(error):
        return "the disk is full"
    return str(error)


def read_yaml(file: Path, what: str, kind: type[AdaptPrunerError]) -> Any:
    """Read a YAML file that users write.

    Raises:
        kind: naming it as `what`, and what is wrong with it.
    """
    import yaml

    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise kind(f"There is no {what} file '{file}'; name one that exists.") from None
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        message = f"{what.capitalize()} '{file}' is not YAML: {error.problem}{line}."
        raise kind(message) from error
    except OSError as error:
        raise kind(f"{what.capitalize()} '{file}' cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise kind(f"{what.capitalize()} '{file}' is not a text file in UTF-8.") from error


def check_file(file: Path, needed_bytes: int = 0) -> None:
    """Raise WritingError now if `file` could not be written later."""
    if file.is_dir():
        raise WritingError(f"'{file}' is a directory; name a file.")
    parent = next(parent for parent in file.expanduser().resolve().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise WritingError(f"'{file}' cannot be written to; name a file elsewhere.")
    free = shutil.disk_usage(parent).free
    if needed_bytes > free:
        raise WritingError(
            f"'{file}' needs {needed_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free at "
            f"'{parent}'. Free some space, or name a file on another disk."
        )


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yield a hidden file beside `file` that is flushed to the disk and takes its place when the
    block succeeds. If the block fails, or the process is killed, what was there is still there.

    Raises:
        WritingError: for whatever the disk refuses.
    """
    place = file.expanduser().resolve()
    partial = _beside(place, "partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, place)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, AdaptPrunerError) or not isinstance(error, OSError):
            raise
        raise WritingError(
            f"'{file}' could not be written: {refusal(error)}. What was there is unchanged; free "
            "some space or name another file, and run again."
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
