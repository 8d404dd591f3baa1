"""Which units leave first, and what is left of parameters, or of bytes, when they do.

Units leave an axis in a fixed order, least important first. A `Chain` is such an order, cut into
blocks that leave together: one unit, or as many as a width multiple asks for, or one of every layer
for a uniform layout, or one query head of every KV group. Sizes that cost no less than a larger one
are left out: 33 neurons take the bytes of 64 where a file has blocks of 32. All rules decide only
how many blocks of each chain go; `Removal` keeps the account of that, exact for any mix of axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidTarget
from ..model.anatomy import Anatomy
from ..model.axes import (
    HIDDEN,
    KV_GROUPS,
    LAYERS,
    NEURONS,
    QUERY_HEADS,
    Axis,
    AxisKey,
    heads_fit,
)
from ..precision import in_float64

Scores = Mapping[AxisKey, Tensor]


@dataclass(frozen=True)
class Limits:
    """What may be cut."""

    kinds: frozenset[str] = frozenset({KV_GROUPS, NEURONS})
    """Kinds of axes."""
    protected_layers: frozenset[int] = frozenset()
    multiple: int = 1
    """MLP widths and the hidden size stay multiples of this."""
    uniform: bool = False
    """All layers keep equal widths."""

    def axes(self, anatomy: Anatomy) -> list[Axis]:
        """The axes that may be cut."""
        allowed = anatomy.of_kinds(self.kinds)
        return [axis for axis in allowed if axis.layer not in self.protected_layers]


@dataclass
class Chain:
    """Blocks of units in the order in which they leave, of one axis or of one kind in all layers.

    Block b takes `sizes[b]` units from every stratum of every member.
    """

    members: list[Axis]
    width: int
    """Size of one member before anything leaves."""
    sizes: Tensor
    """(blocks,) int64"""
    density: Tensor
    """(blocks,) float64, importance per parameter, or what else targets limit; ascending."""
    removed: int = 0

    @property
    def keys(self) -> list[AxisKey]:
        return [axis.key for axis in self.members]

    @property
    def num_units_removed(self) -> int:
        """Of every stratum of every member."""
        return int(self.sizes[: self.removed].sum())

    def remove_whole(self, entries: int) -> None:
        """Remove the blocks that fit whole into what goes: at least `entries` stay, in units of the
        axis's grain."""
        left = self.width - torch.cumsum(self.sizes, dim=0)
        self.removed = int((left * self.members[0].grain >= entries).sum())


class Removal:
    """What all chains give up together, and the amount that is left of what targets limit."""

    def __init__(self, anatomy: Anatomy, chains: Sequence[Chain]):
        self.anatomy, self.chains = anatomy, list(chains)

    @property
    def sizes(self) -> dict[AxisKey, int]:
        """Of every axis of the model."""
        sizes = self.anatomy.sizes
        for chain in self.chains:
            left = chain.width - chain.num_units_removed
            sizes.update(dict.fromkeys(chain.keys, left))
        return sizes

    @property
    def amount(self) -> int:
        """Parameters, unless targets limit something else."""
        return self.anatomy.cost.total(self.sizes)

    def cost(self, chain: Chain, block: int, sizes: Mapping[AxisKey, int] | None = None) -> int:
        """What comes or goes with a block that is next to leave or last to have left."""
        sizes = sizes or self.sizes
        units, left = int(chain.sizes[block]), sizes[chain.keys[0]]
        leaves = block == chain.removed
        changed = {**sizes, **dict.fromkeys(chain.keys, left - units if leaves else left + units)}
        touching = self.anatomy.cost.touching
        more = touching(chain.keys, changed) - touching(chain.keys, sizes)
        return -more if leaves else more

    def keep_masks(self, scores: Scores) -> dict[AxisKey, Tensor]:
        """(U,) bool on the CPU for every axis that loses units: False for its lowest scores."""
        masks = {}
        for chain in self.chains:
            for axis in chain.members if chain.removed else ():
                order = torch.argsort(_strata(axis, scores[axis.key].cpu()), dim=1, stable=True)
                mask = torch.ones(order.shape, dtype=torch.bool)
                mask.scatter_(1, order[:, : chain.num_units_removed], False)
                masks[axis.key] = mask.flatten()
        return masks


def _strata(axis: Axis, values_U: Tensor) -> Tensor:
    """(strata, size)"""
    return values_U.view(axis.strata, axis.size)


def build_chains(anatomy: Anatomy, scores: Scores, limits: Limits) -> list[Chain]:
    """Order the units of every axis that may be cut. One unit, or multiple, of each width stays,
    and the layer that scores highest, whatever else goes."""
    axes = _without_last_layer(limits.axes(anatomy), scores)
    if not limits.uniform:
        return [_chain([axis], scores, limits, anatomy) for axis in axes]
    by_kind: dict[str, list[Axis]] = {}
    for axis in axes:
        by_kind.setdefault(axis.kind, []).append(axis)
    chains = []
    for kind, members in sorted(by_kind.items()):
        widths = {axis.size for axis in members}
        if len(widths) > 1:
            raise InvalidTarget(
                f"A uniform layout needs layers of equal {kind} to start from; "
                f"got {sorted(widths)}. Use --layout per-layer."
            )
        groups = [[axis] for axis in members] if kind == LAYERS else [members]
        chains += [_chain(group, scores, limits, anatomy) for group in groups]
    return chains


def units_alike(axes: Sequence[Axis], scores: Scores) -> dict[AxisKey, Tensor]:
    """Scores times a unit's parameters: with them, rules that compare importance per parameter
    compare units, whatever they cost, as several published methods do."""
    return {axis.key: in_float64(scores[axis.key]) * axis.unit_cost for axis in axes}


def _without_last_layer(axes: list[Axis], scores: Scores) -> list[Axis]:
    """Leave out the parts of one layer, so that a model of some layer that attends remains."""
    present = [axis for axis in axes if axis.is_presence]
    if not present:
        return axes
    layers = [axis for axis in present if axis.kind == LAYERS] or present
    best = max(layers, key=lambda axis: float(scores[axis.key].sum())).layer
    return [axis for axis in axes if not (axis.is_presence and axis.layer == best)]


def _chain(members: list[Axis], scores: Scores, limits: Limits, anatomy: Anatomy) -> Chain:
    axis = members[0]
    sizes, costs = _worthwhile(members, _block_sizes(axis, limits, anatomy), anatomy)
    sums = [_strata(m, scores[m.key].cpu().double()).sort(dim=1).values.sum(dim=0) for m in members]
    ascending = torch.stack(sums).sum(dim=0)
    ends = torch.cumsum(sizes, dim=0)
    running = torch.cat([torch.zeros(1, dtype=torch.float64), ascending.cumsum(0)])
    importance = running[ends] - running[ends - sizes]
    return Chain(members, axis.size, sizes, _ascending(importance, costs))


def _worthwhile(members: list[Axis], sizes: Tensor, anatomy: Anatomy) -> tuple[Tensor, Tensor]:
    """Join blocks until each saves something, and leave out those at the end that never do.

    Returns their sizes and what each saves, while other axes stay whole.
    """
    keys = [axis.key for axis in members]
    widths = members[0].size - torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    tried = {**anatomy.sizes, **dict.fromkeys(keys, widths)}
    costs = torch.as_tensor(anatomy.cost.touching(keys, tried)).expand(len(widths))
    cheapest = torch.cummin(costs, dim=0).values
    saves = torch.cat([torch.ones(1, dtype=torch.bool), cheapest[1:] < cheapest[:-1]])
    return -widths[saves].diff(), -costs[saves].diff()


def _ascending(importance: Tensor, costs: Tensor) -> Tensor:
    """Importance per cost of each block; where a later block has less than an earlier one, both
    have that of the two together, so that they leave together.

    An MLP of 256 neurons in blocks of 256 values a row may take no more bytes than one of 224 in
    blocks of 32: to lose the first 32 neurons then buys nothing, and to lose all of them much.
    """
    density = importance / costs
    if (density.diff() >= 0).all():
        return density
    pools: list[tuple[float, int, int]] = []  # importance, cost, blocks
    for value, cost in zip(importance.tolist(), costs.tolist(), strict=True):
        count = 1
        while pools and pools[-1][0] * cost > value * pools[-1][1]:
            before = pools.pop()
            value, cost, count = value + before[0], cost + before[1], count + before[2]
        pools.append((value, cost, count))
    density = torch.tensor([value / cost for value, cost, _ in pools], dtype=torch.float64)
    counts = torch.tensor([count for *_, count in pools])
    return torch.cummax(density.repeat_interleave(counts), dim=0).values  # rounding reorders none


def _block_sizes(axis: Axis, limits: Limits, anatomy: Anatomy) -> Tensor:
    """Units of each block, in the order in which blocks leave."""
    if axis.is_presence:
        return torch.ones(1, dtype=torch.int64)
    if limits.uniform and axis.kind in (KV_GROUPS, QUERY_HEADS):
        widths = _uniform_widths(axis, limits, anatomy)
        return -torch.tensor(widths, dtype=torch.int64).diff()
    multiple = limits.multiple if axis.kind in (NEURONS, HIDDEN) else 1
    if limits.uniform and axis.kind == HIDDEN:
        multiple = math.lcm(multiple, *_head_counts(anatomy))
    width = axis.size
    # The first block brings an odd width down to a multiple; the last multiple stays.
    odd = [width % multiple] if width > multiple and width % multiple else []
    return torch.tensor(odd + [multiple] * max(width // multiple - 1, 0), dtype=torch.int64)


def _head_counts(anatomy: Anatomy) -> set[int]:
    counts = {widths.get("num_attention_heads", 0) for widths in anatomy.widths}
    return {count for count in counts if heads_fit(anatomy.hidden_size, count)}


def _uniform_widths(axis: Axis, limits: Limits, anatomy: Anatomy) -> list[int]:
    """Sizes that all layers may have alike, from the present one down: head counts of the whole
    model have to divide the hidden size."""
    widths = range(axis.size - 1, 0, -1)
    if limits.kinds.intersection({KV_GROUPS, QUERY_HEADS, HIDDEN}) == {axis.kind}:
        heads = anatomy.widths[axis.layer]["num_attention_heads"] // axis.size
        fitting = [width for width in widths if heads_fit(anatomy.hidden_size, width * heads)]
    else:
        fitting = [width for width in widths if axis.size % width == 0]
    return [axis.size, *fitting]
