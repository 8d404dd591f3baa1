"""Write into a configuration what its layers are. Everything here mutates the configuration."""

from __future__ import annotations

from typing import Any

from torch import nn

from .anatomy import Anatomy
from .axes import KV_GROUPS, QUERY_HEADS, WIDTH_NAMES, heads_fit
from .skipped import Skipped


def describe_model(config: Any, anatomy: Anatomy) -> None:
    """Write widths, skipped sublayers and added biases into `config`.

    Equal layers give a plain configuration that every tool reads; others `per_layer_config`.
    """
    _fix_sizes(config, anatomy)
    config.per_layer_config = None
    values = {
        name: {i: widths[name] for i, widths in enumerate(anatomy.widths) if widths.get(name)}
        for name in WIDTH_NAMES
    }
    common = {name: set(of_layers.values()) for name, of_layers in values.items()}
    plain = {name: widths.pop() for name, widths in common.items() if len(widths) == 1}
    if not heads_fit(config.hidden_size, plain.get("num_attention_heads", 1)):
        plain = {name: width for name, width in plain.items() if name == "intermediate_size"}
    if "num_attention_heads" not in plain and anatomy.architecture.has_free_heads:
        _make_global_heads_fit(config, plain)
    varying: dict[int, dict[str, Any]] = {}
    for name, of_layers in values.items():
        if name in plain:
            setattr(config, name, plain[name])
        else:
            for i, width in of_layers.items():
                varying.setdefault(i, {})[name] = width
    for i, layer in enumerate(anatomy.layers):
        for name, value in _alterations(config, anatomy, layer).items():
            varying.setdefault(i, {})[name] = value
    if varying:
        # Tools that know only global widths get to read one; transformers refuses otherwise.
        config.allow_global_per_layer_attribute_access = True
        config.per_layer_config = varying


def _fix_sizes(config: Any, anatomy: Anatomy) -> None:
    """Write down the sizes that a configuration would otherwise derive from others."""
    for axis in anatomy.of_kinds({QUERY_HEADS, KV_GROUPS}):
        heads = anatomy.widths[axis.layer]["num_attention_heads"]
        assert axis.output is not None
        config.head_dim = axis.output.index_UK.numel() // heads
        break
    if getattr(config, "block_auto_adjust_ff_dim", False):
        config.block_auto_adjust_ff_dim = False  # LFM2: intermediate_size is now meant literally


def _make_global_heads_fit(config: Any, plain: dict[str, int]) -> None:
    """Head counts are said per layer; the global ones must be some that the class accepts. Where
    they are not, KV heads are said per layer too, even if all layers have equally many."""
    if not heads_fit(config.hidden_size, config.num_attention_heads):
        plain.pop("num_key_value_heads", None)
        config.num_attention_heads = config.num_key_value_heads = 1


def _alterations(config: Any, anatomy: Anatomy, layer: nn.Module) -> dict[str, Any]:
    """What the layer leaves out, and which biases it has beyond its architecture's."""
    names = (anatomy.architecture.attention, anatomy.architecture.mlp)
    skipped = [name for name in names if isinstance(getattr(layer, name, None), Skipped)]
    found: dict[str, Any] = {"skip": skipped} if skipped else {}
    if added := getattr(layer, "added_biases", None):
        config.added_biases = []
        found["added_biases"] = list(added)
    return found


def drop_layers_of_config(config: Any, gone: set[int]) -> None:
    """Keep what a configuration lists per layer, such as `layer_types`, of those that stay."""
    count = config.num_hidden_layers
    config.per_layer_config = None
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == count:
            kept = [item for i, item in enumerate(value) if i not in gone]
            setattr(config, name, type(value)(kept))
    config.num_hidden_layers = count - len(gone)
    if hasattr(config, "full_attn_idxs"):
        config.full_attn_idxs = None  # LFM2: said by layer_types
