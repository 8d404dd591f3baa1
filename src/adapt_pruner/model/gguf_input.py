"""GGUF files as models: what their header says, read without trusting it, and their tokenizer."""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LoadingError, MissingExtra, shown
from .checks import LARGEST
from .pretokenizers import named

MAGIC = b"GGUF"
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
}
"""Sizes in the header -> what a configuration calls them."""
_OF_LAYER = re.compile(r"blk\.(\d{1,9})\.")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it."""

    name: str
    shape: tuple[int, ...]
    """Rows first, as in torch."""
    type: int
    """Number of its type of values in ggml."""
    offset: int
    """Where it starts, in bytes after the header."""


@dataclass(frozen=True)
class Header:
    """The metadata and the tensors of a GGUF file."""

    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    data_start: int
    """Where the tensors start, in bytes from the file's start."""

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


class _Cursor:
    """Reads values one after the other, never past the end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.place, self.size = data, 0, len(data)

    def take(self, length: int) -> int:
        start, self.place = self.place, self.place + length
        if self.place > self.size:
            raise ValueError(f"it ends at byte {self.size:,}, inside its header")
        return start

    def number(self, form: str) -> Any:
        form = f"<{form}"
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        length = self.number("Q")
        start = self.take(length)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and depth < 2:
            inner, count = self.number("I"), self.number("Q")
            if inner in _NUMBERS:
                form = f"<{count}{_NUMBERS[inner]}" if count < self.size else ""
                if not form:
                    raise ValueError(f"an array in it claims to have {count:,} values")
                start = self.take(struct.calcsize(form))
                return list(struct.unpack_from(form, self.data, start))
            if count > self.size - self.place:
                raise ValueError(f"an array in it claims to have {count:,} values")
            return [self.value(inner, depth + 1) for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError(f"it has a value of the unknown type {kind}")
        return self.number(_NUMBERS[kind])


def read_header(file: Path) -> Header:
    """Read the header of a GGUF file and check that the file holds what it promises.

    Raises:
        LoadingError: in one sentence, for a file that is none, is cut short, or lies about sizes.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(4) != MAGIC:
                raise ValueError("it does not begin with GGUF")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data))
    except (OSError, ValueError, struct.error, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise LoadingError(
            f"'{file}' is no GGUF file that can be read: {reason}. Copy or download it again."
        ) from error


def _parse(cursor: _Cursor) -> Header:
    cursor.take(4)
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}; 2 and 3 are known")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    if num_tensors > cursor.size // 24 or num_keys > cursor.size // 12:
        raise ValueError(f"it claims to have {num_tensors:,} tensors and {num_keys:,} keys")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    tensors = tuple(_tensor(cursor) for _ in range(num_tensors))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment < 2**20:
        raise ValueError(f"its alignment is {alignment}")
    start = -(-cursor.place // alignment) * alignment
    header = Header(metadata, tensors, start)
    _check_sizes(header)
    for tensor in tensors:
        if tensor.offset % alignment:
            raise ValueError(
                f"tensor '{tensor.name}' starts at {tensor.offset:,}, no multiple of {alignment:,}"
            )
        _check_tensor(tensor, start, cursor.size)
    return header


def _check_sizes(header: Header) -> None:
    """Raise ValueError for sizes that no model has, and for layers beyond those it should have."""
    for name, known_as in _SIZES.items():
        key = f"{header.architecture}.{name}"
        value, most = header.metadata.get(key), LARGEST[known_as]
        for one in value if isinstance(value, list) else [value]:
            if one is not None and not (type(one) is int and 0 <= one <= most):
                raise ValueError(f"{key} must be from 0 to {most:,}, and is {shown(one)}")
    count = header.metadata.get(f"{header.architecture}.block_count")
    for tensor in header.tensors:
        layer = _OF_LAYER.match(tensor.name)
        if count is not None and layer and int(layer[1]) >= count:
            raise ValueError(f"it should have {count:,} layers, and holds '{tensor.name}'")


def _tensor(cursor: _Cursor) -> TensorInfo:
    name, dimensions = cursor.text(), cursor.number("I")
    if dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"tensor '{name}' claims to have {dimensions:,} dimensions")
    sides = [cursor.number("Q") for _ in range(dimensions)]
    return TensorInfo(name, tuple(reversed(sides)), cursor.number("I"), cursor.number("Q"))


def _check_tensor(tensor: TensorInfo, start: int, size: int) -> None:
    gguf = import_gguf()
    if tensor.type not in {int(kind) for kind in gguf.GGMLQuantizationType}:
        raise ValueError(f"tensor '{tensor.name}' has the unknown type {tensor.type}")
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type)]
    end = start + tensor.offset + math.prod(tensor.shape) // block * block_bytes
    if end > size:
        raise ValueError(
            f"it ends at byte {size:,}, but tensor '{tensor.name}' would end at {end:,}"
        )


def import_gguf():
    """The package that knows the format. Raises MissingExtra where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise MissingExtra(
            "GGUF files need the package gguf: pip install 'adapt-pruner[gguf]'."
        ) from None
    return gguf


def mend_tokenizer(tokenizer: Any, header: Header) -> None:
    """Make a tokenizer that transformers built from a file do what the file says: split text by
    names that transformers does not know (smollm: every digit is a piece), and leave out tokens
    that the file does not have (transformers adds GPT-2's)."""
    from tokenizers import Tokenizer

    said = header.metadata
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    count = len(said.get("tokenizer.ggml.tokens", ()))
    backend["added_tokens"] = [one for one in backend["added_tokens"] if one["id"] < count]
    known = named(str(said.get("tokenizer.ggml.pre", "")))
    if said.get("tokenizer.ggml.model") == "gpt2" and known is not None:
        steps = known.steps()
        backend["pre_tokenizer"] = (
            steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
        )
        backend["model"]["ignore_merges"] = known.ignore_merges
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))


def dtype_of_file(header: Header) -> str:
    """The precision to keep the file's values in: its own, or float16 where it is quantised."""
    return {0: "float32", 32: "bfloat16"}.get(
        header.metadata.get("general.file_type", 1), "float16"
    )
