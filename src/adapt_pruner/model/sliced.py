"""The form of a model that SliceGPT (arXiv:2401.15024) has cut: each stretch of the residual stream
has a basis of its own, and shortcut matrices lead the stream from one to the next.

    hidden -> norm without weight -> attention -> + hidden @ attn_shortcut_Q
           -> norm without weight -> MLP       -> + ...    @ mlp_shortcut_Q

`config.sliced_hidden_size` says how many dimensions are left of `config.hidden_size`. Embeddings
and layers have those; what the last layer writes, the final norm and the head have all. Norms
divide by the root mean square over the original number of dimensions.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


class UnweightedNorm(nn.Module):
    """RMS norm without weight, whose mean is over `width` dimensions: those that were cut are 0."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.width, self.variance_epsilon = width, eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        mean = wide.square().sum(dim=-1, keepdim=True) / self.width
        return (wide * torch.rsqrt(mean + self.variance_epsilon)).to(hidden_states.dtype)


class SlicedLayer(nn.Module):
    """A decoder layer whose residual stream passes through shortcut matrices."""

    attn_shortcut_Q: Any
    mlp_shortcut_Q: Any
    parts: tuple[str, str, str, str]
    """Names of the attention's norm, the attention, the MLP's norm, the MLP."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        norm, attention, mlp_norm, mlp = (getattr(self, name) for name in self.parts)
        scale = getattr(self, "residual_multiplier", 1.0)  # Granite's
        update, _ = attention(hidden_states=norm(hidden_states), **kwargs)
        hidden_states = hidden_states @ self.attn_shortcut_Q + update * scale
        update = mlp(mlp_norm(hidden_states))
        return hidden_states @ self.mlp_shortcut_Q + update * scale

    def carry(self, hidden_states: Tensor) -> Tensor:
        """What the layer would put out if its attention and MLP added nothing."""
        return hidden_states @ self.attn_shortcut_Q @ self.mlp_shortcut_Q


@functools.cache
def _sliced_class(layer_class: type, parts: tuple[str, str, str, str]) -> type:
    """A subclass of the same name: splitting over devices, and FSDP, go by it."""
    return type(layer_class.__name__, (SlicedLayer, layer_class), {"parts": parts})


def slice_layer(layer: Any, config: Any, is_last: bool, architecture: Any) -> None:
    """Give a decoder layer, of either width, the parts of a sliced one. Mutates it; shortcuts
    are the first rows or columns of the identity."""
    norms = architecture.reading_norms
    parts = norms[0], architecture.attention, norms[1], architecture.mlp
    if not isinstance(layer, SlicedLayer):
        layer.__class__ = _sliced_class(type(layer), parts)
    whole, width = config.hidden_size, config.sliced_hidden_size
    for name in norms:
        setattr(layer, name, UnweightedNorm(whole, getattr(layer, name).variance_epsilon))
    out: Any = layer.get_submodule(architecture.mlp_output)
    options = {"dtype": out.weight.dtype, "device": out.weight.device}
    after = whole if is_last else width
    if out.out_features != after:
        has_bias = out.bias is not None
        wider = nn.Linear(out.in_features, after, bias=has_bias, **options)
        layer.set_submodule(architecture.mlp_output, wider)
    layer.attn_shortcut_Q = nn.Parameter(torch.eye(width, width, **options))
    layer.mlp_shortcut_Q = nn.Parameter(torch.eye(width, after, **options))


def slice_trunk(trunk: Any, config: Any) -> None:
    """Give the model around the layers the embeddings and the final norm of a sliced one, unless
    it has them. Mutates it."""
    old = trunk.embed_tokens
    if old.embedding_dim != config.sliced_hidden_size:
        options = {"dtype": old.weight.dtype, "device": old.weight.device}
        size = old.num_embeddings, config.sliced_hidden_size
        trunk.embed_tokens = nn.Embedding(*size, old.padding_idx, **options)
    trunk.norm = UnweightedNorm(config.hidden_size, trunk.norm.variance_epsilon)
