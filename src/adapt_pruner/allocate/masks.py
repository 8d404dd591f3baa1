"""Hard-concrete masks that are trained towards a uniform shape (Sheared-LLaMA, arXiv:2310.06694).

A mask z of a unit is random while it is trained: a stretched concrete variable (arXiv:1712.01312),
clipped to [0, 1], that is exactly 0 or 1 more often than not. How many of the units are expected to
be above 0 has a gradient; a Lagrangian term of each kind of unit brings that number to the one that
the shape asks for, while the loss of the masked model decides which units they are.

Every mask belongs to a row, and a row keeps as many units as its size in the shape: the hidden
dimensions are one row, the layers another, the neurons of each layer and its KV groups one each,
the query heads of each KV group one.

Shapes: R rows of a kind, S units of a row, U units of an axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotConverged
from ..model.anatomy import Anatomy
from ..model.axes import LAYERS, AxisKey
from ..model.edits import Keep
from ..model.masking import attach, fold

LOWEST, HIGHEST, TEMPERATURE = -0.1, 1.1, 2 / 3
"""Where the concrete distribution is stretched to, and how soft it is."""
AS_TRAINED = 0.8
"""The published code's factor for masks that are not random."""
SMALLEST_LOG, LARGEST_LOG = math.log(1e-2), math.log(1e2)
"""Bounds of log alpha."""
START, SPREAD = 5.0, 0.01
"""Mean and standard deviation that log alpha begins with, before the bounds."""
EPSILON = 1e-6
WARMUP, FINAL_RATE = 0.1, 0.1
"""The learning rate of the masks rises over this share of the steps, then falls along a cosine to
this share of it."""
RAMP = 0.2
"""Over this share of the steps the sparsity that is asked for rises from 0 (640 of 3200 steps)."""
BETAS = (0.9, 0.95)
"""AdamW's, as published."""
TOLERANCE = 0.05
"""Share of units by which masks may be off at the end; a cut would otherwise be one of others."""


def gate(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """The random mask of a uniform number in (0, 1), of the same shape."""
    logit = (uniform / (1 - uniform)).log()
    stretched = ((logit + log_alpha) / TEMPERATURE).sigmoid() * (HIGHEST - LOWEST) + LOWEST
    return stretched.clamp(0, 1)


def probability_above_zero(log_alpha: Tensor) -> Tensor:
    """That of a mask, of the same shape."""
    shift = TEMPERATURE * math.log(-LOWEST / HIGHEST)
    return (log_alpha - shift).sigmoid().clamp(EPSILON, 1 - EPSILON)


def certain(log_alpha_RS: Tensor, size: int) -> Tensor:
    """(R, S) masks that are not random: of each row, all but the `size` largest are 0."""
    soft_RS = (log_alpha_RS / TEMPERATURE * AS_TRAINED).sigmoid()
    order_RS = log_alpha_RS.argsort(dim=1, descending=True, stable=True)
    return soft_RS.scatter(1, order_RS[:, size:], 0.0)


class Masks(nn.Module):
    """The masks of every kind of unit of which the shape has fewer, and their multipliers.

    While attached, they are a submodule of the model and act on its forward passes: at random in
    training mode, anew in each pass, and else as they are going to be cut.

    Args:
        anatomy: of the model that is going to be masked.
        shape: sizes by kind, as `allocate.shapes` names them.
        learning_rate: of the masks, and of the multipliers, which ascend.
    """

    def __init__(self, anatomy: Anatomy, shape: Mapping[str, int], learning_rate: float = 1.0):
        super().__init__()
        self.learning_rate, self.share = learning_rate, 0.0
        self.axes = [axis for axis in anatomy.axes if axis.kind in shape]
        self.sizes: dict[str, int] = {}
        self.log_alpha, self.multipliers = nn.ParameterDict(), nn.ParameterDict()
        for kind in shape:
            axes = [axis for axis in self.axes if axis.kind == kind]
            rows, row = sum(axis.strata for axis in axes), axes[0].size
            if kind == LAYERS:
                rows, row = 1, len(axes)
            if shape[kind] < row:
                self.sizes[kind] = shape[kind]
                start_RS = START + SPREAD * torch.randn(rows, row)
                self.log_alpha[kind] = nn.Parameter(start_RS.to(axes[0].device))
                self.multipliers[kind] = nn.Parameter(torch.zeros(2, device=axes[0].device))
        self.axes = [axis for axis in self.axes if axis.kind in self.sizes]
        self._current: dict[AxisKey, Tensor] = {}
        self._handles: list[Any] = []

    def attach(self, anatomy: Anatomy) -> None:
        """Become a part of the model of `anatomy`, which has the same axes. Mutates it."""
        model: Any = anatomy.model
        self.axes = [axis for axis in anatomy.axes if axis.kind in self.sizes]
        model.masks = self
        draw = model.get_input_embeddings().register_forward_pre_hook(lambda *_: self.draw())
        self._handles = [draw, *attach(anatomy, self.axes, lambda: self._current)]

    def detach(self, model: Any) -> None:
        """Leave the model as it was. Mutates it."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._current = [], {}
        del model.masks

    def draw(self) -> None:
        """New masks: a forward pass does it first of all."""
        with torch.no_grad():
            for log_alpha_RS in self.log_alpha.values():
                log_alpha_RS.clamp_(SMALLEST_LOG, LARGEST_LOG)
        if not self.training:
            self._current = self.final()
            return
        rows = {}
        for kind, log_alpha_RS in self.log_alpha.items():
            uniform_RS = torch.rand(log_alpha_RS.shape).clamp(EPSILON, 1 - EPSILON)
            rows[kind] = gate(log_alpha_RS, uniform_RS.to(log_alpha_RS.device))
        self._current = self._by_axis(rows)

    @torch.no_grad()
    def final(self) -> dict[AxisKey, Tensor]:
        """The masks that the cut is made by: exactly as many above 0 as the shape has units."""
        return self._by_axis(
            {k: certain(a_RS, self.sizes[k]) for k, a_RS in self.log_alpha.items()}
        )

    def _by_axis(self, rows: Mapping[str, Tensor]) -> dict[AxisKey, Tensor]:
        found, used = {}, dict.fromkeys(rows, 0)
        for axis in self.axes:
            if axis.kind == LAYERS:
                found[axis.key] = rows[LAYERS][0, used[LAYERS]][None]
                used[LAYERS] += 1
            else:
                first = used[axis.kind]
                used[axis.kind] += axis.strata
                found[axis.key] = rows[axis.kind][first : used[axis.kind]].flatten()
        return found

    # What the optimizer asks.

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For AdamW; `rate` is their learning rate, and the multipliers ascend."""
        own, multipliers = list(self.log_alpha.values()), list(self.multipliers.values())
        same = {"weight_decay": 0.0, "lr": self.learning_rate, "betas": BETAS, "of_masks": True}
        return [
            {"params": own, **same},
            {"params": multipliers, "maximize": True, **same},
        ]

    @property
    def rate(self) -> float:
        """Learning rate of the step after `share` of all."""
        if self.share < WARMUP:
            return self.learning_rate * max(self.share, 1e-3) / WARMUP
        angle = math.pi * (self.share - WARMUP) / (1 - WARMUP)
        return self.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(angle)) / 2)

    def removed(self) -> dict[str, tuple[Tensor, float]]:
        """By kind: (R,) share of each row that is expected to be at 0, and what the shape asks."""
        found = {}
        for kind, log_alpha_RS in self.log_alpha.items():
            bounded_RS = log_alpha_RS.clamp(SMALLEST_LOG, LARGEST_LOG)
            share_R = 1 - probability_above_zero(bounded_RS).mean(dim=1)
            found[kind] = share_R, 1 - self.sizes[kind] / log_alpha_RS.shape[1]
        return found

    def penalty(self) -> Tensor:
        """The Lagrangian terms after `share` of the steps: for each kind the mean over its rows of
        l1 (s - t) + l2 (s - t)^2, where t rises to what the shape asks for."""
        terms = []
        for kind, (share_R, asked) in self.removed().items():
            off_R = share_R - asked * min(1.0, self.share / RAMP)
            first, second = self.multipliers[kind]
            terms.append((first * off_R + second * off_R**2).mean())
        return torch.stack(terms).sum()

    @torch.no_grad()
    def masked(self) -> dict[str, float]:
        """By kind: share of the units that is expected to be at 0 now."""
        return {
            kind: round(float(share_R.mean()), 4) for kind, (share_R, _) in self.removed().items()
        }

    # The cut.

    def check(self, num_steps: int) -> None:
        """Raise NotConverged if the masks are not where the shape wants them."""
        for kind, found in self.masked().items():
            asked = 1 - self.sizes[kind] / self.log_alpha[kind].shape[1]
            if not abs(found - asked) <= TOLERANCE:
                raise NotConverged(
                    f"The masks have not reached the shape: after {num_steps:,} steps {found:.1%} "
                    f"of the {kind} are masked, and {asked:.1%} were to be. Give them more steps "
                    "(--steps; in accel more --tokens, a larger --mask-share or a smaller "
                    f"--batch-tokens), or another --mask-learning-rate ({self.learning_rate:g})."
                )

    def fold(self, anatomy: Anatomy) -> Keep:
        """Multiply the masks into the weights. Returns what stays. Mutates the weights."""
        values = self.final()
        axes = [axis for axis in anatomy.axes if axis.kind in self.sizes]
        fold(anatomy, axes, values)
        return {key: (value_U > 0).cpu() for key, value_U in values.items()}
