"""One ranking of all chains: what goes until a target is met, and what is given back."""

from __future__ import annotations

import torch

from ..errors import InvalidTarget
from .chains import Chain, Removal


def remove_ranked(removal: Removal, target: int) -> None:
    """Remove blocks of lowest importance per parameter, or what else the target limits, whatever
    their axis, until at most `target` is left; then give back what was too much (`tighten`)."""
    chains = removal.chains
    if removal.amount > target:
        before = [chain.removed for chain in chains]
        ids = torch.cat([torch.full((len(c.sizes) - c.removed,), i) for i, c in enumerate(chains)])
        density = torch.cat([chain.density[chain.removed :] for chain in chains])
        ids = ids[torch.argsort(density, stable=True)]

        def remove(count: int) -> int:
            extra = torch.bincount(ids[:count], minlength=len(chains)).tolist()
            for chain, start, more in zip(chains, before, extra, strict=True):
                chain.removed = start + more
            return removal.amount

        if remove(len(ids)) > target:
            written = removal.anatomy.resource.written(removal.amount)
            raise InvalidTarget(f"At least {written} stay.")
        low, high = 0, len(ids)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if remove(middle) > target else (low, middle)
        remove(high)
    tighten(removal, target)


def tighten(removal: Removal, target: int) -> None:
    """Give back the most important blocks that were removed beyond `target`.

    Afterwards the surplus is smaller than one block: one unit, or one multiple.
    """
    surplus = target - removal.amount
    while True:
        sizes = removal.sizes
        fitting = [
            chain
            for chain in removal.chains
            if chain.removed and removal.cost(chain, chain.removed - 1, sizes) <= surplus
        ]
        if not fitting:
            break
        best = max(fitting, key=lambda chain: float(chain.density[chain.removed - 1]))
        surplus -= removal.cost(best, best.removed - 1, sizes)
        best.removed -= 1
    while surplus and _exchange_coarse_block(removal, target):
        surplus = target - removal.amount


def _exchange_coarse_block(removal: Removal, target: int) -> bool:
    """Where a coarse block (a KV group, a layer) went and the surplus is more than a finer one,
    give it back for finer ones, if that leaves less surplus. Returns whether it did."""
    chains, surplus = removal.chains, target - removal.amount
    if not _open_blocks(removal, surplus):
        return False
    before = [chain.removed for chain in chains]
    gone = [chain for chain in chains if chain.removed]
    for returned in sorted(gone, key=lambda chain: -float(chain.density[chain.removed - 1])):
        back = removal.cost(returned, returned.removed - 1)
        for most in (surplus, back - 1):  # where the finest alone do not make up for it, others too
            left = surplus - back
            returned.removed -= 1
            while left < 0:
                finer = [c for c in _open_blocks(removal, min(most, surplus - left - 1))
                         if c is not returned]  # fmt: skip
                if not finer:
                    break
                cheapest = min(finer, key=lambda chain: float(chain.density[chain.removed]))
                left += removal.cost(cheapest, cheapest.removed)
                cheapest.removed += 1
            if 0 <= left < surplus:
                return True
            for chain, removed in zip(chains, before, strict=True):
                chain.removed = removed
    return False


def _open_blocks(removal: Removal, most: int) -> list[Chain]:
    """Chains whose next block to leave has parameters, and at most so many."""
    sizes = removal.sizes
    return [
        chain
        for chain in removal.chains
        if chain.removed < len(chain.sizes)
        and 0 < removal.cost(chain, chain.removed, sizes) <= most
    ]


def hold_back(removal: Removal) -> None:
    """Give back, before a later step, the blocks that it will need to meet its target: where layers
    or sublayers may go, so many finer blocks must be left to cut as outweigh the coarsest of those.

    Otherwise a layer that goes last takes too much with it, and what an earlier step has cut cannot
    be given back for it.
    """
    while True:
        sizes, touching = removal.sizes, removal.anatomy.cost.touching
        costs = [
            removal.cost(chain, min(chain.removed, len(chain.sizes) - 1), sizes)
            if len(chain.sizes) else 0
            for chain in removal.chains
        ]  # fmt: skip
        coarsest = max(
            (cost for chain, cost in zip(removal.chains, costs, strict=True)
             if chain.members[0].is_presence and not chain.removed), default=0,
        )  # fmt: skip
        finer = [c for c, cost in zip(removal.chains, costs, strict=True) if 0 < cost < coarsest]
        gone = [chain for chain in finer if chain.removed]
        if not gone:
            return
        by_layer: dict[int, int] = {}
        for chain in finer:
            least = {key: chain.width - int(chain.sizes.sum()) for key in chain.keys}
            whole = touching(chain.keys, sizes)
            cuttable = whole - touching(chain.keys, {**sizes, **least})
            layer = chain.keys[0][0]
            by_layer[layer] = by_layer.get(layer, 0) + cuttable
        if sum(by_layer.values()) - max(by_layer.values()) >= coarsest:  # one may go with a layer
            return
        max(gone, key=lambda chain: float(chain.density[chain.removed - 1])).removed -= 1
