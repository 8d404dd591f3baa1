"""What is asked for, and whether it can be reached."""

from __future__ import annotations

import math

import torch

from ..errors import InvalidTarget
from ..model.anatomy import Anatomy
from ..model.resources import PARAMETERS
from .chains import Limits, Removal, build_chains


def resolve_target(anatomy: Anatomy, sparsity: float | None, most: int | None) -> int:
    """Return the most that the whole model may have of what targets limit.

    Exactly one of the two is given: `sparsity`, the fraction of the decoder layers' parameters to
    remove, in [0, 1); or `most` itself: parameters of the whole model with embeddings, unless the
    anatomy's resource is another.

    Raises:
        InvalidTarget: if the target is missing, doubled, malformed or above the present size.
    """
    if (sparsity is None) == (most is None):
        raise InvalidTarget("Give the target once: --sparsity 0.2, or --params 350M.")
    if sparsity is not None:
        if not 0 <= sparsity < 1:
            hint = f" Did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
            raise InvalidTarget(
                "sparsity is the share of the decoder layers' parameters to remove, in [0, 1); "
                f"got {sparsity:g}.{hint}"
            )
        return anatomy.total_parameters - math.ceil(sparsity * anatomy.layer_parameters - 1e-6)
    assert most is not None
    if most > anatomy.amount:
        raise InvalidTarget(
            f"The target of {anatomy.resource.written(most)} is above the model's "
            f"{anatomy.amount:,}. Name a smaller one."
        )
    return most


def smallest_size(anatomy: Anatomy, limits: Limits) -> int:
    """What is left of the whole model with everything cut that may be cut."""
    # The layer that has to stay is the one that scores highest: here the largest.
    scores = {axis.key: torch.full((axis.num_units,), float(axis.unit_cost)) for axis in
              limits.axes(anatomy)}  # fmt: skip
    removal = Removal(anatomy, build_chains(anatomy, scores, limits))
    for chain in removal.chains:
        chain.removed = len(chain.sizes)
    return removal.amount


def check_reachable(anatomy: Anatomy, target: int, limits: Limits, added: int = 0) -> None:
    """Raise InvalidTarget if cutting all that may be cut does not reach `target`.

    Args:
        added: parameters that the method gives the model besides, such as biases.
    """
    smallest = smallest_size(anatomy, limits) + added
    if target < smallest:
        outside = anatomy.cost.outside
        sparsity = (anatomy.amount - smallest) / max(anatomy.amount - outside, 1)
        share = f" (sparsity {sparsity:.4f})" if anatomy.resource is PARAMETERS else ""
        raise InvalidTarget(
            f"The target of {anatomy.resource.written(target)} is below what is possible: with "
            f"everything cut that may be, the model has {anatomy.resource.written(smallest)}"
            f"{share}, of which {outside:,} are outside the decoder layers. Name a milder target, "
            "or allow more to be cut with --cut."
        )
