"""Whose directory an output is, and who is at work in it.

A run writes `.adapt-pruner.json` into its directory: the files that it wrote, each with its size
and a checksum. Only a directory that holds nothing else, and nothing that was changed since, may be
replaced: it costs computing time to make it again, and no human work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .durable import is_half_written, recover
from .errors import AdaptPrunerError, WritingError
from .files import place_of, refusal, write_json

RECORD_FILE = ".adapt-pruner.json"
REDRAWN = ("report.html", "pictures")
"""What other commands write again later; a checksum says nothing about them."""
_SAMPLE = 1 << 16


def write_record(directory: Path) -> None:
    """Write down what is in a directory that a run has just made."""
    write_json(directory / RECORD_FILE, {"format": 1, "files": _files_of(directory)})


def foreign_files(directory: Path, also_ours: Collection[str] = ()) -> list[str]:
    """The files in `directory` that no run wrote, or that were changed since.

    Args:
        also_ours: names in `directory` itself that are a run's although no record lists them.
    """
    known = _recorded(directory)
    ours = {*also_ours, *(REDRAWN if known else ()), RECORD_FILE}
    foreign = []
    for name, found in _files_of(directory).items():
        if Path(name).parts[0] not in ours and known.get(name) != found:
            foreign.append(name)
    return foreign


def _recorded(directory: Path) -> dict[str, object]:
    try:
        record = json.loads((directory / RECORD_FILE).read_text(encoding="utf-8"))
        return dict(record["files"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _files_of(directory: Path) -> dict[str, list[object]]:
    """Path below `directory` -> size and checksum of beginning and end. Weights of many gigabytes
    need no more: training changes all of them."""
    found = {}
    for parent, directories, files in os.walk(directory):
        links = [name for name in directories if Path(parent, name).is_symlink()]
        for name in [*files, *links]:
            path = Path(parent, name)
            if is_half_written(path):
                continue  # of a process that was killed, or that is at work
            found[path.relative_to(directory).as_posix()] = _print_of(path)
    return dict(sorted(found.items()))


def _print_of(path: Path) -> list[object]:
    if path.is_symlink() or not path.is_file():
        return [0, "not a file"]
    size = path.stat().st_size
    with path.open("rb") as stream:
        checksum = hashlib.blake2b(stream.read(_SAMPLE), digest_size=8)
        stream.seek(max(0, size - _SAMPLE))
        checksum.update(stream.read(_SAMPLE))
    return [size, checksum.hexdigest()]


def check_replaceable(
    directory: Path, sources: Iterable[str | Path | None] = (), also_ours: Collection[str] = ()
) -> None:
    """Raise WritingError unless `directory` is absent, empty, or what a run wrote, and a run that
    reads `sources` may replace it."""
    place = place_of(directory)
    if not place.is_dir() or not any(place.iterdir()):
        return
    for source in sources:
        if source is not None and is_inside(source, place):
            raise WritingError(
                f"'{source}' is read by this run and lies in '{directory}', which it would "
                "replace. Name another directory to write."
            )
    foreign = foreign_files(place, also_ours)
    if foreign:
        more = f" and {len(foreign) - 3:,} more" if len(foreign) > 3 else ""
        raise WritingError(
            f"'{directory}' holds files that no run wrote, or that were changed since: "
            f"{', '.join(foreign[:3])}{more}. They are not replaced; move them, or name another "
            "directory."
        )


def is_inside(source: str | Path, place: Path) -> bool:
    """Whether a source is a local one, and `place` itself or below it."""
    try:
        path = Path(source).expanduser()
        if not path.exists():
            return False
        real, place = path.resolve(), place.resolve()
        return real == place or place in real.parents
    except (OSError, RuntimeError, ValueError):
        return False


@contextmanager
def claimed(directory: Path) -> Iterator[Path]:
    """Hold a directory to write, which need not be there yet, against all other processes, and put
    in order what a killed one left. Yields its absolute path.

    Raises:
        WritingError: if another run is at work there.
    """
    place = place_of(directory)
    made = [parent for parent in place.parents if not parent.exists()]
    lock, is_held = FileLock(place.with_name(f".{place.name}.lock")), False
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        is_held = _acquire(lock, directory)
        if is_held:
            recover(place)
        yield place
    except OSError as error:
        if isinstance(error, AdaptPrunerError) or is_held:
            raise
        raise WritingError(f"'{directory}' cannot be written to: {refusal(error)}.") from error
    finally:
        if is_held:
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink()  # while it is held, as filelock looks for that
            lock.release()
        for parent in made:  # nearest first; those that hold something now stay
            with contextlib.suppress(OSError):
                parent.rmdir()


def _acquire(lock: FileLock, directory: Path) -> bool:
    """Returns whether the file system knows locks; without them, two runs are not told apart."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise WritingError(
            f"Another run is at work in '{directory}'. Wait for it, or name another directory."
        ) from None
    except NotImplementedError:
        return False
    return True
