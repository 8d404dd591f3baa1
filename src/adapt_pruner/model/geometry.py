"""Make the attributes of modules agree with the sizes of their tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..precision import in_float64
from .architectures import Architecture
from .layers import LayerConfig


def adopt_geometry(layers: list[nn.Module], config: Any) -> None:
    """Take head counts, features and the like from layers built anew from `config`. Mutates."""
    for i, layer in enumerate(layers):
        with torch.device("meta"):
            built = type(layer)(config, i)
        for name, module in built.named_modules():
            ours = layer.get_submodule(name)
            for attribute, value in vars(module).items():
                is_size = _is_size(value) and not attribute.startswith("_")
                if is_size or isinstance(value, LayerConfig) or value is config:
                    setattr(ours, attribute, value)
        for name, parameter in built.named_parameters():
            actual = layer.get_parameter(name).shape
            assert actual == parameter.shape, f"{name}: cut to {actual}, expected {parameter.shape}"


def _is_size(value: Any) -> bool:
    return type(value) is int or (type(value) is tuple and all(type(v) is int for v in value))


def match_widths(model: Any, architecture: Architecture, before: int, after: int) -> None:
    """Tell the modules around the layers that the hidden size has changed. Mutates `model`."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.embedding_dim = after
    if head is not None:
        head.in_features = after
    trunk = model.get_submodule(architecture.layers.rpartition(".")[0])
    for module in trunk.children():
        if hasattr(module, "normalized_shape"):
            module.normalized_shape = (after,)  # LayerNorms know it
    if architecture.scales_embedding:
        embedding.scalar_embed_scale = after**0.5
        embedding.embed_scale.fill_(torch.tensor(after**0.5).item())  # rounded as a fresh one is
    with torch.no_grad():
        for weight, factor in rescaled(model, architecture, before, after).items():
            if weight is embedding.weight:
                weight.mul_(factor)
            else:  # Gemma's norms store what they add to 1
                weight.copy_(((1 + in_float64(weight)) * factor - 1).to(weight.dtype))


def rescaled(
    model: Any, architecture: Architecture, before: int, after: int
) -> dict[nn.Parameter, float]:
    """Parameters whose values change with the hidden size, and what they are multiplied by.

    Gemma multiplies embeddings by the square root of the hidden size. Embeddings that are larger by
    what that factor shrinks give the layers the same input; where the head shares their weights,
    the final norm takes back what it gains. Gradients, and so moments, change by the inverse.
    """
    if not architecture.scales_embedding or before == after:
        return {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    factors = {embedding.weight: (before / after) ** 0.5}
    if head is not None and head.weight is embedding.weight:
        trunk = model.get_submodule(architecture.layers.rpartition(".")[0])
        factors[trunk.norm.weight] = (after / before) ** 0.5
    return factors
