"""What a GGUF file says of the model besides its tensors and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from ..parsing import ParsingError, parse_yaml
from .layout import Layout
from .rope import rope_keys

EPSILONS = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_epsilon", "norm_eps"),
}


def add_hyperparameters(writer: gguf.GGUFWriter, config: Any, layout: Layout) -> list[str]:
    """Write sizes, widths of the layers, epsilons and RoPE. Returns what the user should know."""
    arch, notes = layout.architecture.name, []
    context: int = config.max_position_embeddings
    window: int = getattr(config, "sliding_window", None) or 0
    slides = window and getattr(config, "use_sliding_window", True)
    if slides and layout.architecture.window_every is None and window < context:
        notes.append(
            f"llama.cpp has no sliding window for '{arch}' models: the context is written as "
            f"{window} tokens, the window, instead of {context}."
        )
        context = window
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layout.layers))
    writer.add_vocab_size(config.vocab_size)
    for add, values in (
        (writer.add_head_count, [layer.heads for layer in layout.layers]),
        (writer.add_head_count_kv, [layer.kv_heads for layer in layout.layers]),
        (writer.add_feed_forward_length, [layer.neurons for layer in layout.layers]),
    ):
        add(values if layout.is_per_layer else values[0])
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    for key, names in EPSILONS.items():
        found = [getattr(config, name) for name in names if getattr(config, name, None) is not None]
        if found:
            writer.add_float32(f"{arch}.{key}", float(found[0]))
    further = {
        key: getattr(config, name)
        for key, name in layout.own.keys.items()
        if getattr(config, name, None) is not None
    }
    for key, value in {**rope_keys(config, layout.head_dim), **further}.items():
        _add(writer, f"{arch}.{key}", value)
    return notes


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def add_general(writer: gguf.GGUFWriter, num_parameters: int, card: Mapping[str, Any]) -> None:
    """Write the model's name, size, licence, languages and tags."""
    writer.add_type("model")
    writer.add_name(str(card["name"]))
    writer.add_size_label(gguf.size_label(num_parameters, 0, 0, 0))
    licence = card.get("license") or card.get("licence")
    if isinstance(licence, str):
        writer.add_license(licence)
    for key, add in (("language", writer.add_languages), ("tags", writer.add_tags)):
        said = card.get(key)
        values = [said] if isinstance(said, str) else said or []
        if values and all(isinstance(value, str) for value in values):
            add(values)


def read_card(directory: Path) -> dict[str, Any]:
    """The facts at the head of a model card; empty where there is none that can be read."""
    file = directory / "README.md"
    try:
        parts = file.read_text(encoding="utf-8").split("---\n")
        head = parse_yaml(parts[1]) if len(parts) > 2 and not parts[0].strip() else None
    except (OSError, UnicodeDecodeError, ParsingError):
        return {}
    return head if isinstance(head, dict) else {}
