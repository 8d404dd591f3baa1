"""A sublayer that is not there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer


class EmptyCacheLayer(DynamicLayer):
    """Counts tokens, and stores nothing of them. The first layer of a cache is asked for that
    number, whether or not it attends."""

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] if self.keys is not None else 0


class Skipped(nn.Module):
    """Stands where a layer's attention or MLP was. It has no parameters, adds nothing to the
    residual stream, and puts nothing but the number of tokens into the KV cache."""

    def __init__(self, layer_idx: int | None = None):
        """`layer_idx` is that of an attention module; None stands for an MLP."""
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        *args,
        past_key_values: Cache | None = None,
        layer_past: Cache | None = None,
        **kwargs,
    ):
        nothing = torch.zeros_like(hidden_states)
        if self.layer_idx is None:
            return nothing
        cache = past_key_values if past_key_values is not None else layer_past
        if cache is not None:
            empty = hidden_states.new_empty(len(hidden_states), 0, hidden_states.shape[1], 0)
            cache.update(empty, empty, self.layer_idx)
            layer: Any = cache.layers[self.layer_idx]
            if type(layer) is DynamicLayer:
                layer.__class__ = EmptyCacheLayer
        return nothing, None


def skip_sublayers(layer: nn.Module, names, attention: str, sublayers) -> None:
    """Replace the modules `names` of a decoder layer, and the norms that serve them alone.

    Args:
        attention: name of the attention module.
        sublayers: module that can be skipped -> names of its norms.
    """
    for name in names:
        layer_idx = getattr(layer, name).layer_idx if name == attention else None
        setattr(layer, name, Skipped(layer_idx))
        for norm in sublayers[name]:
            setattr(layer, norm, nn.Identity())


def add_biases(layer: nn.Module, names) -> None:
    """Give the linears `names` of a decoder layer a bias of zeros, where they have none."""
    for name in names:
        linear: Any = layer.get_submodule(name)
        if linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
            vars(layer)["added_biases"] = (*vars(layer).get("added_biases", ()), name)


def alter_layer(layer: nn.Module, config: Any, attention: str, sublayers) -> None:
    """Leave out and add what the layer's own `config` says. Mutates `layer`."""
    add_biases(layer, getattr(config, "added_biases", None) or ())
    skip_sublayers(layer, getattr(config, "skip", None) or (), attention, sublayers)
