"""Find the axes of a model: what can be cut out of it. See `axes` for the words."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from .architectures import Architecture
from .axes import (
    ATTENTION,
    HIDDEN,
    KV_GROUPS,
    LAYERS,
    MLP,
    NEURONS,
    QUERY_HEADS,
    WHOLE_MODEL,
    Axis,
    AxisKey,
    Site,
    Slot,
    side,
)
from .counting import ParameterCount
from .resources import PARAMETERS, Cost, Resource
from .skipped import Skipped
from .support import architecture_of


@dataclass
class Anatomy:
    """The axes of a model, its decoder layers, and how its parameters are spread."""

    architecture: Architecture
    layers: list[nn.Module]
    axes: list[Axis]
    total_parameters: int
    """Parameters of the whole model, tied weights counted once."""
    parameters_of_layers: list[int]
    widths: list[dict[str, int]] = field(default_factory=list)
    """Per decoder layer, its values of WIDTH_NAMES, 0 where it skips the sublayer; attention widths
    only where it attends."""
    hidden_size: int = 0
    model: nn.Module | None = field(default=None, repr=False)
    resource: Resource = PARAMETERS
    """What targets limit."""

    def of_kinds(self, kinds: Collection[str]) -> list[Axis]:
        """The axes of some kinds, in order."""
        return [axis for axis in self.axes if axis.kind in kinds]

    def of_layer(self, layer: int) -> Iterator[Axis]:
        return (axis for axis in self.axes if axis.layer == layer)

    @property
    def layer_parameters(self) -> int:
        """Parameters of the decoder layers: what sparsity is a fraction of."""
        return sum(self.parameters_of_layers)

    @property
    def other_parameters(self) -> int:
        """Parameters outside the decoder layers: embeddings, final norm, head."""
        return self.total_parameters - self.layer_parameters

    @property
    def sizes(self) -> dict[AxisKey, int]:
        return {axis.key: axis.size for axis in self.axes}

    @cached_property
    def count(self) -> ParameterCount:
        """Exact arithmetic of parameters; see `parameters`."""
        assert self.model is not None
        return ParameterCount(self.model, self.axes, self.other_parameters)

    @cached_property
    def cost(self) -> Cost:
        """The same of what targets limit."""
        return self.resource.of(self)

    @cached_property
    def amount(self) -> int:
        """What the model takes of the resource now; parameters, unless another is said."""
        return self.cost.total({})

    def parameters(self, sizes: Mapping[AxisKey, int]) -> int:
        """Parameters of the whole model if its axes had these sizes; those not named stay."""
        return self.count.total(sizes)


def find_anatomy(model: Any, resource: Resource = PARAMETERS) -> Anatomy:
    """Find the decoder layers of a causal language model and every axis that can be cut.

    Works on any device, `meta` included. Changes nothing.

    Args:
        resource: what targets limit.

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
    axes, widths = [], []
    is_sliced = bool(getattr(model.config, "sliced_hidden_size", None))
    for i, layer in enumerate(layers):
        found = list(_axes_of_layer(architecture, i, layer))
        # Between layers a sliced stream changes its basis, so all of them have to stay.
        axes += [axis for axis in found if not (is_sliced and axis.is_presence)]
        widths.append(_widths_of(architecture, layer, found))
    if architecture.has_free_heads and not is_sliced:
        axes.append(_hidden_axis(architecture, model, layers))
    return Anatomy(
        architecture=architecture,
        layers=layers,
        axes=axes,
        total_parameters=count_parameters(model),
        parameters_of_layers=[count_parameters(layer) for layer in layers],
        widths=widths,
        hidden_size=model.config.hidden_size,
        model=model,
        resource=resource,
    )


def count_parameters(module: nn.Module) -> int:
    """Count parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def is_there(layer: nn.Module, name: str) -> bool:
    """Whether a layer has the module and does not skip it."""
    module = getattr(layer, name, None)
    return module is not None and not isinstance(module, Skipped)


def _widths_of(architecture: Architecture, layer: nn.Module, axes: list[Axis]) -> dict[str, int]:
    sizes = {axis.kind: axis.num_units for axis in axes}
    widths = {}
    if architecture.has_free_heads and hasattr(layer, architecture.attention):
        groups = sizes.get(KV_GROUPS, 0)
        widths["num_attention_heads"] = sizes.get(QUERY_HEADS, groups)
        widths["num_key_value_heads"] = groups
    widths["intermediate_size"] = sizes.get(NEURONS, 0)
    return widths


def _axes_of_layer(architecture: Architecture, i: int, layer: nn.Module) -> Iterator[Axis]:
    writers = _writers(architecture, layer)
    if ATTENTION in writers and architecture.has_free_heads:
        yield from _attention_axes(architecture, i, layer)
    if MLP in writers:
        yield _neurons(architecture, i, layer)
    for kind, name in ((ATTENTION, architecture.attention), (MLP, architecture.mlp)):
        if kind in writers:
            parts = (name, *architecture.sublayers[name])
            yield _presence(i, kind, layer, parts, [writers[kind]])
    everything = [name for name, _ in layer.named_children()]
    yield _presence(i, LAYERS, layer, everything, list(writers.values()))


def _writers(architecture: Architecture, layer: nn.Module) -> dict[str, nn.Module]:
    """Modules whose outputs a layer adds to the residual stream, by the sublayer they end."""
    writers = {}
    attention, mlp = architecture.attention, architecture.mlp
    if is_there(layer, attention):
        last = architecture.attention_norms[1] or f"{attention}.{architecture.attention_output}"
        writers[ATTENTION] = layer.get_submodule(last)
    elif architecture.other_writer and not hasattr(layer, attention):
        writers["other"] = layer.get_submodule(architecture.other_writer)
    if is_there(layer, mlp):
        writers[MLP] = layer.get_submodule(architecture.mlp_norms[1] or architecture.mlp_output)
    return writers


def _presence(
    layer: int, kind: str, module: nn.Module, parts: Collection[str], writers: list[nn.Module]
) -> Axis:
    """An axis of one unit that owns everything in some modules of a layer."""
    slots = []
    for part in parts:
        for path, owner in module.get_submodule(part).named_modules(prefix=part):
            for name, tensor in owner.named_parameters(recurse=False):
                slots.append(Slot(owner, name, path, 0, torch.arange(side(tensor, 0))[None]))
    sites = [Site(writer, "output", None) for writer in writers]
    return Axis(layer, kind, 1, slots, sites)


def _neurons(architecture: Architecture, layer: int, module: nn.Module) -> Axis:
    output = _linear(module, architecture.mlp_output)
    width = output.weight.shape[1]
    rows_UK = _blocks(width, 1, copies=architecture.mlp_blocks)
    slots = [
        slot
        for path in architecture.mlp_inputs
        for slot in _row_slots(_linear(module, path), path, rows_UK)
    ]
    last = Slot(output, "weight", architecture.mlp_output, 1, _blocks(width, 1))
    site = Site(output, "input", last.index_UK)
    return Axis(layer, NEURONS, width, [*slots, last], [site], output=last)


def _attention_axes(architecture: Architecture, layer: int, module: nn.Module) -> Iterator[Axis]:
    """KV groups, and query heads where a group has several."""
    attention: Any = module.get_submodule(architecture.attention)
    prefix = f"{architecture.attention}."
    projections = [_linear(module, prefix + name) for name in architecture.qkv]
    output_path = prefix + architecture.attention_output
    output = _linear(module, output_path)
    head_dim: int = attention.head_dim
    num_heads = output.weight.shape[1] // head_dim
    is_fused = len(projections) == 1
    if is_fused:
        num_kv = (projections[0].weight.shape[0] // head_dim - num_heads) // 2
    else:
        num_kv = projections[1].weight.shape[0] // head_dim
    group_UK = _blocks(num_kv, num_heads // num_kv * head_dim)
    query_UK, kv_UK = _blocks(num_heads, head_dim), _blocks(num_kv, head_dim)
    if is_fused:
        key_start = num_heads * head_dim
        value_start = key_start + num_kv * head_dim
        rows = [torch.cat([group_UK, kv_UK + key_start, kv_UK + value_start], dim=1)]
    else:
        rows = [group_UK, kv_UK, kv_UK]
    slots = [
        slot
        for name, linear, rows_UK in zip(architecture.qkv, projections, rows, strict=True)
        for slot in _row_slots(linear, prefix + name, rows_UK)
    ]
    query_slots = list(_row_slots(projections[0], prefix + architecture.qkv[0], query_UK))
    if architecture.wide_norms:
        for name, index_UK in (("q_norm", group_UK), ("k_norm", kv_UK)):
            slots.append(Slot(attention.get_submodule(name), "weight", prefix + name, 0, index_UK))
        query_slots.append(Slot(attention.q_norm, "weight", f"{prefix}q_norm", 0, query_UK))
    last = Slot(output, "weight", output_path, 1, group_UK)
    site = Site(output, "input", group_UK)
    yield Axis(layer, KV_GROUPS, num_kv, [*slots, last], [site], grain=head_dim, output=last)
    if num_heads > num_kv:
        last = Slot(output, "weight", output_path, 1, query_UK)
        site = Site(output, "input", query_UK)
        yield Axis(
            layer,
            QUERY_HEADS,
            num_heads,
            [*query_slots, last],
            [site],
            strata=num_kv,
            grain=head_dim,
            output=last,
        )


def _hidden_axis(architecture: Architecture, model: Any, layers: list[nn.Module]) -> Axis:
    """The residual stream: all that reads it or writes to it."""
    size: int = model.config.hidden_size
    units_UK = _blocks(size, 1)
    base = model.get_submodule(architecture.layers.rpartition(".")[0])
    slots = [Slot(model.get_input_embeddings(), "weight", "embeddings", 1, units_UK)]
    slots += _norm_slots(base, units_UK)
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        slots.append(Slot(head, "weight", "head", 1, units_UK))
    sites = [Site(layers[0], "input", units_UK)]
    for layer in layers:
        slots += _hidden_slots_of_layer(architecture, layer, units_UK)
        sites += [
            Site(writer, "output", units_UK) for writer in _writers(architecture, layer).values()
        ]
    return Axis(WHOLE_MODEL, HIDDEN, size, slots, sites)


def _hidden_slots_of_layer(
    architecture: Architecture, layer: nn.Module, units_UK: Tensor
) -> Iterator[Slot]:
    yield from _norm_slots(layer, units_UK)
    inputs, outputs = [], []
    if is_there(layer, architecture.attention):
        prefix = f"{architecture.attention}."
        inputs += [prefix + name for name in architecture.qkv]
        outputs.append(prefix + architecture.attention_output)
    if is_there(layer, architecture.mlp):
        inputs += architecture.mlp_inputs
        outputs.append(architecture.mlp_output)
    for path in inputs:
        yield Slot(_linear(layer, path), "weight", path, 1, units_UK)
    for path in outputs:
        yield from _row_slots(_linear(layer, path), path, units_UK)
    for path, dim, copies in architecture.other_hidden:
        owner_path, _, name = path.rpartition(".")
        owner = layer.get_submodule(owner_path) if hasattr(layer, path.split(".")[0]) else None
        if owner is not None and getattr(owner, name, None) is not None:
            yield Slot(owner, name, owner_path, dim, _blocks(len(units_UK), 1, copies))


def _norm_slots(parent: nn.Module, units_UK: Tensor) -> Iterator[Slot]:
    """Weights and biases of the norms directly inside a layer or the model's trunk."""
    for path, module in parent.named_children():
        for name, tensor in module.named_parameters(recurse=False):
            if tensor.dim() == 1:
                yield Slot(module, name, path, 0, units_UK)


def _blocks(num_units: int, size: int, copies: int = 1) -> Tensor:
    """(U, size * copies): unit u has entries u*size .. u*size+size-1 of each of `copies` blocks.

    >>> _blocks(2, 1, copies=2)  # a fused gate_up projection of 2 neurons
    tensor([[0, 2],
            [1, 3]])
    """
    first = torch.arange(num_units * size).view(num_units, size)
    return torch.cat([first + copy * num_units * size for copy in range(copies)], dim=1)


def _row_slots(linear: nn.Linear, path: str, rows_UK: Tensor) -> Iterator[Slot]:
    yield Slot(linear, "weight", path, 0, rows_UK)
    if linear.bias is not None:
        yield Slot(linear, "bias", path, 0, rows_UK)


def _linear(layer: nn.Module, path: str) -> nn.Linear:
    module = layer.get_submodule(path)
    if type(module) is not nn.Linear:
        raise UnsupportedModel(
            f"Expected '{path}' to be torch.nn.Linear; got {type(module).__name__}. Prune before "
            "quantising, and merge adapters first (`model = model.merge_and_unload()`)."
        )
    return module
