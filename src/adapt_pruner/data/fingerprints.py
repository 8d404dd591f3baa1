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
    """Whatever changes its tokens."""
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        model = {key: model[key] for key in model if key not in ("truncation", "padding")}
    else:
        model = [type(tokenizer).__name__, tokenizer.get_vocab()]
    return of_texts(
        [json.dumps([model, tokenizer.special_tokens_map], default=str, sort_keys=True)]
    )
