"""Changes of a model's structure, made in place, written down, and made again from the record.

An edit knows three things: to `apply` itself to a model, to `follow` with the moments of an
optimizer, and its `record`, a JSON object that `edit_of` turns back into the edit. What a method
does to the structure of a model is a list of edits; weights that it refits are no edit.

The weights are cut where the anatomy says; the rest (head counts, features of a linear, the layer's
own configuration) is taken from a fresh layer built on the meta device from the new configuration.
So the model in memory is what a checkpoint of it loads as.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..errors import LoadingError, shown
from .anatomy import Anatomy, find_anatomy
from .axes import ATTENTION, HIDDEN, LAYERS, MLP, AxisKey, parts_of_layers
from .configuring import describe_model, drop_layers_of_config
from .geometry import adopt_geometry, match_widths, rescaled
from .rotation import Rotate
from .skipped import add_biases, skip_sublayers

Keep = Mapping[AxisKey, Tensor]
"""(U,) bool per axis, False for the units that go; axes not named stay whole."""
Moments = dict[str, dict[str, Tensor]]
"""Of an optimizer: parameter -> what it remembers of it, such as exp_avg, and its step."""


class Edit(Protocol):
    """One change of a model's structure."""

    kind: ClassVar[str]

    def apply(self, model: nn.Module) -> None:
        """Change the model in place. Parameters stay the same objects, without gradients."""
        ...

    def follow(self, model: nn.Module, moments: Moments) -> bool:
        """Change moments as `apply` is going to change the weights; call it before that. Returns
        False, and clears them, where they mean nothing afterwards."""
        ...

    def record(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Cut:
    """Remove units: rows and columns, whole layers, attention or MLP of a layer."""

    keep: Keep
    kind: ClassVar[str] = "cut"

    def apply(self, model: nn.Module) -> None:
        anatomy = find_anatomy(model)
        gone = _gone_layers(anatomy, self.keep)
        for (tensor, dim), kept in _kept_entries(anatomy, self.keep, gone).items():
            tensor.grad = None
            tensor.data = tensor.data.index_select(dim, kept.to(tensor.device)).contiguous()
        config: Any = model.config
        width = _count(self.keep, (-1, HIDDEN), anatomy.hidden_size)
        if width != anatomy.hidden_size:
            match_widths(model, anatomy.architecture, anatomy.hidden_size, width)
            config.hidden_size = width
        _skip(anatomy, self.keep, gone)
        if gone:
            _drop_layers(model, anatomy, gone)
            drop_layers_of_config(config, gone)
        after = find_anatomy(model)
        describe_model(config, after)
        adopt_geometry(after.layers, config)

    def follow(self, model: nn.Module, moments: Moments) -> bool:
        anatomy = find_anatomy(model)
        names = {parameter: name for name, parameter in model.named_parameters()}
        gone = _gone_layers(anatomy, self.keep)
        for (tensor, dim), kept in _kept_entries(anatomy, self.keep, gone).items():
            of = moments.get(names[tensor], {})
            for what, value in of.items():
                if what != "step":
                    of[what] = value.index_select(dim, kept.to(value.device)).contiguous()
        width = _count(self.keep, (-1, HIDDEN), anatomy.hidden_size)
        factors = rescaled(model, anatomy.architecture, anatomy.hidden_size, width)
        for parameter, factor in factors.items():
            for what, value in (of := moments.get(names[parameter], {})).items():
                if what != "step":  # of gradients, or of their squares
                    of[what] = value / factor ** (2 if what.endswith("_sq") else 1)
        renamed = _names_after(anatomy, self.keep, gone, list(moments))
        kept = {renamed[name]: of for name, of in moments.items() if name in renamed}
        moments.clear()
        moments.update(kept)
        return True

    def gone_layers(self, anatomy: Anatomy) -> set[int]:
        """Layers that go, and those of which nothing else is left."""
        return _gone_layers(anatomy, self.keep)

    def record(self) -> dict[str, Any]:
        axes = {
            f"{layer}/{kind}": {"units": len(keep_U), "kept": keep_U.nonzero().flatten().tolist()}
            for (layer, kind), keep_U in self.keep.items()
            if not keep_U.all()
        }
        return {"edit": self.kind, "axes": axes}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Cut:
        keep = {}
        for name, entry in record["axes"].items():
            layer, kind = name.split("/")
            keep_U = torch.zeros(entry["units"], dtype=torch.bool)
            keep_U[torch.tensor(entry["kept"], dtype=torch.int64)] = True
            keep[int(layer), kind] = keep_U
        return cls(keep)


@dataclass(frozen=True)
class AddBias:
    """Give linears of the layers a bias of zeros, which a method then fills."""

    linears: Mapping[int, tuple[str, ...]]
    """Decoder layer -> names inside it, such as "mlp.down_proj"."""
    kind: ClassVar[str] = "add-bias"

    def apply(self, model: nn.Module) -> None:
        anatomy = find_anatomy(model)
        for i, names in self.linears.items():
            add_biases(anatomy.layers[i], names)
        describe_model(model.config, find_anatomy(model))

    def follow(self, model: nn.Module, moments: Moments) -> bool:
        return True  # new parameters begin without moments

    def record(self) -> dict[str, Any]:
        linears = {str(layer): list(names) for layer, names in self.linears.items()}
        return {"edit": self.kind, "linears": linears}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> AddBias:
        return cls({int(layer): tuple(names) for layer, names in record["linears"].items()})


EDITS: dict[str, Any] = {Cut.kind: Cut, AddBias.kind: AddBias, Rotate.kind: Rotate}


def edit_of(record: Any) -> Edit:
    """The edit that a record tells of.

    Raises:
        LoadingError: if there is no such edit, or the record is damaged.
    """
    try:
        return EDITS[record["edit"]].of_record(record)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError):
        raise LoadingError(
            f"The record of an edit is damaged or unknown: {shown(record)}."
        ) from None


def cut(model: nn.Module, keep: Keep) -> Anatomy:
    """Apply a `Cut`. Returns the anatomy of the model as it is now."""
    Cut(keep).apply(model)
    return find_anatomy(model)


def entries_of(index_UK: Tensor, units_U: Tensor) -> Tensor:
    """Positions of the units for which `units_U` is True, ascending."""
    return index_UK[units_U.to(index_UK.device)].flatten().sort().values


def _count(keep: Keep, key: AxisKey, whole: int) -> int:
    return int(keep[key].sum()) if key in keep else whole


def _is_gone(keep: Keep, key: AxisKey) -> bool:
    return key in keep and not keep[key].any()


def _gone_layers(anatomy: Anatomy, keep: Keep) -> set[int]:
    """Layers that go, and those of which nothing else is left."""
    gone = {i for i in range(len(anatomy.layers)) if _is_gone(keep, (i, LAYERS))}
    parts = parts_of_layers(anatomy.axes)
    return gone | {i for i, of in parts.items() if all(_is_gone(keep, axis.key) for axis in of)}


def _kept_entries(
    anatomy: Anatomy, keep: Keep, gone: set[int]
) -> dict[tuple[nn.Parameter, int], Tensor]:
    """For every side of a tensor that gets shorter, the positions that stay, ascending."""
    stays: dict[tuple[nn.Parameter, int], Tensor] = {}
    for axis in anatomy.axes:
        if axis.key not in keep or axis.is_presence or axis.layer in gone or keep[axis.key].all():
            continue
        for slot in axis.slots:
            side = slot.tensor, slot.dim
            if side not in stays:
                stays[side] = torch.ones(slot.tensor.shape[slot.dim], dtype=torch.bool)
            stays[side][slot.index_UK[~keep[axis.key].cpu()].flatten()] = False
    return {side: mask.nonzero().flatten() for side, mask in stays.items()}


def _skip(anatomy: Anatomy, keep: Keep, gone: set[int]) -> None:
    architecture = anatomy.architecture
    names = {ATTENTION: architecture.attention, MLP: architecture.mlp}
    for axis in anatomy.of_kinds(names):
        if axis.layer not in gone and _is_gone(keep, axis.key):
            layer = anatomy.layers[axis.layer]
            name = names[axis.kind]
            skip_sublayers(layer, [name], architecture.attention, architecture.sublayers)


def _drop_layers(model: nn.Module, anatomy: Anatomy, gone: set[int]) -> None:
    path = anatomy.architecture.layers
    kept = [layer for i, layer in enumerate(anatomy.layers) if i not in gone]
    model.set_submodule(path, nn.ModuleList(kept), strict=True)
    for i, layer in enumerate(kept):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                vars(module)["layer_idx"] = i  # where the KV cache keeps what is its own


def _names_after(anatomy: Anatomy, keep: Keep, gone: set[int], names: list[str]) -> dict[str, str]:
    """Parameter names of the model after the cut, by their present ones; without those that go."""
    prefix = anatomy.architecture.layers + "."
    number = {}
    for i in range(len(anatomy.layers)):
        if i not in gone:
            number[i] = len(number)
    skipped = defaultdict(list)
    kinds = {ATTENTION: anatomy.architecture.attention, MLP: anatomy.architecture.mlp}
    for axis in anatomy.of_kinds(kinds):
        if _is_gone(keep, axis.key):
            name = kinds[axis.kind]
            skipped[axis.layer] += [name, *anatomy.architecture.sublayers[name]]
    after = {}
    for name in names:
        if not name.startswith(prefix):
            after[name] = name
            continue
        i, _, inner = name.removeprefix(prefix).partition(".")
        if int(i) in number and inner.split(".")[0] not in skipped[int(i)]:
            after[name] = f"{prefix}{number[int(i)]}.{inner}"
    return after
