"""A model of axes and costs alone, for the arithmetic of targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adapt_pruner.allocate.chains import Limits, Removal, build_chains
from adapt_pruner.allocate.ranking import remove_ranked
from adapt_pruner.model.resources import PARAMETERS


@dataclass
class ToyAxis:
    """As much of an axis as allocation needs. Its units cost the same whatever else goes."""

    layer: int
    kind: str
    num_units: int
    unit_cost: int
    strata: int = 1
    is_presence: bool = False
    grain: int = 1

    @property
    def key(self):
        return self.layer, self.kind

    @property
    def size(self):
        return self.num_units


@dataclass
class ToyAnatomy:
    axes: list[ToyAxis]
    total_parameters: int = 0
    layer_parameters: int = 0
    hidden_size: int = 840  # every number of heads up to 8 divides it

    def __post_init__(self):
        everything = sum(axis.num_units * axis.unit_cost for axis in self.axes)
        self.total_parameters = self.total_parameters or everything
        self.layer_parameters = self.layer_parameters or everything

    @property
    def layers(self):
        return range(1 + max(axis.layer for axis in self.axes))

    @property
    def other_parameters(self):
        return self.total_parameters - self.layer_parameters

    @property
    def sizes(self):
        return {axis.key: axis.size for axis in self.axes}

    @property
    def widths(self):
        """As many query heads as KV groups."""
        return [{"num_attention_heads": self.sizes.get((i, "kv-groups"), 0)} for i in self.layers]

    resource = PARAMETERS

    @property
    def cost(self):
        return self

    @property
    def amount(self):
        return self.total_parameters

    @property
    def outside(self):
        return self.other_parameters

    def of_kinds(self, kinds):
        return [axis for axis in self.axes if axis.kind in kinds]

    def total(self, sizes):
        gone = sum((axis.size - sizes[axis.key]) * axis.unit_cost for axis in self.axes)
        return self.total_parameters - gone

    def touching(self, keys, sizes):
        return sum(sizes[axis.key] * axis.unit_cost for axis in self.axes if axis.key in keys)


def mlp(layer, width, cost=1):
    return ToyAxis(layer, "neurons", width, cost)


def attention(layer, width, cost=10):
    return ToyAxis(layer, "kv-groups", width, cost)


def chains_of(*axes_and_scores, **limits):
    axes = [axis for axis, _ in axes_and_scores]
    scores = {axis.key: torch.tensor(s, dtype=torch.float32) for axis, s in axes_and_scores}
    return removal_of(axes, scores, Limits(**limits)), scores


def removal_of(axes, scores, limits):
    anatomy = ToyAnatomy(axes)
    return Removal(anatomy, build_chains(anatomy, scores, limits))


def removed(removal):
    return removal.anatomy.total_parameters - removal.amount


def left_without(removal, needed):
    """The target that asks for `needed` parameters to go."""
    return removal.anatomy.total_parameters - needed


def remove(removal, needed):
    remove_ranked(removal, left_without(removal, needed))


def unit_cost(chain):
    return sum(axis.unit_cost for axis in chain.members)


def widths_left(removal):
    return [chain.width - chain.num_units_removed for chain in removal.chains]
