"""How many units each group gives up, in exact parameter arithmetic.

Units leave a group in a fixed order, least important first. A `Chain` is such an order, cut into
blocks that leave together: one unit, or as many as a width multiple asks for, or one of every layer
for a uniform layout. Every rule here decides only how many blocks of each chain go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidTarget
from ..model.anatomy import ATTENTION, Anatomy, Group

GroupKey = tuple[int, str]


@dataclass(frozen=True)
class Limits:
    """What may be cut."""

    kinds: frozenset[str] = frozenset({"attention", "mlp"})
    protected_layers: frozenset[int] = frozenset()
    multiple: int = 1
    """MLP widths stay multiples of this."""
    uniform: bool = False
    """All layers keep equal widths."""

    def allows(self, group: Group) -> bool:
        return group.kind in self.kinds and group.layer not in self.protected_layers

    def multiple_of(self, group: Group) -> int:
        return 1 if group.kind == ATTENTION else self.multiple


@dataclass
class Chain:
    """Blocks of units in the order in which they leave, of one group or of one kind in all layers.

    Block b takes `sizes[b]` units from every member group.
    """

    members: list[GroupKey]
    width: int
    """Units of one member before anything leaves."""
    unit_cost: int
    """Parameters of one unit, summed over the members."""
    sizes: Tensor
    """(blocks,) int64"""
    density: Tensor
    """(blocks,) float64, importance per parameter, ascending."""
    removed: int = 0

    @property
    def num_units_removed(self) -> int:
        return int(self.sizes[: self.removed].sum())

    def cost(self, block: int) -> int:
        return int(self.sizes[block]) * self.unit_cost

    def remove_down_to(self, width: int) -> None:
        """Remove the fewest blocks that leave at most `width` units, or all that may go."""
        left = self.width - torch.cumsum(self.sizes, dim=0)
        needed = int((left > width).sum()) + 1 if self.width > width else 0
        self.removed = min(needed, len(self.sizes))


def build_chains(
    groups: Sequence[Group], scores: dict[GroupKey, Tensor], limits: Limits
) -> list[Chain]:
    """Order the units of every group that may be cut. Each group keeps at least one KV group, or
    one multiple of neurons."""
    allowed = [group for group in groups if limits.allows(group)]
    if not limits.uniform:
        return [_chain([group], scores, limits) for group in allowed]
    by_kind = {kind: [g for g in allowed if g.kind == kind] for kind in sorted(limits.kinds)}
    for kind, members in by_kind.items():
        widths = {group.num_units for group in members}
        if len(widths) > 1:
            raise InvalidTarget(
                f"A uniform layout needs layers of equal {kind} width to start from; "
                f"got widths {sorted(widths)}. Use --layout per-layer."
            )
    return [_chain(members, scores, limits) for members in by_kind.values() if members]


def _chain(members: list[Group], scores: dict[GroupKey, Tensor], limits: Limits) -> Chain:
    width, multiple = members[0].num_units, limits.multiple_of(members[0])
    # The first block brings an odd width down to a multiple; the last multiple stays.
    odd = [width % multiple] if width > multiple and width % multiple else []
    sizes = torch.tensor(odd + [multiple] * max(width // multiple - 1, 0), dtype=torch.int64)
    if limits.uniform and members[0].kind == ATTENTION:
        sizes = -torch.tensor(members[0].uniform_widths, dtype=torch.int64).diff()
    unit_cost = sum(group.unit_cost for group in members)
    ascending_U = torch.stack([scores[g.key].double().cpu().sort().values for g in members]).sum(0)
    ends = torch.cumsum(sizes, dim=0)
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), ascending_U.cumsum(0)])
    density = (sums[ends] - sums[ends - sizes]) / (sizes * unit_cost)
    if len(density):
        density = torch.cummax(density, dim=0).values  # rounding must not reorder blocks
    return Chain([group.key for group in members], width, unit_cost, sizes, density)


def removed_parameters(chains: Sequence[Chain]) -> int:
    """Parameters in the blocks that the chains have given up."""
    return sum(chain.num_units_removed * chain.unit_cost for chain in chains)


def removable_parameters(chains: Sequence[Chain]) -> int:
    """Parameters in all blocks that the chains could give up."""
    return sum(int(chain.sizes.sum()) * chain.unit_cost for chain in chains)


def remove_ranked(chains: Sequence[Chain], needed: int) -> None:
    """Remove blocks of lowest importance per parameter, whatever their layer and kind, until at
    least `needed` parameters are gone in all; then give back what was too much (`tighten`)."""
    removed = removed_parameters(chains)
    if removed < needed:
        ids = torch.cat([torch.full((len(c.sizes) - c.removed,), i) for i, c in enumerate(chains)])
        density = torch.cat([chain.density[chain.removed :] for chain in chains])
        costs = torch.cat([chain.sizes[chain.removed :] * chain.unit_cost for chain in chains])
        order = torch.argsort(density, stable=True)
        total = removed + torch.cumsum(costs[order], dim=0)
        if not len(total) or int(total[-1]) < needed:
            raise InvalidTarget(f"Only {int(costs.sum()) + removed:,} parameters can be removed.")
        count = int((total < needed).sum()) + 1
        for i, extra in enumerate(torch.bincount(ids[order[:count]], minlength=len(chains))):
            chains[i].removed += int(extra)
    tighten(chains, needed)


def tighten(chains: Sequence[Chain], needed: int) -> None:
    """Give back the most important blocks that were removed beyond `needed`.

    Afterwards fewer parameters too many are gone than one block has: one unit, or one multiple.
    """
    surplus = removed_parameters(chains) - max(needed, 0)
    while True:
        fitting = [c for c in chains if c.removed and c.cost(c.removed - 1) <= surplus]
        if not fitting:
            break
        best = max(fitting, key=lambda c: float(c.density[c.removed - 1]))
        best.removed -= 1
        surplus -= best.cost(best.removed)
    if surplus:
        _exchange_coarse_block(chains, surplus)


def _exchange_coarse_block(chains: Sequence[Chain], surplus: int) -> None:
    """Where only coarse blocks (KV groups) went and the surplus is more than a finer one, give one
    of them back for finer ones, if that leaves less surplus."""
    finer = [c for c in chains if c.removed < len(c.sizes) and c.cost(c.removed) <= surplus]
    coarse = [c for c in chains if c.removed]
    if not finer or not coarse:
        return
    before = [chain.removed for chain in chains]
    returned = max(coarse, key=lambda c: float(c.density[c.removed - 1]))
    returned.removed -= 1
    left = surplus - returned.cost(returned.removed)
    while left < 0 and (open_ := [c for c in finer if c.removed < len(c.sizes)]):
        cheapest = min(open_, key=lambda c: float(c.density[c.removed]))
        left += cheapest.cost(cheapest.removed)
        cheapest.removed += 1
    if not 0 <= left < surplus:
        for chain, removed in zip(chains, before, strict=True):
            chain.removed = removed


def keep_masks(chains: Sequence[Chain], scores: dict[GroupKey, Tensor]) -> dict[GroupKey, Tensor]:
    """(U,) bool on the CPU for every group that loses units: False for its lowest scores."""
    masks = {}
    for chain in chains:
        if chain.removed:
            for key in chain.members:
                order_U = torch.argsort(scores[key].cpu(), stable=True)
                mask_U = torch.ones(chain.width, dtype=torch.bool)
                mask_U[order_U[: chain.num_units_removed]] = False
                masks[key] = mask_U
    return masks


def sizes_after_steps(anatomy: Anatomy, target: int, steps: int) -> list[int]:
    """Parameters of the whole model after each step: every step leaves the decoder layers the same
    share of what they had, and the last one meets `target`.

    With 400 parameters, all of them in decoder layers, 100 are reached in two steps by 200, 100.
    """
    start, other = anatomy.layer_parameters, anatomy.other_parameters
    share = (target - other) / start
    return [other + round(start * share ** (i / steps)) for i in range(1, steps)] + [target]


class AdaptiveSchedule:
    """Sparsity per layer, raised step by step (Adapt-Pruner, eq. 6 and algorithm 1).

    Each step adds 1 / steps to the sparsity of every layer, minus amplitude * layer importance; so
    less important layers lose more. Sparsities refer to the original widths, and attention and MLP
    of a layer share theirs. The step that would pass the target is shortened to meet it.
    """

    def __init__(self, anatomy: Anatomy, steps: int, amplitude: float):
        self.increment, self.amplitude = 1 / steps, amplitude
        self.sparsity = [0.0] * len(anatomy.layers)
        self.original_widths = {group.key: group.num_units for group in anatomy.groups}
        self.steps_left = 10 * steps

    def advance(
        self, chains: Sequence[Chain], needed: int, importance: Sequence[float], uniform: bool
    ) -> bool:
        """Set what the chains remove in this step. Returns whether `needed` is met, exactly."""
        start = self.sparsity
        end = [
            min(max(s + self.increment - self.amplitude * value, 0.0), 0.99)
            for s, value in zip(start, importance, strict=True)
        ]
        if uniform:
            end = [math.fsum(end) / len(end)] * len(end)
        self.steps_left -= 1
        self._apply(chains, end)
        self.sparsity = end
        if removed_parameters(chains) < needed:
            if self.steps_left > 0 and end != start and any(s < 0.99 for s in end):
                return False
            remove_ranked(chains, needed)  # every layer is as sparse as the rule can make it
            return True
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            self._apply(chains, _between(start, end, middle))
            low, high = (middle, high) if removed_parameters(chains) < needed else (low, middle)
        self.sparsity = _between(start, end, high)
        self._apply(chains, self.sparsity)
        tighten(chains, needed)
        return True

    def _apply(self, chains: Sequence[Chain], sparsity: Sequence[float]) -> None:
        for chain in chains:
            layer, _ = key = chain.members[0]
            width = self.original_widths[key] * (1 - sparsity[layer])
            chain.remove_down_to(math.floor(width + 1e-9))


def _between(start: Sequence[float], end: Sequence[float], t: float) -> list[float]:
    return [a + t * (b - a) for a, b in zip(start, end, strict=True)]


def resolve_target(anatomy: Anatomy, sparsity: float | None, params: int | None) -> int:
    """Return the largest parameter count allowed for the whole model.

    Exactly one of the two is given: `sparsity`, the fraction of the decoder layers' parameters to
    remove, in [0, 1); or `params`, of the whole model with embeddings.

    Raises:
        InvalidTarget: if the target is missing, doubled, malformed or above the present size.
    """
    if (sparsity is None) == (params is None):
        raise InvalidTarget("Give the target once: --sparsity 0.2, or --params 350M.")
    if sparsity is not None:
        if not 0 <= sparsity < 1:
            hint = f" Did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
            raise InvalidTarget(
                "sparsity is the share of the decoder layers' parameters to remove, in [0, 1); "
                f"got {sparsity:g}.{hint}"
            )
        return anatomy.total_parameters - math.ceil(sparsity * anatomy.layer_parameters - 1e-6)
    assert params is not None
    if params > anatomy.total_parameters:
        raise InvalidTarget(
            f"The target of {params:,} parameters is above the model's {anatomy.total_parameters:,}"
            ". Name a smaller one."
        )
    return params


def smallest_size(anatomy: Anatomy, limits: Limits) -> int:
    """Parameters of the whole model with every layer at its smallest width."""
    zeros = {group.key: torch.zeros(group.num_units) for group in anatomy.groups}
    chains = build_chains(anatomy.groups, zeros, limits)
    return anatomy.total_parameters - removable_parameters(chains)


def check_reachable(anatomy: Anatomy, target: int, limits: Limits) -> None:
    """Raise InvalidTarget if cutting all that may be cut does not reach `target` parameters."""
    smallest = smallest_size(anatomy, limits)
    if target < smallest:
        sparsity = (anatomy.total_parameters - smallest) / anatomy.layer_parameters
        raise InvalidTarget(
            f"The target of {target:,} parameters is below what is possible: with every layer at "
            f"its smallest width the model has {smallest:,} (sparsity {sparsity:.4f}), of which "
            f"{anatomy.other_parameters:,} are outside the decoder layers and never cut. Name a "
            "larger target, or allow more to be cut."
        )
