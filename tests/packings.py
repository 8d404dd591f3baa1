"""Mixtures of the forty documents, tokenised and packed."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import yaml

from adapt_pruner.data.packing import PackedData, prepare


@pytest.fixture
def pack(tokenizer, text_file, tmp_path) -> Callable[..., PackedData]:
    """Prepare the forty documents, or others, in a cache of the test's own."""

    def run(source: object = text_file, **options) -> PackedData:
        if isinstance(source, (dict, list)):
            file = tmp_path / "mixture.yaml"
            content = {"sources": source} if isinstance(source, list) else source
            file.write_text(yaml.safe_dump(content))
            source = file
        options = {"tokens": 800, "cache": tmp_path / "cache", "sequence_length": 16} | options
        return prepare(source, options.pop("tokenizer", tokenizer), **options)

    return run


@pytest.fixture
def jsonl(tmp_path) -> Callable[..., str]:
    """Write rows to a file, and return its name."""

    def write(*rows: dict, name: str = "rows.jsonl") -> str:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)), "utf-8")
        return str(tmp_path / name)

    return write
