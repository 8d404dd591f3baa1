"""Files and directories that outlive a crash of the machine, and directories that change places.

A rename is atomic for other processes, but after a loss of power a disk may hold the new name and
not yet the content. So everything is flushed to the disk before it gets its name, and the directory
that holds the name afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
from functools import cache
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_UNABLE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}
"""What kernels and file systems answer that cannot exchange two names."""
_NO_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.ENOSYS}
"""What file systems answer on which a flush means nothing."""


def flush(path: Path) -> None:
    """Make the disk hold a file's content, or a directory's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(handle)


def flush_tree(directory: Path) -> None:
    """Flush all files and directories below `directory`, and itself."""
    for parent, _, files in os.walk(directory, topdown=False):
        for name in files:
            file = Path(parent, name)
            if file.is_file() and not file.is_symlink():
                flush(file)
        flush(Path(parent))


def replace_file(new: Path, file: Path) -> None:
    """Give `new`, flushed before, the name `file`."""
    flush(new)
    os.replace(new, file)
    flush(file.parent)


def hidden_beside(place: Path, what: str) -> Path:
    """A name beside `place` that no other process takes: `.place.partial-0123abcd`."""
    return place.with_name(f".{place.name}.{what}-{secrets.token_hex(4)}")


def take_place(new: Path, place: Path) -> Path | None:
    """Give the directory `new` the name `place`. Returns where the old one is now, if there was
    one; it may be deleted.

    At every moment there is a whole directory of this name, the old one or the new one. Where two
    names cannot be exchanged at once (not on Linux, or on some file systems) there is none between
    two renames; `recover` puts the old one back if the process is killed there.
    """
    flush_tree(new)
    if not place.exists():
        os.replace(new, place)
        flush(place.parent)
        return None
    if exchange(new, place):
        flush(place.parent)
        return new
    old = hidden_beside(place, "old")
    os.replace(place, old)
    try:
        os.replace(new, place)
    except BaseException:
        os.replace(old, place)
        raise
    flush(place.parent)
    return old


def exchange(one: Path, other: Path) -> bool:
    """Let two directories change names in one step. Returns whether the system can do that."""
    rename = _renameat2()
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNABLE:
        return False
    raise OSError(number, os.strerror(number), str(other))


@cache
def _renameat2():
    """The function of the C library, which Python has no name for; None where there is none."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return None
    text, number = ctypes.c_char_p, ctypes.c_int
    function.argtypes = (number, text, number, text, ctypes.c_uint)
    function.restype = number
    return function


_HALF_WRITTEN = re.compile(r"\.(?P<of>.+)\.(old|partial)-[0-9a-f]{8}", re.DOTALL)
"""A name that `hidden_beside` gives."""


def is_half_written(path: Path) -> bool:
    """Whether a name is one that a file or directory has while it is written."""
    return _HALF_WRITTEN.fullmatch(path.name) is not None


def recover(place: Path) -> None:
    """Put in order what a killed process left at `place`: an old directory gets its name back if
    nothing has it, and what was half-written goes. Nobody else may be at work there."""
    left = [entry for entry in _entries(place.parent) if _is_of(entry, place)]
    old = [entry for entry in left if ".old-" in entry.name]
    if old and not os.path.lexists(place):
        newest = max(old, key=lambda entry: entry.stat().st_ctime_ns)
        os.replace(newest, place)
        left.remove(newest)
    for entry in left:
        remove(entry)
    tidy(place)


def tidy(directory: Path) -> None:
    """Remove the files that a killed process left half-written in a directory and its pictures.
    Nobody else may be at work there."""
    for entry in [*_entries(directory), *_entries(directory / "pictures")]:
        if is_half_written(entry) and not entry.is_dir():
            remove(entry)


def _is_of(entry: Path, place: Path) -> bool:
    """Whether an entry is what `place` was while it was written, or was written into that."""
    name = entry.name
    while found := _HALF_WRITTEN.fullmatch(name):
        name = found["of"]
        if name == place.name:
            return True
    return False


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []


def remove(path: Path) -> None:
    """Delete a directory or a file, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
