"""Scores of units: axis and statistics in, (U,) float32 out, higher = keep.

A score estimates how much worse the model gets when the unit is removed. Scores change nothing.
To add one, write a function and a row in `IMPORTANCES`; in another package, an `Importance` as an
entry point of the group `adapt_pruner.importances`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.axes import KV_GROUPS, NEURONS, Axis, Slot
from ..precision import in_float64
from ..registry import Registry
from .collect import Statistics
from .gram import factorise
from .observers import Fisher, Gram, Observer, UnitGradients, WeightGradients


def taylor(axis: Axis, statistics: Statistics, seed: int = 0) -> Tensor:
    """Sum over the unit's weights of |w * dL/dw| (Adapt-Pruner eq. 10; LLM-Pruner `first`)."""
    return _sum_over_slots(axis, lambda slot: (_weight(slot) * _gradient(slot)).abs())


def taylor_vector(axis: Axis, statistics: Statistics, seed: int = 0) -> Tensor:
    """Sum over the unit's rows and columns of |sum of w * dL/dw| (LLM-Pruner `vectorize`)."""
    return _sum_over_vectors(axis, lambda slot: _weight(slot) * _gradient(slot))


def taylor_second(axis: Axis, statistics: Statistics, seed: int = 0) -> Tensor:
    """Sum over the unit's weights of w^2 * F, F the Fisher diagonal (LLM-Pruner `second`)."""
    return _sum_over_slots(
        axis, lambda slot: _weight(slot).square() * statistics[Fisher].squared[slot.tensor]
    )


def taylor_mixed(axis: Axis, statistics: Statistics, seed: int = 0) -> Tensor:
    """Sum over the unit's weights of |w * dL/dw - w^2 * F / 2| (LLM-Pruner `mix`)."""
    return _sum_over_slots(axis, lambda slot: _two_terms(slot, statistics).abs())


def taylor_vector_mixed(axis: Axis, statistics: Statistics, seed: int = 0) -> Tensor:
    """Sum over the unit's rows and columns of |sum of w * dL/dw - w^2 * F / 2|."""
    return _sum_over_vectors(axis, lambda slot: _two_terms(slot, statistics))


def magnitude_l1(axis: Axis, statistics: Statistics, seed: int = 0) -> Tensor:
    """Sum over the unit's weights of |w|."""
    return _sum_over_slots(axis, lambda slot: _weight(slot).abs())


def magnitude_l2(axis: Axis, statistics: Statistics, seed: int = 0) -> Tensor:
    """Square root of the sum over the unit's weights of w^2."""
    return _sum_over_slots(axis, lambda slot: _weight(slot).square()).sqrt()


def activation_gradient(axis: Axis, statistics: Statistics, seed: int = 0) -> Tensor:
    """Mean over windows of |sum over tokens of a * dL/da|, a the unit's activation.

    The first-order change of a window's loss when the unit is gated off.
    """
    return statistics[UnitGradients].absolute[axis.key]


def activation_fisher(axis: Axis, statistics: Statistics, seed: int = 0) -> Tensor:
    """Mean over windows of (sum over tokens of a * dL/da)^2: the Fisher information of a gate on
    the unit, hence second order in the loss."""
    return statistics[UnitGradients].squared[axis.key]


MASSIVE = 32
"""Times the mean energy of a projection's inputs; no more than one unit in 32 can have it."""


def residual_fisher(axis: Axis, statistics: Statistics, seed: int = 0) -> Tensor:
    """`activation_fisher` times the share of the unit's activation that the projection's other
    units cannot reproduce linearly: what is lost although the others are refitted. Axes that
    are not columns of one projection (hidden dimensions, layers) cannot be reproduced.

    With H = X^T X + ridge, as in the refit, that share is 1 / (H_jj (H^-1)_jj) for a unit of one
    column; for one of several it is the trace of the Schur complement ((H^-1)_jj)^-1 over the trace
    of H_jj.

    Gradients do not see a massive activation (arXiv:2402.17762): all later layers read it
    through a norm, which makes as much of half of it, so that a gate on its unit seems to do
    nothing. A unit with `MASSIVE` times the mean energy is as dear as its whole axis.
    """
    if axis.output is None:
        return activation_fisher(axis, statistics)
    inverse = statistics[Gram].inverse(axis.projection)
    shape = axis.output.index_UK.shape
    total_U = inverse.diagonal_C.view(shape).sum(dim=1)
    if shape[1] == 1:
        residual_U = 1 / inverse.matrix_CC.diagonal()
    else:
        blocks_KKU = inverse.matrix_CC.view(shape + shape).diagonal(dim1=0, dim2=2)
        residual_U = torch.stack([_trace_of_inverse(block_KK) for block_KK in blocks_KKU.unbind(2)])
    share_U = (residual_U / total_U.to(residual_U.device)).float()
    score_U = activation_fisher(axis, statistics) * share_U.to(total_U.device)
    energy_U = total_U / shape[1] - statistics[Gram].ridge  # relative to the mean of the columns
    return score_U + score_U.sum() * (energy_U > MASSIVE).to(score_U)


def _trace_of_inverse(block_KK: Tensor) -> Tensor:
    """Of a positive definite matrix."""
    factor_KK = factorise(in_float64(block_KK).clone())
    return torch.cholesky_inverse(factor_KK).diagonal().sum()


def random(axis: Axis, statistics: Statistics, seed: int = 0) -> Tensor:
    """Uniform random numbers, the same for the same seed, layer and kind of axis."""
    salt = {KV_GROUPS: 1, NEURONS: 0}.get(axis.kind, sum(axis.kind.encode()))
    own_seed = (seed * 10_007 + axis.layer) * 2 + salt
    generator = torch.Generator().manual_seed(own_seed)
    return torch.rand(axis.num_units, generator=generator).to(axis.device)


@dataclass(frozen=True)
class Importance:
    """A scoring function and the statistics that it reads."""

    score: Callable[..., Tensor]
    needs: tuple[type[Observer], ...] = ()


IMPORTANCES: Registry[Importance] = Registry(
    "importances",
    {
        "taylor": Importance(taylor, (WeightGradients,)),
        "taylor-vector": Importance(taylor_vector, (WeightGradients,)),
        "taylor-second": Importance(taylor_second, (Fisher,)),
        "taylor-mixed": Importance(taylor_mixed, (Fisher,)),
        "taylor-vector-mixed": Importance(taylor_vector_mixed, (Fisher,)),
        "activation-gradient": Importance(activation_gradient, (UnitGradients,)),
        "activation-fisher": Importance(activation_fisher, (UnitGradients,)),
        "residual-fisher": Importance(residual_fisher, (UnitGradients, Gram)),
        "magnitude-l1": Importance(magnitude_l1),
        "magnitude-l2": Importance(magnitude_l2),
        "random": Importance(random),
    },
)


def _matrices(axis: Axis) -> list[Slot]:
    return [slot for slot in axis.slots if slot.tensor.dim() == 2]


def _sum_over_slots(axis: Axis, score: Callable[[Slot], Tensor]) -> Tensor:
    score_U = torch.zeros(axis.num_units, device=axis.device)
    for slot in _matrices(axis):
        score_U += slot.per_unit(score(slot)).to(score_U)
    return score_U


def _sum_over_vectors(axis: Axis, term: Callable[[Slot], Tensor]) -> Tensor:
    """Sum the terms of each row or column of a unit, and the absolute values of these sums."""
    score_U = torch.zeros(axis.num_units, device=axis.device)
    for slot in _matrices(axis):
        along = term(slot).sum(dim=1 - slot.dim).abs()
        score_U += along[slot.index_UK.to(along.device)].sum(dim=1).to(score_U)
    return score_U


def _two_terms(slot: Slot, statistics: Statistics) -> Tensor:
    first = _weight(slot) * _gradient(slot)
    return first - _weight(slot).square() * statistics[Fisher].squared[slot.tensor] / 2


def _weight(slot: Slot) -> Tensor:
    return slot.tensor.detach().float()


def _gradient(slot: Slot) -> Tensor:
    gradient = slot.tensor.grad
    assert gradient is not None, f"{slot.path} has no gradient: score inside `collect(...)`"
    return gradient.float()
