"""Where things are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "ADAPT_PRUNER_CACHE"
"""Environment variable that names another directory than the user's cache."""


def default_cache() -> Path:
    """$ADAPT_PRUNER_CACHE, or adapt-pruner in the user's cache directory."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "adapt-pruner"
