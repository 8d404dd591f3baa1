"""Results on disk, found by everything that determines them."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..cache import VARIABLE as VARIABLE
from ..cache import default_cache
from ..files import write_json_atomically


@dataclass(frozen=True)
class Record:
    """A stored result and where it comes from."""

    key: dict[str, Any]
    result: dict[str, Any]
    date: str
    """When it was computed, UTC."""
    git_hash: str | None
    """Commit of the current directory's checkout at that time, "-dirty" if changed; or None."""

    @classmethod
    def now(cls, key: dict[str, Any], result: dict[str, Any]) -> Record:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(_plain(key), _plain(result), date, git_hash())


class ResultStore:
    """One JSON file per result, in one directory. Any number of processes may share it.

    A key is a JSON-compatible dict that holds everything the result depends on. It is stored in the
    file and compared when read, so a result is never taken for another's; a file that is damaged
    counts as absent. Files appear whole or not at all.
    """

    def __init__(self, directory: str | Path | None = None):
        self.directory = Path(directory).expanduser() if directory else default_directory()

    def read(self, key: dict[str, Any]) -> Record | None:
        """Return what is stored under `key`, or None."""
        key = _plain(key)
        try:
            record = Record(**json.loads(self._file(key).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        return record if record.key == key and isinstance(record.result, dict) else None

    def get(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return the result stored under `key`, or None."""
        record = self.read(key)
        return record.result if record else None

    def put(self, key: dict[str, Any], result: dict[str, Any]) -> Record:
        """Store a result, in place of an earlier one of the same key.

        Raises:
            WritingError: for whatever the disk refuses.
            ValueError: if the result holds NaN or infinity.
        """
        record = Record.now(key, result)
        write_json_atomically(self._file(record.key), asdict(record))
        return record

    def compute(
        self, key: dict[str, Any], function: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the result stored under `key`; compute and store it if there is none."""
        result = self.get(key)
        return self.put(key, function()).result if result is None else result

    def _file(self, key: dict[str, Any]) -> Path:
        return self.directory / f"{digest(key)}.json"


def default_directory() -> Path:
    """Where results are kept: named by the environment, else below the user's cache."""
    return default_cache() / "results"


def digest(value: Any) -> str:
    """Hash of a JSON-compatible value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """The value as it comes back from disk: tuples as lists, keys as strings."""
    return json.loads(json.dumps(value, allow_nan=False))


@lru_cache(maxsize=1)
def git_hash() -> str | None:
    """Commit of the checkout that the current directory is in, if it is in one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
