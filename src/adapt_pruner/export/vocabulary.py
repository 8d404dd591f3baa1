"""The tokenizer of a model as a GGUF file holds it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import gguf

from ..errors import UnsupportedModel
from ..model.pretokenizers import recognise

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    gguf.TokenType.NORMAL,
    gguf.TokenType.UNKNOWN,
    gguf.TokenType.CONTROL,
    gguf.TokenType.USER_DEFINED,
    gguf.TokenType.UNUSED,
    gguf.TokenType.BYTE,
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and how text becomes them."""

    model: str
    """"gpt2" is byte-level BPE with merges, "llama" sentencepiece BPE with scores."""
    tokens: list[str]
    types: list[int]
    pre: str = "default"
    merges: list[str] | None = None
    scores: list[float] | None = None
    add_space_prefix: bool = False

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add all of it to a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_add_space_prefix(self.add_space_prefix)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, size: int) -> None:
    """Write a tokenizer, its special tokens and its chat template.

    Args:
        size: rows of the embedding matrix; ids beyond the tokenizer's are written as unused.

    Raises:
        UnsupportedModel: if llama.cpp has no such tokenizer.
    """
    read_vocabulary(tokenizer, size).write(writer)
    for kind, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        token = getattr(tokenizer, f"{kind}_token_id")
        if token is not None:
            add(token)
    around = tokenizer("a").input_ids
    writer.add_add_bos_token(around[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(around[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.get_chat_template())


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer of transformers. Args, Raises: as `add_tokenizer`."""
    if len(tokenizer) > size:
        raise UnsupportedModel(
            f"The tokenizer has {len(tokenizer)} tokens, the embedding matrix {size} rows; such a "
            "model cannot be exported. Resize the embeddings first."
        )
    if getattr(tokenizer, "sp_model", None) is not None:
        return _from_sentencepiece(tokenizer, size)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise _inexpressible(f"a {type(tokenizer).__name__}")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend["model"]["type"] != "BPE":
        raise _inexpressible(f"a {backend['model']['type']} tokenizer")
    if backend["model"].get("byte_fallback"):
        return _sentencepiece_bpe(backend, size)
    return _byte_level_bpe(backend, size)


def _inexpressible(what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"GGUF cannot express this model's tokenizer, {what}. It can express byte-level BPE whose "
        "way to split text llama.cpp knows, and sentencepiece BPE."
    )


def _byte_level_bpe(backend: dict[str, Any], size: int) -> Vocabulary:
    model = backend["model"]
    known = recognise(backend["pre_tokenizer"], bool(model.get("ignore_merges")))
    if known is None:
        steps = json.dumps(backend["pre_tokenizer"])
        raise _inexpressible(f"byte-level BPE that splits text in a way unknown to it: {steps}")
    normalizer = backend["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _inexpressible(f"BPE with the normalizer {normalizer['type']}")
    merges = [" ".join(merge) for merge in _merges(model)]
    if not merges:
        raise _inexpressible("BPE without merges")
    tokens, types = _tokens(backend, size)
    return Vocabulary("gpt2", tokens, types, known.name, merges)


def _sentencepiece_bpe(backend: dict[str, Any], size: int) -> Vocabulary:
    """Scores stand for the order of the merges: the earlier a token is merged, the higher."""
    tokens, types = _tokens(backend, size)
    for index, token in enumerate(tokens):
        if types[index] == NORMAL and token.startswith("<0x") and len(token) == 6:
            types[index] = BYTE
    rank: dict[str, int] = {}
    for number, pair in enumerate(_merges(backend["model"])):
        rank.setdefault("".join(pair), number)
    lowest = -float(len(rank) + 1)
    scores = [-float(rank[token]) if token in rank else lowest for token in tokens]
    unknown = backend["model"].get("unk_token")
    if unknown in backend["model"]["vocab"]:
        types[backend["model"]["vocab"][unknown]] = UNKNOWN
    text = json.dumps([backend["normalizer"], backend["pre_tokenizer"]])
    prefix = '"Prepend"' in text or '"prepend_scheme": "always"' in text
    return Vocabulary(
        "llama", tokens, types, scores=scores,
        add_space_prefix=prefix or '"prepend_scheme": "first"' in text,
    )  # fmt: skip


def _from_sentencepiece(tokenizer: Any, size: int) -> Vocabulary:
    pieces = tokenizer.sp_model
    tokens, types = _unused(size)
    scores = [-1e6] * size
    for index in range(pieces.get_piece_size()):
        tokens[index], scores[index] = pieces.id_to_piece(index), pieces.get_score(index)
        kinds = (
            (pieces.is_unknown, UNKNOWN), (pieces.is_control, CONTROL), (pieces.is_byte, BYTE),
            (pieces.is_unused, UNUSED),
        )  # fmt: skip
        types[index] = next((kind for test, kind in kinds if test(index)), NORMAL)
    special = set(tokenizer.all_special_tokens)
    for token, index in tokenizer.get_added_vocab().items():
        if types[index] != UNKNOWN:
            tokens[index], types[index] = token, CONTROL if token in special else USER_DEFINED
    return Vocabulary("llama", tokens, types, scores=scores, add_space_prefix=True)


def _tokens(backend: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    tokens, types = _unused(size)
    for token, index in backend["model"]["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in backend["added_tokens"]:
        index = added["id"]
        tokens[index] = added["content"]
        types[index] = CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _unused(size: int) -> tuple[list[str], list[int]]:
    return [f"[PAD{index}]" for index in range(size)], [int(UNUSED)] * size


def _merges(model: dict[str, Any]) -> Iterable[list[str]]:
    for merge in model["merges"]:
        yield merge.split(" ") if isinstance(merge, str) else merge
