"""Find what can be cut out of a model.

A *unit* is the smallest thing that can be removed. All units of one kind in one decoder layer form
a *group*. Toy example, a layer with hidden size 4, two query heads on each of two KV heads of
size 2, and an MLP of 3 neurons:

    attention group, 2 units (KV groups)       mlp group, 3 units (neurons)
      q_proj rows    [0 1 2 3] [4 5 6 7]         gate_proj rows    [0] [1] [2]
      k_proj rows    [0 1] [2 3]                 up_proj rows      [0] [1] [2]
      v_proj rows    [0 1] [2 3]                 down_proj columns [0] [1] [2]
      o_proj columns [0 1 2 3] [4 5 6 7]

A KV group is a key/value head with *its own* query heads, the n_rep consecutive ones that attention
reads with it.

Shape suffixes used throughout the package: B windows, T tokens, D hidden size, U units of a group,
K entries that one unit has along one side of a tensor, C columns of an output projection (U * K).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel, near_match
from .architectures import ARCHITECTURES, Architecture

ATTENTION = "attention"
MLP = "mlp"
WIDTH_OF = {ATTENTION: "num_key_value_heads", MLP: "intermediate_size"}
"""Kind of group -> the configuration's name for the number of its units."""
WIDTH_NAMES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


@dataclass
class Part:
    """The entries along one side of one tensor that belong to the units of a group."""

    module: nn.Module
    name: str
    """Name of the tensor inside `module`: "weight" or "bias"."""
    path: str
    """Name of the module inside the decoder layer, such as "mlp.up_proj"."""
    dim: int
    """Side that is cut: 0 rows (outputs), 1 columns (inputs)."""
    index_UK: Tensor
    """(U, K) int64, positions along `dim` that belong to each unit."""

    @property
    def tensor(self) -> nn.Parameter:
        return getattr(self.module, self.name)

    @property
    def cost(self) -> int:
        """Parameters that one unit has here."""
        tensor = self.tensor
        return self.index_UK.shape[1] * (tensor.numel() // max(tensor.shape[self.dim], 1))

    def per_unit(self, values: Tensor) -> Tensor:
        """Sum `values`, shaped like the tensor, over the entries of each unit. Returns (U,)."""
        other = [d for d in range(values.dim()) if d != self.dim]
        along = values.sum(dim=other) if other else values
        return along[self.index_UK.to(along.device)].sum(dim=1)


@dataclass
class Group:
    """All units of one kind in one decoder layer, with the tensors they are coupled through."""

    layer: int
    kind: str
    """ATTENTION (units are KV groups) or MLP (units are neurons)."""
    parts: list[Part]
    output: Part
    """The output projection (o_proj, down_proj), its columns ordered by unit; also in `parts`."""
    heads_per_unit: int = 1
    """Query heads of one KV group; 1 for neurons."""

    @property
    def num_units(self) -> int:
        return self.output.index_UK.shape[0]

    @property
    def unit_cost(self) -> int:
        """Parameters that one unit costs, biases included."""
        return sum(part.cost for part in self.parts)

    @property
    def uniform_widths(self) -> list[int]:
        """Units that all layers of a model may have alike, from the present number down."""
        widths = range(self.num_units - 1, 0, -1)
        if self.kind == ATTENTION:
            hidden_size, heads = self.output.tensor.shape[0], self.heads_per_unit
            widths = [width for width in widths if heads_fit(hidden_size, width * heads)]
        return [self.num_units, *widths]

    @property
    def output_projection(self) -> nn.Linear:
        return self.output.module  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.output.tensor.device

    @property
    def key(self) -> tuple[int, str]:
        return self.layer, self.kind

    def __str__(self) -> str:
        return f"layer {self.layer} {self.kind}"


@dataclass
class Anatomy:
    """The groups of a model, its decoder layers, and how its parameters are spread."""

    architecture: Architecture
    layers: list[nn.Module]
    groups: list[Group]
    total_parameters: int
    """Parameters of the whole model, tied weights counted once."""
    layer_parameters: int
    """Parameters of the decoder layers: what sparsity is a fraction of."""
    widths: list[dict[str, int]] = field(default_factory=list)
    """Per decoder layer, its values of WIDTH_NAMES (attention widths only where it attends)."""

    def of_layer(self, layer: int) -> Iterator[Group]:
        return (group for group in self.groups if group.layer == layer)

    @property
    def other_parameters(self) -> int:
        """Parameters outside the decoder layers: embeddings, final norm, head."""
        return self.total_parameters - self.layer_parameters


def architecture_of(config) -> Architecture:
    """Look up the architecture of a configuration.

    Raises:
        UnsupportedModel: naming what is supported, if this is another kind of model.
    """
    model_type = getattr(config, "model_type", "")
    if getattr(config, "is_encoder_decoder", False):
        _refuse(model_type, "it is an encoder-decoder model")
    if model_type not in ARCHITECTURES:
        experts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
        if any(getattr(config, name, None) for name in experts):
            _refuse(model_type, "it is a mixture of experts")
        if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
            _refuse(model_type, "it is a multimodal model; extract its text model first")
        if hasattr(config, "state_size") or hasattr(config, "ssm_state_size"):
            _refuse(model_type, "it is a state-space model")
        hint = near_match(model_type, ARCHITECTURES)
        _refuse(model_type, "its architecture is not known here", hint)
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel(
            "This model is quantised already; its weights can no longer be scored and cut. "
            "Prune the original model and quantise the result."
        )
    if getattr(config, "qk_layernorm", False) and model_type == "phi":
        raise UnsupportedModel("Phi models with qk_layernorm=True cannot be pruned; got one.")
    return ARCHITECTURES[model_type]


def _refuse(model_type: str, why: str, hint: str = "") -> None:
    raise UnsupportedModel(
        f"A model of type '{model_type}' cannot be pruned: {why}.{hint} "
        f"Supported: {', '.join(sorted(ARCHITECTURES))}, mobilellm."
    )


def find_anatomy(model: Any) -> Anatomy:
    """Find the decoder layers of a causal language model and every group of units in them.

    Works on any device, `meta` included. Changes nothing.

    Raises:
        UnsupportedModel: if the architecture is unknown or the projections are not plain linears
            (quantised, or wrapped by an adapter).
    """
    architecture = architecture_of(model.config)
    try:
        layers = list(model.get_submodule(architecture.layers).children())
    except AttributeError:
        raise UnsupportedModel(
            f"Expected a causal language model with decoder layers at '{architecture.layers}'; got "
            f"{type(model).__name__}. Load it with AutoModelForCausalLM, without adapters."
        ) from None
    groups = [g for i, layer in enumerate(layers) for g in _groups_of(architecture, i, layer)]
    return Anatomy(
        architecture=architecture,
        layers=layers,
        groups=groups,
        total_parameters=count_parameters(model),
        layer_parameters=sum(count_parameters(layer) for layer in layers),
        widths=[_widths_of(i, groups) for i in range(len(layers))],
    )


def count_parameters(module: nn.Module) -> int:
    """Count parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def heads_fit(hidden_size: int, num_heads: int) -> bool:
    """Whether every configuration class accepts this head count for the whole model: several want
    it to divide the hidden size, although the head size is said explicitly."""
    return hidden_size % num_heads == 0


def _widths_of(layer: int, groups: list[Group]) -> dict[str, int]:
    widths = {}
    for group in groups:
        if group.layer == layer and group.kind == ATTENTION:
            widths["num_attention_heads"] = group.num_units * group.heads_per_unit
            widths["num_key_value_heads"] = group.num_units
        elif group.layer == layer:
            widths["intermediate_size"] = group.num_units
    return widths


def _groups_of(architecture: Architecture, layer: int, module: nn.Module) -> Iterator[Group]:
    attends = architecture.attention is not None and hasattr(module, architecture.attention)
    if attends:
        yield _attention_group(architecture, layer, module)
    yield _mlp_group(architecture, layer, module)


def _mlp_group(architecture: Architecture, layer: int, module: nn.Module) -> Group:
    output = _linear(module, architecture.mlp_output)
    width = output.weight.shape[1]
    rows_UK = _blocks(width, 1, copies=architecture.mlp_blocks)
    parts = [
        part
        for path in architecture.mlp_inputs
        for part in _row_parts(_linear(module, path), path, rows_UK)
    ]
    last = Part(output, "weight", architecture.mlp_output, 1, _blocks(width, 1))
    return Group(layer, MLP, [*parts, last], last)


def _attention_group(architecture: Architecture, layer: int, module: nn.Module) -> Group:
    attention = module.get_submodule(architecture.attention)  # type: ignore[arg-type]
    prefix = f"{architecture.attention}."
    projections = [_linear(module, prefix + name) for name in architecture.qkv]
    output_path = prefix + architecture.attention_output
    output = _linear(module, output_path)
    head_dim: int = attention.head_dim  # type: ignore[assignment]
    num_heads = output.weight.shape[1] // head_dim
    if len(projections) == 1:
        num_kv = (projections[0].weight.shape[0] // head_dim - num_heads) // 2
    else:
        num_kv = projections[1].weight.shape[0] // head_dim
    n_rep = num_heads // num_kv

    query_UK = _blocks(num_kv, n_rep * head_dim)
    kv_UK = _blocks(num_kv, head_dim)
    if len(projections) == 1:
        key_start = num_heads * head_dim
        value_start = key_start + num_kv * head_dim
        fused_UK = torch.cat([query_UK, kv_UK + key_start, kv_UK + value_start], dim=1)
        rows = [fused_UK]
    else:
        rows = [query_UK, kv_UK, kv_UK]
    parts = [
        part
        for name, linear, rows_UK in zip(architecture.qkv, projections, rows, strict=True)
        for part in _row_parts(linear, prefix + name, rows_UK)
    ]
    if architecture.wide_norms:
        for name, index_UK in (("q_norm", query_UK), ("k_norm", kv_UK)):
            norm = attention.get_submodule(name)
            parts.append(Part(norm, "weight", prefix + name, 0, index_UK))
    last = Part(output, "weight", output_path, 1, query_UK)
    return Group(layer, ATTENTION, [*parts, last], last, heads_per_unit=n_rep)


def _blocks(num_units: int, size: int, copies: int = 1) -> Tensor:
    """(U, size * copies): unit u has entries u*size .. u*size+size-1 of each of `copies` blocks.

    >>> _blocks(2, 1, copies=2)  # a fused gate_up projection of 2 neurons
    tensor([[0, 2],
            [1, 3]])
    """
    first = torch.arange(num_units * size).view(num_units, size)
    return torch.cat([first + copy * num_units * size for copy in range(copies)], dim=1)


def _row_parts(linear: nn.Linear, path: str, rows_UK: Tensor) -> Iterator[Part]:
    yield Part(linear, "weight", path, 0, rows_UK)
    if linear.bias is not None:
        yield Part(linear, "bias", path, 0, rows_UK)


def _linear(layer: nn.Module, path: str) -> nn.Linear:
    module = layer.get_submodule(path)
    if type(module) is not nn.Linear:
        raise UnsupportedModel(
            f"Expected '{path}' to be torch.nn.Linear; got {type(module).__name__}. Prune before "
            "quantising, and merge adapters first (`model = model.merge_and_unload()`)."
        )
    return module
