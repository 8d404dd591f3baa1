"""Check a checkpoint's files before a library reads them, and afterwards what it made of them.

transformers builds whatever a configuration asks for, loads files from wherever an index leads, and
passes over weights that have no place in the model. Each of these is an error here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from ..errors import LoadingError, UnsupportedModel, shortened, shown
from ..files import read_json

INDEX_FILE = "model.safetensors.index.json"

LARGEST = {
    "num_hidden_layers": 2_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "head_dim": 100_000,
    "vocab_size": 100_000_000,
    "max_position_embeddings": 10_000_000_000,
    "sliding_window": 10_000_000_000,
}
"""What a configuration may say: some ten times what the largest models have."""

_WITHOUT_PLACE = (
    r"rotary_emb\.inv_freq$",  # computed from the configuration; old checkpoints hold it
    r"attention\.(masked_)?bias$|attn\.(masked_)?bias$",  # causal masks of old GPT-NeoX checkpoints
)
"""Tensors that some checkpoints hold and no model needs."""


def read_config(directory: Path) -> None:
    """Check that config.json and the index of the weights can be read safely.

    Raises:
        LoadingError: if not.
    """
    config = directory / "config.json"
    if config.is_file():
        content = read_json(config)
        if not isinstance(content, dict):
            raise LoadingError(f"'{config}' must hold a JSON object; got {shown(content)}.")
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            read_json(directory / name)
    if (directory / INDEX_FILE).is_file():
        weight_files(directory)


def weight_files(directory: Path) -> list[Path]:
    """The files that the index of a sharded checkpoint names; all of them lie beside it.

    Raises:
        LoadingError: if one would not.
    """
    index = read_json(directory / INDEX_FILE)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise LoadingError(f"'{directory / INDEX_FILE}' has no weight_map; restore it.")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or not name.strip("."):
            raise LoadingError(
                f"'{directory / INDEX_FILE}' names the file {shown(name)}; weights must lie beside "
                "it. Do not use this checkpoint unless you know where it comes from."
            )
    return [directory / name for name in sorted(set(names.values()))]


def check_sizes(name: str, raw: dict[str, Any]) -> None:
    """Check that the sizes in a configuration are numbers that a model can have.

    Raises:
        LoadingError: naming the first that is not.
    """
    of_layers = raw.get("per_layer_config")
    if of_layers is not None and not (
        isinstance(of_layers, dict) and all(isinstance(one, dict) for one in of_layers.values())
    ):
        raise LoadingError(
            f"The configuration of '{name}' cannot be read: per_layer_config must map layers to "
            f"what each has of its own; got {shown(of_layers)}. Restore config.json."
        )
    parts = [raw, raw.get("text_config"), *(of_layers or {}).values()]
    for part in parts:
        for key, most in LARGEST.items():
            value = part.get(key) if isinstance(part, dict) else None
            for one in value if isinstance(value, list) else [value]:
                if one is not None and not (type(one) is int and 1 <= one <= most):
                    raise LoadingError(
                        f"The configuration of '{name}' cannot be read: {key} must be a whole "
                        f"number from 1 to {most:,}; got {shown(one)}. Restore config.json."
                    )


def check_class(config: Any) -> None:
    """Check that the weights were written by the class that would read them.

    Raises:
        UnsupportedModel: if config.json names another one.
    """
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    stored = getattr(config, "architectures", None)
    if not expected or not stored or getattr(config, "auto_map", None):
        return
    known = [expected, MODEL_MAPPING_NAMES.get(config.model_type)]
    names = {str(one).lower() for entry in known for one in _listed(entry)}
    if not isinstance(stored, list) or str(stored[0]).lower() not in names:
        what = stored[0] if isinstance(stored, list) else stored
        raise UnsupportedModel(
            f"config.json says architectures {shown(what)}, but a model of type "
            f"'{config.model_type}' is {' or '.join(_listed(expected))}: they do not belong "
            "together. Correct config.json."
        )


def _listed(entry: Any) -> list[str]:
    if entry is None:
        return []
    return [entry] if isinstance(entry, str) else list(entry)


def check_weights(name: str, report: dict[str, Any], config: Any) -> None:
    """Check that every tensor of a checkpoint has found its place, and every place its tensor.

    Args:
        report: what `from_pretrained(..., output_loading_info=True)` returns.

    Raises:
        LoadingError: naming the first that has not.
    """
    if report["missing_keys"]:
        raise LoadingError(
            f"The weights of '{name}' lack {sorted(report['missing_keys'])[0]}: they are "
            "incomplete, or do not belong to the config.json beside them."
        )
    tied = getattr(config, "tie_word_embeddings", False)
    passed = [*_WITHOUT_PLACE, *([r"^lm_head\.weight$|^embed_out\.weight$"] if tied else [])]
    without = [
        key
        for key in report["unexpected_keys"]
        if not any(re.search(pattern, key) for pattern in passed)
    ]
    if without:
        more = f" and {len(without) - 1:,} more" if len(without) > 1 else ""
        raise LoadingError(
            f"The weights of '{name}' hold {shortened(sorted(without)[0])}{more}, for "
            "which config.json has no place: with fewer layers or other parts it is another "
            "model's. Restore config.json."
        )
