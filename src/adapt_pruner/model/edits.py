"""Cut units out of a model. Everything here changes the model in place.

The weights are cut where the anatomy says; the rest (head counts, features of a linear, the layer's
own configuration) is taken from a fresh layer built on the meta device from the new configuration.
So the model in memory is what a checkpoint of it loads as.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import WIDTH_NAMES, Anatomy, Group, find_anatomy, heads_fit
from .layers import LayerConfig

GroupKey = tuple[int, str]


def cut(model: nn.Module, anatomy: Anatomy, keep: dict[GroupKey, Tensor]) -> Anatomy:
    """Remove the units whose entry in `keep` ((U,) bool per group) is False. Mutates `model`.

    Parameters keep their identity, so an optimizer still knows them; gradients are dropped.
    Returns the anatomy of the model as it is now.
    """
    for group in anatomy.groups:
        if group.key in keep:
            cut_group(group, keep[group.key])
    after = find_anatomy(model)
    describe_widths(model.config, after)
    for i, layer in enumerate(after.layers):
        _adopt_geometry(layer, model.config, i)
    return after


@torch.no_grad()
def cut_group(group: Group, keep_U: Tensor) -> None:
    """Cut the tensors of one group. Mutates them."""
    for part in group.parts:
        kept = kept_entries(part.index_UK, keep_U)
        tensor = part.tensor
        tensor.grad = None
        tensor.data = tensor.data.index_select(part.dim, kept.to(tensor.device)).contiguous()


def kept_entries(index_UK: Tensor, keep_U: Tensor) -> Tensor:
    """Positions of the units that stay, ascending, so that fused blocks keep their order."""
    return index_UK[keep_U.to(index_UK.device)].flatten().sort().values


def describe_widths(config: Any, anatomy: Anatomy) -> None:
    """Write the widths that the layers have into `config`. Mutates it.

    Equal layers give a plain configuration that every tool reads; others `per_layer_config`.
    """
    attention = [g for g in anatomy.groups if g.kind == "attention"]
    if attention:
        group = attention[0]
        columns_per_head = group.output.index_UK.shape[1] // group.heads_per_unit
        config.head_dim = columns_per_head
    if getattr(config, "block_auto_adjust_ff_dim", False):
        config.block_auto_adjust_ff_dim = False  # LFM2: intermediate_size is now meant literally
    config.per_layer_config = None
    values = {
        name: {i: widths[name] for i, widths in enumerate(anatomy.widths) if name in widths}
        for name in WIDTH_NAMES
    }
    common = {name: set(of_layers.values()) for name, of_layers in values.items()}
    plain = {name: widths.pop() for name, widths in common.items() if len(widths) == 1}
    if not heads_fit(config.hidden_size, plain.get("num_attention_heads", 1)):
        del plain["num_attention_heads"], plain["num_key_value_heads"]
    varying: dict[int, dict[str, int]] = {}
    for name, of_layers in values.items():
        if name in plain:
            setattr(config, name, plain[name])
        else:
            for i, width in of_layers.items():
                varying.setdefault(i, {})[name] = width
    if varying:
        # Tools that know only global widths get to read one; transformers refuses otherwise.
        config.allow_global_per_layer_attribute_access = True
        config.per_layer_config = varying


def _adopt_geometry(layer: nn.Module, config: Any, layer_idx: int) -> None:
    with torch.device("meta"):
        built = type(layer)(config, layer_idx)
    for name, module in built.named_modules():
        ours = layer.get_submodule(name)
        for attribute, value in vars(module).items():
            is_size = type(value) is int and not attribute.startswith("_")
            if is_size or isinstance(value, LayerConfig) or value is config:
                setattr(ours, attribute, value)
    for name, parameter in built.named_parameters():
        actual = layer.get_parameter(name).shape
        assert actual == parameter.shape, f"{name}: cut to {actual}, expected {parameter.shape}"
