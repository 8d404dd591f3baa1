"""The edits of a run, in terms of the model that it began with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .anatomy import Anatomy
from .axes import ATTENTION, KV_GROUPS, LAYERS, MLP, NEURONS, QUERY_HEADS, AxisKey
from .edits import Cut, Edit, edit_of

_INSIDE = {ATTENTION: (KV_GROUPS, QUERY_HEADS, ATTENTION), MLP: (NEURONS, MLP)}


class History:
    """Edits in order. Cuts that follow each other become one, which names original units."""

    def __init__(self, anatomy: Anatomy):
        self._count = len(anatomy.layers)
        self.layers = list(range(self._count))
        """Original numbers of the layers that are left."""
        self._done: list[Edit] = []
        self._begin(anatomy)

    def _begin(self, anatomy: Anatomy) -> None:
        self.whole = {axis.key: axis.num_units for axis in anatomy.axes}
        """Units of each axis before anything was cut."""
        self.units: dict[AxisKey, Tensor] = {
            key: torch.arange(count) for key, count in self.whole.items()
        }
        """Those that are left, ascending, by the axis's original key; an axis that is gone has an
        entry without units only if it was there or not, such as a layer."""
        self._layers = list(range(len(anatomy.layers)))

    @property
    def edits(self) -> list[Edit]:
        """All of them, so that they lead from the model at the beginning to the present one."""
        cut = self._cut()
        return [*self._done, cut] if cut.keep else list(self._done)

    def add(self, edit: Edit, before: Anatomy) -> None:
        """Take in an edit of a model that has the anatomy `before`."""
        if not isinstance(edit, Cut):
            self._done = [*self.edits, edit]
            self._begin(before)
            return
        for axis in before.axes:
            if axis.key in edit.keep:
                keep_U = edit.keep[axis.key].cpu()
                original = self._original(axis.key)
                self.units[original] = self.units[original][_own(before, edit, axis.key, keep_U)]
        for layer, kind in list(edit.keep):
            if kind == KV_GROUPS and (layer, QUERY_HEADS) not in edit.keep:
                self._follow_groups(before, edit, layer)
        gone = edit.gone_layers(before)
        for layer, kind in list(edit.keep):
            if kind in _INSIDE and not edit.keep[layer, kind].any():
                self._forget(layer, _INSIDE[kind])
        for layer in gone:
            self._forget(layer, {kind for of, kind in self.units if of == self._layers[layer]})
        self._layers = [name for i, name in enumerate(self._layers) if i not in gone]
        self.layers = [name for i, name in enumerate(self.layers) if i not in gone]

    def state_dict(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "count": self._count,
            "layers": self.layers,
            "done": [edit.record() for edit in self._done],
            "whole": {_name(key): count for key, count in self.whole.items()},
            "units": {_name(key): units.tolist() for key, units in self.units.items()},
            "layers_of_cut": self._layers,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> History:
        self = cls.__new__(cls)
        self._count = state["count"]
        self.layers, self._layers = list(state["layers"]), list(state["layers_of_cut"])
        self._done = [edit_of(record) for record in state["done"]]
        self.whole = {_key(name): count for name, count in state["whole"].items()}
        self.units = {
            _key(name): torch.tensor(units, dtype=torch.int64)
            for name, units in state["units"].items()
        }
        return self

    def aligned(self, of_layers: list[dict[str, int]]) -> list[dict[str, int]]:
        """Figures of the present layers, under the original numbers; layers that are gone have 0 of
        everything."""
        zeros = dict.fromkeys({name for layer in of_layers for name in layer}, 0)
        there = dict(zip(self.layers, of_layers, strict=True))
        return [there.get(i, zeros) for i in range(self._count)]

    def _original(self, key: AxisKey) -> AxisKey:
        layer, kind = key
        return (self._layers[layer] if layer >= 0 else layer, kind)

    def _follow_groups(self, before: Anatomy, edit: Cut, layer: int) -> None:
        """Query heads go with their KV group."""
        for axis in before.of_layer(layer):
            if axis.kind == QUERY_HEADS:
                keep_U = edit.keep[layer, KV_GROUPS].cpu().repeat_interleave(axis.size)
                original = self._original(axis.key)
                self.units[original] = self.units[original][keep_U]

    def _forget(self, layer: int, kinds) -> None:
        """Nothing of these axes is left."""
        for kind in kinds:
            original = self._original((layer, kind))
            if original in self.units:
                self.units[original] = self.units[original][:0]

    def _cut(self) -> Cut:
        keep = {}
        for key, units in self.units.items():
            whole = self.whole[key]
            if len(units) < whole:
                keep[key] = torch.zeros(whole, dtype=torch.bool)
                keep[key][units] = True
        layers = {
            layer for (layer, kind), mask in keep.items() if kind == LAYERS and not mask.any()
        }
        return Cut({key: mask for key, mask in keep.items() if _says_something(key, keep, layers)})


def _name(key: AxisKey) -> str:
    return f"{key[0]}/{key[1]}"


def _key(name: str) -> AxisKey:
    layer, kind = name.split("/")
    return int(layer), kind


def _own(before: Anatomy, edit: Cut, key: AxisKey, keep_U: Tensor) -> Tensor:
    """The mask of query heads, without those whose KV group goes in the same cut."""
    layer, kind = key
    if kind != QUERY_HEADS or (layer, KV_GROUPS) not in edit.keep:
        return keep_U
    groups = edit.keep[layer, KV_GROUPS].cpu()
    return keep_U & groups.repeat_interleave(len(keep_U) // len(groups))


def _says_something(key: AxisKey, keep: dict[AxisKey, Tensor], gone: set[int]) -> bool:
    """Whether a mask says more than that its layer or its sublayer is gone."""
    layer, kind = key
    if layer in gone:
        return kind == LAYERS
    sublayer = next((whole for whole, inside in _INSIDE.items() if kind in inside), kind)
    skipped = (layer, sublayer) in keep and not keep[layer, sublayer].any()
    return kind == sublayer or not skipped
