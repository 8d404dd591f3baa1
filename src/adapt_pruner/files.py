"""Single files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .errors import AdaptPrunerError, WritingError


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


def check_file(file: Path) -> None:
    """Raise WritingError now if `file` could not be written later."""
    if file.is_dir():
        raise WritingError(f"'{file}' is a directory; name a file.")
    parent = next(parent for parent in file.expanduser().resolve().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise WritingError(f"'{file}' cannot be written to; name a file elsewhere.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
