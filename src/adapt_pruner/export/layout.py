"""Which architecture of llama.cpp holds a model, and what its file says of every layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UnsupportedModel
from ..model.architectures import ARCHITECTURES, Architecture
from .architectures import GGUF_ARCHITECTURES, PER_LAYER, GgufArchitecture
from .weights import Weights

ZERO_NEURONS = 32
"""Width of the MLP of zeros that stands for a skipped one: a whole block of every quantisation."""


@dataclass(frozen=True)
class FileLayer:
    """A decoder layer in the file."""

    index: int
    """Its number in the model; layers that do nothing are left out of the file."""
    heads: int
    """Query heads; 0 where the layer skips attention."""
    kv_heads: int
    neurons: int
    """Width of its MLP in the file, neurons of zeros included."""
    added_neurons: int = 0
    """How many of them are zeros: they change nothing, and make rows a multiple of a block."""


@dataclass(frozen=True)
class Layout:
    """What a file says of a model's layers."""

    model_type: str
    architecture: GgufArchitecture
    head_dim: int
    layers: tuple[FileLayer, ...]
    notes: tuple[str, ...] = field(default=())
    """What the user should know, one sentence each."""

    @property
    def own(self) -> GgufArchitecture:
        """The row of the model type, which knows the names of its tensors."""
        return GGUF_ARCHITECTURES[self.model_type]

    @property
    def is_per_layer(self) -> bool:
        return self.architecture is not self.own


def find_layout(weights: Weights, multiple: int = 1) -> Layout:
    """Choose the architecture and describe the layers.

    Args:
        multiple: MLP widths are filled up to a multiple of this with neurons of zeros.

    Raises:
        UnsupportedModel: if llama.cpp has no architecture for it, saying what to do instead.
    """
    config = weights.config
    own = GGUF_ARCHITECTURES.get(config.model_type)
    if own is None:
        raise UnsupportedModel(
            f"A model of type '{config.model_type}' cannot be exported to GGUF. "
            f"Supported: {', '.join(sorted(GGUF_ARCHITECTURES))}."
        )
    if getattr(config, "sliced_hidden_size", None):
        raise UnsupportedModel(
            "llama.cpp has no shortcut matrices, so a model that slicegpt has sliced cannot be "
            "exported. Slice it with --shared-rotation, which leaves a plain model."
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in _SAME_ACTIVATION.get(own.activation, (own.activation,)):
        raise UnsupportedModel(
            f"llama.cpp computes '{own.name}' models with the activation function "
            f"'{own.activation}'; this one has '{activation}' and cannot be exported."
        )
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    layers = _layers(weights, head_dim, multiple)
    if layers and layers[0].heads == 0:
        layers[0] = replace(layers[0], heads=1, kv_heads=1)  # of zeros
    notes = []
    skipped = config.num_hidden_layers - len(layers)
    if skipped:
        notes.append(f"{skipped} layers that do nothing are left out.")
    architecture = own
    widths = {(layer.heads, layer.kv_heads, layer.neurons) for layer in layers}
    unequal = len(widths) > 1 or any(layer.heads == 0 for layer in layers)
    biased = _biased(weights)
    odd = "q_proj" in biased and any(
        layer.heads * head_dim != config.hidden_size for layer in layers
    )  # llama.cpp's own architectures expect query biases as long as the hidden size
    if unequal or odd or not biased <= {*own.biases}:
        architecture = _per_layer_architecture(weights, own, layers)
    _check_windows(config, architecture, layers)
    return Layout(config.model_type, architecture, head_dim, tuple(layers), tuple(notes))


_SAME_ACTIVATION = {"gelu_pytorch_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")}


def _layers(weights: Weights, head_dim: int, multiple: int) -> list[FileLayer]:
    parts = ARCHITECTURES[weights.config.model_type]
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    number = re.compile(re.escape(parts.layers) + r"\.(\d+)\.(.+)")
    for name, shape in weights.shapes.items():
        if match := number.match(name):
            found.setdefault(int(match[1]), {})[match[2]] = shape
    layers = []
    for index, tensors in sorted(found.items()):
        heads, kv_heads = _heads(parts, tensors, head_dim)
        width = tensors.get(f"{parts.mlp_output}.weight", (0, 0))[1]
        if heads or width:
            neurons = -(-width // multiple) * multiple
            added = neurons - width
            layers.append(FileLayer(index, heads, kv_heads, neurons or ZERO_NEURONS, added))
    return layers


def _heads(
    parts: Architecture, tensors: Mapping[str, tuple[int, ...]], head_dim: int
) -> tuple[int, int]:
    rows = [tensors.get(f"{parts.attention}.{name}.weight", (0,))[0] for name in parts.qkv]
    output = tensors.get(f"{parts.attention}.{parts.attention_output}.weight", (0, 0))
    heads = output[1] // head_dim
    if len(rows) == 1:
        return heads, (rows[0] // head_dim - heads) // 2
    return heads, rows[1] // head_dim


def _biased(weights: Weights) -> set[str]:
    """Names of the linears that have a bias."""
    return {
        name.split(".")[-2]
        for name in weights.shapes
        if name.endswith(".bias") and "norm" not in name
    }


def _per_layer_architecture(
    weights: Weights, own: GgufArchitecture, layers: list[FileLayer]
) -> GgufArchitecture:
    """The architecture for layers that differ, or for biases that `own` does not have."""
    strange = sorted(_biased(weights) - {*own.biases})
    if own.per_layer is None and strange:
        raise UnsupportedModel(
            f"llama.cpp has no bias of {strange[0]} in a '{own.name}' model; this one has, and "
            "cannot be exported."
        )
    way_out = "Prune with --layout uniform, then export."
    if own.per_layer is None:
        raise UnsupportedModel(
            f"llama.cpp has no architecture for a '{own.name}' model whose layers differ in width. "
            f"{way_out}"
        )
    row = PER_LAYER[own.per_layer]
    lacking = {
        "a head apart from the embedding matrix": row.must_be_tied and not weights.is_tied,
        "layers without attention": row.fused_qkv and any(layer.heads == 0 for layer in layers),
        "biases": not _biased(weights) <= {*row.biases},
    }
    for what in (what for what, is_lacking in lacking.items() if is_lacking):
        raise UnsupportedModel(
            f"llama.cpp holds '{own.name}' models whose layers differ in width as '{row.name}', "
            f"which has no {what.removeprefix('a ')}. {way_out}"
        )
    return row


def _check_windows(config: Any, architecture: GgufArchitecture, layers: list[FileLayer]) -> None:
    """Raise UnsupportedModel if windows do not sit where llama.cpp expects them."""
    if architecture.window_every is None:
        return
    every = architecture.window_every
    for place, layer in enumerate(layers):
        expected = "full_attention" if place % every == every - 1 else "sliding_attention"
        if config.layer_types[layer.index] != expected:
            raise UnsupportedModel(
                f"llama.cpp expects full attention in every {every}th layer of a "
                f"'{architecture.name}' model; layer {layer.index} of this one has "
                f"{config.layer_types[layer.index]}. Such a model cannot be exported."
            )
