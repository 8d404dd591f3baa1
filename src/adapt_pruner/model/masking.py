"""Multiply the units of a model by masks between 0 and 1, as if those at 0 had been cut.

Units of an axis are multiplied where a matrix has them along a side:

    neurons, KV groups, query heads    columns of the output projection
    hidden dimensions                  embeddings; columns of all that reads the residual stream,
                                       the head too; rows of all that writes to it
    decoder layers                     what the layer's sublayers add to the residual stream

Norms over hidden dimensions take their mean over those that are not at 0, and so do the norms over
all heads of OLMo 2 and 3 over the heads. `fold` multiplies the masks into the weights: a model that
is masked, and one whose masks are folded and whose units at 0 are then cut, compute the same.

Shapes: U units of an axis, C entries along a side or an activation's last dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import Anatomy
from .axes import HIDDEN, KV_GROUPS, LAYERS, QUERY_HEADS, Axis, AxisKey, Slot

Values = Mapping[AxisKey, Tensor]
"""(U,) masks per axis; axes that are not named stay as they are."""


@dataclass(frozen=True)
class MaskedPlace:
    """Where the units of an axis are multiplied."""

    key: AxisKey
    module: nn.Module
    at: str
    """ "input" or "output" of the module."""
    unit_C: Tensor | None = None
    """(C,) int64, the unit of each entry; None: all of them are one unit's."""

    def factor(self, values: Values, like: Tensor) -> Tensor:
        """(C,) or a scalar, on the device and in the precision of `like`."""
        value_U = values[self.key].to(like)
        return value_U[0] if self.unit_C is None else value_U[self.unit_C.to(like.device)]


@dataclass(frozen=True)
class NormPlace:
    """A norm over entries that belong to units of axes."""

    module: nn.Module
    unit_of: dict[AxisKey, Tensor]
    """(C,) int64 per axis; an entry is there as long as none of its units is at 0."""
    is_centred: bool
    """Whether it subtracts the mean: a LayerNorm."""

    def kept(self, values: Values, like: Tensor) -> Tensor:
        """(C,), 1 where an entry is there, else 0."""
        kept_C = like.new_ones(next(iter(self.unit_of.values())).shape)
        for key, unit_C in self.unit_of.items():
            kept_C = kept_C * (values[key].detach() != 0).to(like)[unit_C.to(like.device)]
        return kept_C


def attach(anatomy: Anatomy, axes: list[Axis], current: Callable[[], Values]) -> Iterator[Any]:
    """Register hooks that multiply by `current()` in every forward pass; yields their handles.
    `current` is asked anew at every place, so the caller decides when masks change."""
    for place in _places(anatomy, axes):
        yield _watch(place, current)
    for norm in _norms(anatomy, axes):
        yield norm.module.register_forward_pre_hook(_before_norm(norm, current))
        yield norm.module.register_forward_hook(_after_norm(norm, current))


@torch.no_grad()
def fold(anatomy: Anatomy, axes: list[Axis], values: Values) -> None:
    """Multiply the masks into the weights; units at 0 are then still there. Mutates them."""
    done = set()
    for place in _places(anatomy, axes):
        module: Any = place.module
        is_table = isinstance(module, nn.Embedding)
        of_columns = place.at == "input" or is_table
        weight: Any = module.weight
        side = place.key, id(weight), of_columns
        if side in done:  # embeddings that the head shares
            continue
        done.add(side)
        factor = place.factor(values, weight)
        if not (is_table or isinstance(module, nn.Linear)):
            _scale_norm(module, factor)
            continue
        weight.mul_(factor if of_columns else factor.reshape(-1, 1))
        bias: Tensor | None = getattr(module, "bias", None)
        if not of_columns and bias is not None:
            bias.mul_(factor)


def _places(anatomy: Anatomy, axes: list[Axis]) -> Iterator[MaskedPlace]:
    for axis in axes:
        if axis.kind == HIDDEN:
            yield from _hidden_places(anatomy, axis)
        elif axis.kind == LAYERS:
            for site in axis.sites:
                yield MaskedPlace(axis.key, site.module, site.at)
        else:
            assert axis.output is not None
            yield MaskedPlace(axis.key, axis.output.module, "input", _unit_of_entry(axis.output))


def _hidden_places(anatomy: Anatomy, axis: Axis) -> Iterator[MaskedPlace]:
    """Further sides of the hidden size, such as the channels of a convolution, go with them."""
    model: Any = anatomy.model
    unit_C = torch.arange(axis.num_units)
    writers = {anatomy.architecture.mlp_output, anatomy.architecture.other_writer}
    writers.add(f"{anatomy.architecture.attention}.{anatomy.architecture.attention_output}")
    yield MaskedPlace(axis.key, model.get_input_embeddings(), "output", unit_C)
    if (head := model.get_output_embeddings()) is not None:
        yield MaskedPlace(axis.key, head, "input", unit_C)
    for slot in axis.slots:
        is_linear = isinstance(slot.module, nn.Linear) and slot.name == "weight"
        if is_linear and slot.dim == 1 and slot.path != "head":
            yield MaskedPlace(axis.key, slot.module, "input", unit_C)
        if is_linear and slot.dim == 0 and slot.path in writers:
            yield MaskedPlace(axis.key, slot.module, "output", unit_C)


def _unit_of_entry(slot: Slot) -> Tensor:
    """(C,) int64: the inverse of the slot's index."""
    index_UK = slot.index_UK.cpu()
    unit_C = torch.empty(index_UK.numel(), dtype=torch.int64)
    unit_C[index_UK] = torch.arange(len(index_UK))[:, None]
    return unit_C


def _norms(anatomy: Anatomy, axes: list[Axis]) -> Iterator[NormPlace]:
    """Those over the residual stream, and those over all heads of an attention."""
    model: Any = anatomy.model
    over: dict[nn.Module, dict[AxisKey, Tensor]] = {}
    for axis in axes:
        if axis.kind == HIDDEN:
            trunk = model.get_submodule(anatomy.architecture.layers.rpartition(".")[0])
            for parent in (trunk, *anatomy.layers):
                for child in parent.children():
                    if "Norm" in type(child).__name__:
                        over.setdefault(child, {})[axis.key] = torch.arange(axis.num_units)
        elif axis.kind in (KV_GROUPS, QUERY_HEADS) and anatomy.architecture.wide_norms:
            for slot in axis.slots:
                if slot.path.endswith("_norm"):
                    over.setdefault(slot.module, {})[axis.key] = _unit_of_entry(slot)
    for module, unit_of in over.items():
        yield NormPlace(module, unit_of, _is_centred(module, len(next(iter(unit_of.values())))))


def _watch(place: MaskedPlace, current: Callable[[], Values]) -> Any:
    def before(module, args):
        return (args[0] * place.factor(current(), args[0]), *args[1:])

    def after(module, args, output):
        return output * place.factor(current(), output)

    if place.at == "input":
        return place.module.register_forward_pre_hook(before)
    return place.module.register_forward_hook(after)


def _before_norm(norm: NormPlace, current: Callable[[], Values]):
    """With K of C entries there, sqrt(C / K) times as large they have the mean square over all that
    they have among themselves."""

    def hook(module, args):
        kept_C = norm.kept(current(), args[0])
        count = kept_C.sum().clamp(min=1)
        x_C = args[0] * kept_C
        if norm.is_centred:
            x_C = (x_C - x_C.sum(dim=-1, keepdim=True) / count) * kept_C
        return (x_C * (len(kept_C) / count).sqrt(), *args[1:])

    return hook


def _after_norm(norm: NormPlace, current: Callable[[], Values]):
    def hook(module, args, output):
        kept_C = norm.kept(current(), output)
        scale = (kept_C.sum().clamp(min=1) / len(kept_C)).sqrt()
        bias = getattr(module, "bias", None)
        if bias is None:
            return output * kept_C * scale
        return ((output - bias) * scale + bias) * kept_C

    return hook


def _is_centred(norm: nn.Module, size: int) -> bool:
    """Asked of a copy, because the names of classes do not say it."""
    probe: Any = deepcopy(norm).to("cpu", torch.float32)
    x_1C = torch.linspace(-1, 2, size)[None]
    with torch.no_grad():
        return torch.allclose(probe.forward(x_1C), probe.forward(x_1C + 1), atol=1e-4)


def _scale_norm(norm: Any, factor: Tensor) -> None:
    """Multiply what a norm puts out. Some store what they add to 1 (Gemma): those that put
    something out although their weight is 0."""
    probe: Any = deepcopy(norm).to("cpu", torch.float32)
    for parameter in probe.parameters():
        parameter.zero_()
    adds_to_one = bool(probe.forward(torch.linspace(-1, 2, len(norm.weight))[None]).any())
    offset = 1 if adds_to_one else 0
    norm.weight.copy_((norm.weight + offset) * factor - offset)
    if getattr(norm, "bias", None) is not None:
        norm.bias.mul_(factor)
