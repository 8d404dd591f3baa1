"""What transformers 4 and the tools built on it look for in a checkpoint.

transformers 5 moved RoPE's base and scaling into `rope_parameters` and gave tokenizers a class that
version 4 does not know. A version 4 that does not find the old keys takes the default RoPE base and
says nothing: the model is then silently wrong. So the old keys stand beside the new ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

UNKNOWN_TOKENIZER, KNOWN_TOKENIZER = "TokenizersBackend", "PreTrainedTokenizerFast"
"""transformers 5's name for a tokenizer that is all in tokenizer.json, and the name before it."""


def add_old_keys(directory: Path) -> None:
    """Add the keys of transformers 4 to config.json, beside those of 5."""
    file = directory / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    _write(file, {**old_rope_keys(config), **_old_dtype(config), **config})


def _old_dtype(config: dict[str, Any]) -> dict[str, Any]:
    return {"torch_dtype": config["dtype"]} if config.get("dtype") else {}


def old_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE in the keys of transformers 4.

    >>> old_rope_keys({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    {'rope_theta': 500000.0, 'rope_scaling': None}
    """
    rope = config.get("rope_parameters") or {}
    of_full = rope.get("full_attention", rope)
    if not of_full:
        return {}
    base, share = of_full.get("rope_theta"), of_full.get("partial_rotary_factor")
    own = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in of_full.items() if key not in own}
    keys = {
        "rope_theta": base,
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
    }
    if share is not None:
        keys["partial_rotary_factor"] = share
    if config.get("model_type") == "gpt_neox":
        keys |= {"rotary_emb_base": base, "rotary_pct": share if share is not None else 0.25}
    if local := rope.get("sliding_attention"):
        keys["rope_local_base_freq"] = local.get("rope_theta")
    return keys


def tidy_tokenizer(directory: Path, source: str | None) -> None:
    """Make tokenizer_config.json readable for transformers 4, and free of code that is not here.

    Args:
        source: name or directory that the tokenizer was loaded from, whose class it keeps.
    """
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == UNKNOWN_TOKENIZER:
        stored = _source_class(source)
        config["tokenizer_class"] = (
            KNOWN_TOKENIZER if stored in (None, UNKNOWN_TOKENIZER) else stored
        )
    if isinstance(config.get("extra_special_tokens"), list):  # version 4 expects a mapping there
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if "auto_map" in config and not _all_here(config["auto_map"], directory):
        del config["auto_map"]
    _write(file, config)


def _source_class(source: str | None) -> str | None:
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if not source:
        return None
    try:
        return get_tokenizer_config(source, local_files_only=True).get("tokenizer_class")
    except (OSError, ValueError):  # the source has gone
        return None


def _all_here(auto_map: Any, directory: Path) -> bool:
    """Whether the code that `auto_map` names lies in `directory`."""
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    named = [
        name for value in values for name in (value if isinstance(value, list) else [value]) if name
    ]
    return all((directory / f"{str(name).split('.')[0]}.py").is_file() for name in named)


def _write(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
