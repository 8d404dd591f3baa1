"""How text is split before byte-level BPE: llama.cpp's names for it, and tokenizers' forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REST_WITH_SLASH = REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str) -> str:
    """Words of one case after another: SomeWords are two."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}"


@dataclass(frozen=True)
class PreTokenizer:
    """One way to split text that llama.cpp knows."""

    name: str
    """Value of `tokenizer.ggml.pre`."""
    pattern: str | None = None
    """Regular expression that finds the pieces; None: GPT-2's, which ByteLevel has built in."""
    digits: bool = False
    """Whether every digit is first split off."""
    ignore_merges: bool = False
    """Whether a piece that is a token is taken whole, whatever the merges say."""

    def steps(self) -> list[dict[str, Any]]:
        """The steps of tokenizers that do the same."""
        steps: list[dict[str, Any]] = []
        if self.digits:
            steps.append({"type": "Digits", "individual_digits": True})
        if self.pattern is not None:
            split = {"pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
            steps.append({"type": "Split", **split})
        byte_level = {"add_prefix_space": False, "trim_offsets": True}
        return [*steps, {"type": "ByteLevel", **byte_level, "use_regex": self.pattern is None}]


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2"),
    PreTokenizer("smollm", digits=True),
    PreTokenizer(
        "llama-bpe", rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}",
        ignore_merges=True,
    ),
    PreTokenizer("qwen2", rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"),
    PreTokenizer(
        "dbrx", rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
    ),
    PreTokenizer("tekken", rf"{_cased('')}|\p{{N}}|{REST_WITH_SLASH}", ignore_merges=True),
    PreTokenizer("gpt-4o", rf"{_cased(CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{REST_WITH_SLASH}"),
)  # fmt: skip

SAME_AS = {
    **dict.fromkeys(("default", "mpt", "olmo", "jais", "trillion"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral"), "llama-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez", "stablelm2"), "qwen2"),
    "smaug-bpe": "dbrx",
    "llama4": "gpt-4o",
}
"""Other names of llama.cpp for the same way to split."""


def recognise(pre_tokenizer: dict[str, Any] | None, ignore_merges: bool) -> PreTokenizer | None:
    """The way to split that a `tokenizer.json` describes; None where llama.cpp has no such."""
    steps = _flat(pre_tokenizer)
    for known in PRE_TOKENIZERS:
        if known.ignore_merges == ignore_merges and _shape(steps) == _shape(known.steps()):
            return known
    return None


def named(name: str) -> PreTokenizer | None:
    """The way to split that llama.cpp calls `name`."""
    name = SAME_AS.get(name, name)
    return next((known for known in PRE_TOKENIZERS if known.name == name), None)


def _flat(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _flat(part)]
    return [pre_tokenizer]


def _shape(steps: list[dict[str, Any]]) -> list[Any]:
    """The steps without what does not change the pieces."""
    unimportant = ("trim_offsets", "invert")
    shapes = [{k: v for k, v in step.items() if k not in unimportant} for step in steps]
    for shape in shapes:  # possessive and plain quantifiers find the same pieces here
        if shape["type"] == "Split" and "Regex" in shape["pattern"]:
            shape["pattern"] = shape["pattern"]["Regex"].replace("?+", "?").replace("++", "+")
    return shapes
