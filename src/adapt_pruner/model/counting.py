"""Exact arithmetic of parameters: how many a model has if its axes have given sizes.

Each tensor is a product of sides, and each side a sum of products of axis sizes. The fused
projection of a layer with n KV groups of r query heads of size h, say, has

    n * r * h  +  n * 2h    rows (queries; keys and values)
    d                       columns (hidden dimensions)

parameters, and none if the layer goes: the axes of layers and sublayers, of size 1 or 0, are
factors of all their tensors. Which entries belong to which axes, their slots say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .axes import LAYERS, Axis, AxisKey, parts_of_layers, side

Term = tuple[int, tuple[AxisKey, ...]]
"""A number of entries and the axes whose sizes it is multiplied by."""


class ParameterCount:
    """Counts the parameters of a model over the sizes of its axes. Tied tensors count once."""

    def __init__(self, model: nn.Module, axes: Sequence[Axis], outside: int = 0):
        """`outside`: parameters outside the decoder layers."""
        self.outside = outside
        self.sizes = {axis.key: axis.size for axis in axes}
        self.parts = {
            layer: [axis.key for axis in of] for layer, of in parts_of_layers(axes).items()
        }
        slots = defaultdict(lambda: defaultdict(list))
        for axis in axes:
            for slot in axis.slots:
                slots[slot.tensor][slot.dim].append((axis.key, slot.index_UK))
        self.constant = 0
        self.tensors: list[list[list[Term]]] = []
        self.sides: dict[nn.Parameter, list[list[Term]]] = {}
        self.touched_by: dict[AxisKey, list[int]] = {key: [] for key in self.sizes}
        for parameter in model.parameters():
            if parameter not in slots:
                self.constant += parameter.numel()
                continue
            sides = [
                self._terms(side(parameter, dim), slots[parameter][dim])
                for dim in range(max(parameter.dim(), 1))
            ]
            self._leave_with_sublayers(sides)
            self.sides[parameter] = sides
            for key in {key for terms in sides for _, keys in terms for key in keys}:
                self.touched_by[key].append(len(self.tensors))
            self.tensors.append(sides)

    def _terms(self, length: int, slots: list[tuple[AxisKey, Tensor]]) -> list[Term]:
        """Split the entries of a side by the set of axes that they belong to."""
        membership = torch.zeros(length, dtype=torch.int64)
        for bit, (_, index_UK) in enumerate(slots):
            membership[index_UK.flatten()] |= 1 << bit
        terms = []
        patterns, counts = membership.unique(return_counts=True)
        for pattern, entries in zip(patterns.tolist(), counts.tolist(), strict=True):
            keys = tuple(key for bit, (key, _) in enumerate(slots) if pattern >> bit & 1)
            whole = prod(self.sizes[key] for key in keys)
            assert entries % whole == 0, f"{entries} entries do not divide over {keys}"
            terms.append((entries // whole, keys))
        return terms

    def _leave_with_sublayers(self, sides: list[list[Term]]) -> None:
        """A layer that loses its attention and its MLP is dropped, and with it a norm that serves
        both (Phi, Cohere): there while either is, so attention + MLP - attention * MLP times; or as
        often as the one that an earlier cut has left."""
        keys = {key for terms in sides for _, keys in terms for key in keys}
        for layer in [key[0] for key in keys if key[1] == LAYERS]:
            parts = self.parts.get(layer, [])
            if not keys.intersection(parts):
                sides[0] = [
                    (-count * (-1) ** len(some), (*own, *some))
                    for count, own in sides[0]
                    for number in range(1, len(parts) + 1)
                    for some in combinations(parts, number)
                ] or sides[0]

    def total(self, sizes: Mapping[AxisKey, int]) -> int:
        """Parameters of the whole model; axes that `sizes` does not name stay as they are."""
        sizes = {**self.sizes, **sizes}
        return self.constant + sum(_numel(tensor, sizes) for tensor in self.tensors)

    def shape(self, parameter: nn.Parameter, sizes: Mapping[AxisKey, Any]) -> list[Any]:
        """Lengths of the sides of a tensor; its presence is a factor of the first one."""
        if parameter in self.sides:
            return _shape(self.sides[parameter], sizes)
        return list(parameter.shape)

    def touching(self, keys: Sequence[AxisKey], sizes: Mapping[AxisKey, Any]) -> Any:
        """Parameters of the tensors in which any of the axes has a slot. `sizes` names all axes;
        a tensor of sizes among them gives one of counts."""
        indices = {index for key in keys for index in self.touched_by[key]}
        return sum(_numel(self.tensors[index], sizes) for index in indices)


def _numel(tensor: list[list[Term]], sizes: Mapping[AxisKey, Any]) -> Any:
    return prod(_shape(tensor, sizes))


def _shape(tensor: list[list[Term]], sizes: Mapping[AxisKey, Any]) -> list[Any]:
    return [
        sum(count * prod(sizes[key] for key in keys) for count, keys in terms) for terms in tensor
    ]
