"""Where things are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """$ADAPT_PRUNER_CACHE, or adapt-pruner in the user's cache directory."""
    given = os.environ.get("ADAPT_PRUNER_CACHE")
    if given:
        return Path(given).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "adapt-pruner"
