"""What identifies data and tokenizers, so that tokenised text is used again only where it fits."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from typing import Any

from .mixture import Source
from .reading import EMBEDDED, files_in


def short_hash(content: Any) -> str:
    """16 hexadecimal digits of a JSON value."""
    return of_texts([json.dumps(content, sort_keys=True)])[:16]


def of_texts(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def of_source(source: Source) -> Any:
    """Path, size and time of change of local files; name and revision of data on the hub."""
    if source.path == EMBEDDED:
        return [EMBEDDED, platform.python_version()]
    if source.place is None:
        return [source.path, source.subset, source.split or "train", source.revision]
    files = ((file.resolve(), file.stat()) for file in files_in(source.place))
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in files]


def of_tokenizer(tokenizer: Any) -> str:
    """Whatever changes its tokens. Settings of padding and truncation do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        passing = ("padding", "truncation")
        content = {k: v for k, v in json.loads(backend.to_str()).items() if k not in passing}
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    longest = min(tokenizer.model_max_length, 2**31)
    return of_texts([json.dumps([content, special, longest], sort_keys=True)])
