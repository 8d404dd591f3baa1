"""What identifies data and tokenizers, so that tokenised text is used again only where it fits."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from typing import Any

from .mixture import Source
from .reading import EMBEDDED, files_in


def of_source(source: Source) -> Any:
    """Path, size and time of change of local files; name and revision of data on the hub."""
    if source.path == EMBEDDED:
        return [EMBEDDED, platform.python_version()]
    place = source.place
    if place is None:
        return [source.path, source.subset, source.split or "train", source.revision]
    return [
        [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
        for file in files_in(place)
    ]


def of_texts(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def of_tokenizer(tokenizer: Any) -> str:
    """Whatever changes its tokens."""
    if tokenizer.is_fast:
        model = tokenizer.backend_tokenizer.to_str()
    else:
        model = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    return of_texts([model, json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)])
