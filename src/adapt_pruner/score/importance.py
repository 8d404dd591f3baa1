"""Scores of units: group and statistics in, (U,) float32 out, higher = keep.

A score estimates how much worse the model gets when the unit is removed. Scores change nothing.
To add one, write a function and a row in `IMPORTANCES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.anatomy import ATTENTION, Group, Part
from ..precision import in_float64
from .collect import Statistics, Wants


def taylor(group: Group, statistics: Statistics, seed: int = 0) -> Tensor:
    """Sum over the unit's weights of |w * dL/dw| (Adapt-Pruner eq. 10; LLM-Pruner `first`)."""
    return _sum_over_parts(group, lambda part: (_weight(part) * _gradient(part)).abs())


def taylor_vector(group: Group, statistics: Statistics, seed: int = 0) -> Tensor:
    """Sum over the unit's rows and columns of |sum of w * dL/dw| (LLM-Pruner `vectorize`)."""
    score_U = torch.zeros(group.num_units, device=group.device)
    for part in _matrices(group):
        along = (_weight(part) * _gradient(part)).sum(dim=1 - part.dim).abs()
        score_U += along[part.index_UK.to(along.device)].sum(dim=1).to(score_U)
    return score_U


def taylor_second(group: Group, statistics: Statistics, seed: int = 0) -> Tensor:
    """Sum over the unit's weights of w^2 * F, F the Fisher diagonal (LLM-Pruner `second`)."""
    return _sum_over_parts(
        group, lambda part: _weight(part).square() * statistics.fisher[part.tensor]
    )


def taylor_mixed(group: Group, statistics: Statistics, seed: int = 0) -> Tensor:
    """Sum over the unit's weights of |w * dL/dw - w^2 * F / 2| (LLM-Pruner `mix`)."""

    def score(part: Part) -> Tensor:
        first = _weight(part) * _gradient(part)
        second = _weight(part).square() * statistics.fisher[part.tensor]
        return (first - second / 2).abs()

    return _sum_over_parts(group, score)


def magnitude_l1(group: Group, statistics: Statistics, seed: int = 0) -> Tensor:
    """Sum over the unit's weights of |w|."""
    return _sum_over_parts(group, lambda part: _weight(part).abs())


def magnitude_l2(group: Group, statistics: Statistics, seed: int = 0) -> Tensor:
    """Square root of the sum over the unit's weights of w^2."""
    return _sum_over_parts(group, lambda part: _weight(part).square()).sqrt()


def activation_gradient(group: Group, statistics: Statistics, seed: int = 0) -> Tensor:
    """Mean over windows of |sum over tokens of a * dL/da|, a the unit's activation.

    The first-order change of a window's loss when the unit is gated off.
    """
    return statistics.unit_gradient_abs[group.key]


def activation_fisher(group: Group, statistics: Statistics, seed: int = 0) -> Tensor:
    """Mean over windows of (sum over tokens of a * dL/da)^2: the Fisher information of a gate on
    the unit, hence second order in the loss."""
    return statistics.unit_gradient_squared[group.key]


def residual_fisher(group: Group, statistics: Statistics, seed: int = 0) -> Tensor:
    """`activation_fisher` times the share of the unit's activation that the group's other units
    cannot reproduce linearly: what is lost although the others are refitted.

    With H = X^T X + ridge, as in the refit, that share is 1 / (H_jj (H^-1)_jj) for a unit of one
    column; for one of several it is the trace of the Schur complement ((H^-1)_jj)^-1 over the trace
    of H_jj.
    """
    inverse = statistics.inverse_gram(group.key)
    shape = group.output.index_UK.shape
    total_U = inverse.diagonal_C.view(shape).sum(dim=1)
    if shape[1] == 1:
        residual_U = 1 / inverse.matrix_CC.diagonal()
    else:
        blocks_KKU = inverse.matrix_CC.view(shape + shape).diagonal(dim1=0, dim2=2)
        residual_U = (
            torch.linalg.inv(in_float64(blocks_KKU.permute(2, 0, 1)))
            .diagonal(dim1=1, dim2=2)
            .sum(dim=1)
        )
    share_U = (residual_U / total_U.to(residual_U.device)).float()
    return activation_fisher(group, statistics) * share_U.to(total_U.device)


def random(group: Group, statistics: Statistics, seed: int = 0) -> Tensor:
    """Uniform random numbers, the same for the same seed, layer and kind of group."""
    own_seed = (seed * 10_007 + group.layer) * 2 + (group.kind == ATTENTION)
    generator = torch.Generator().manual_seed(own_seed)
    return torch.rand(group.num_units, generator=generator).to(group.device)


@dataclass(frozen=True)
class Importance:
    """A scoring function and the statistics that it reads."""

    score: Callable[..., Tensor]
    wants: Wants


IMPORTANCES: dict[str, Importance] = {
    "taylor": Importance(taylor, Wants.WEIGHT_GRADIENTS),
    "taylor-vector": Importance(taylor_vector, Wants.WEIGHT_GRADIENTS),
    "taylor-second": Importance(taylor_second, Wants.FISHER),
    "taylor-mixed": Importance(taylor_mixed, Wants.FISHER),
    "activation-gradient": Importance(activation_gradient, Wants.UNIT_GRADIENTS),
    "activation-fisher": Importance(activation_fisher, Wants.UNIT_GRADIENTS),
    "residual-fisher": Importance(residual_fisher, Wants.UNIT_GRADIENTS | Wants.GRAM),
    "magnitude-l1": Importance(magnitude_l1, Wants.NOTHING),
    "magnitude-l2": Importance(magnitude_l2, Wants.NOTHING),
    "random": Importance(random, Wants.NOTHING),
}


def _matrices(group: Group) -> list[Part]:
    return [part for part in group.parts if part.tensor.dim() == 2]


def _sum_over_parts(group: Group, score: Callable[[Part], Tensor]) -> Tensor:
    score_U = torch.zeros(group.num_units, device=group.device)
    for part in _matrices(group):
        score_U += part.per_unit(score(part)).to(score_U)
    return score_U


def _weight(part: Part) -> Tensor:
    return part.tensor.detach().float()


def _gradient(part: Part) -> Tensor:
    gradient = part.tensor.grad
    assert gradient is not None, f"{part.path} has no gradient: score inside `collect(...)`"
    return gradient.float()
