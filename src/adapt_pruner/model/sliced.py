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
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import Architecture
from .layers import LayerConfig


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


def slice_layer(
    layer: Any, config: Any, is_last: bool, parts: tuple[str, str, str, str], mlp_output: str
) -> None:
    """Give a decoder layer, of either width, the parts of a sliced one. Mutates it; shortcuts
    are the first rows or columns of the identity."""
    if not isinstance(layer, SlicedLayer):
        layer.__class__ = _sliced_class(type(layer), parts)
    whole, width = config.hidden_size, config.sliced_hidden_size
    for name in (parts[0], parts[2]):
        setattr(layer, name, UnweightedNorm(whole, getattr(layer, name).variance_epsilon))
    out: Any = layer.get_submodule(mlp_output)
    options = {"dtype": out.weight.dtype, "device": out.weight.device}
    after = whole if is_last else width
    if out.out_features != after:
        has_bias = out.bias is not None
        wider = nn.Linear(out.in_features, after, bias=has_bias, **options)
        layer.set_submodule(mlp_output, wider)
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


def names_of(architecture: Architecture) -> tuple[str, tuple[str, str, str, str], str]:
    """The layer's class, `SlicedLayer.parts`, and the linear that the MLP ends with."""
    norm, mlp_norm = architecture.reading_norms
    parts = norm, architecture.attention, mlp_norm, architecture.mlp
    return architecture.layer_class, parts, architecture.mlp_output


def extend_sliced_classes(
    class_name: str, parts: tuple[str, str, str, str], mlp_output: str, module: ModuleType
) -> None:
    """Let the classes of a decoder layer and of the model around it read `sliced_hidden_size`.
    Mutates them; call it once, after `extend_layer_class`."""
    layer_class = getattr(module, class_name, None)
    trunk_class = getattr(module, class_name.replace("DecoderLayer", "Model"), None)
    if layer_class is None or trunk_class is None or hasattr(trunk_class.__init__, "__wrapped__"):
        return
    layer_init, trunk_init = layer_class.__init__, trunk_class.__init__

    @functools.wraps(layer_init)
    def init_layer(self, config, layer_idx, *args, **kwargs):
        width = getattr(config, "sliced_hidden_size", None)
        own = LayerConfig(config, {"hidden_size": width}) if width else config
        layer_init(self, own, layer_idx, *args, **kwargs)
        if width:
            is_last = layer_idx == config.num_hidden_layers - 1
            slice_layer(self, config, is_last, parts, mlp_output)

    @functools.wraps(trunk_init)
    def init_trunk(self, config, *args, **kwargs):
        trunk_init(self, config, *args, **kwargs)
        if getattr(config, "sliced_hidden_size", None):
            slice_trunk(self, config)

    layer_class.__init__, trunk_class.__init__ = init_layer, init_trunk


SOURCES = (
    UnweightedNorm,
    SlicedLayer,
    _sliced_class,
    slice_layer,
    slice_trunk,
    extend_sliced_classes,
)
"""What a modelling file for other readers holds of this one."""
