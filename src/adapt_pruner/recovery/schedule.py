"""When to cut, how long to train in between, and how fast (Adapt-Accel, section 3.2).

One learning-rate schedule runs over all phases, so it is continuous across cuts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import get_constant_schedule_with_warmup, get_wsd_schedule
from transformers import get_cosine_with_min_lr_schedule_with_warmup as get_cosine_schedule

from ..errors import InvalidSettings
from .settings import RecoverySettings

PRUNE_PER_PHASE = 0.05
"""The paper's optimum (section 4.4, figure 4)."""


@dataclass(frozen=True)
class Phase:
    """Cut to at most `amount`, then take `steps` optimizer steps."""

    number: int
    """Counted from 1."""
    amount: int
    """Of what the target limits: parameters of the whole model, unless it is something else."""
    parameters: int
    """Of the whole model; where the target limits something else, about."""
    first_step: int
    """Optimizer steps taken before this phase."""
    steps: int
    masked: int | None = None
    """Where the steps come first and train masks by which the cut is then made: parameters of the
    model that is masked."""

    @property
    def end_step(self) -> int:
        return self.first_step + self.steps

    @property
    def trains_masks(self) -> bool:
        return self.masked is not None

    @property
    def trained(self) -> int:
        """Parameters of the model that the steps train."""
        return self.masked or self.parameters


def count_phases(settings: RecoverySettings, before: int, target: int) -> int:
    """The number given, or that which removes about `prune_per_phase` of the present weights each.

    >>> count_phases(RecoverySettings(), 1_777_100_000, 1_005_500_000)  # paper: 11
    11
    """
    if settings.phases is not None:
        return settings.phases
    share = settings.prune_per_phase or PRUNE_PER_PHASE
    return max(1, round(math.log(target / before) / math.log1p(-share)))


def make_phases(
    settings: RecoverySettings,
    before: int,
    target: int,
    tokens: int,
    parameters: int | None = None,
    mask_share: float = 0.0,
) -> tuple[Phase, ...]:
    """Phase j of T cuts to P_0 - (P_0 - P_T) * j / T and trains on D_j tokens, in whole optimizer
    steps, at least one per phase.

    With linear growth and no `final_share`, D_j is 2j / (T (T + 1)) of all (eq. 11). A larger
    `final_share` moves the cuts forward: the phases before the last share what it leaves.

    Args:
        before, target: parameters of the whole model, P_0 and P_T; or of what else is limited.
        tokens: training tokens of all phases.
        parameters: of the whole model, if something else is limited.
        mask_share: of the tokens, that which trains masks, in a phase before the cut.

    Raises:
        InvalidSettings: if the tokens are too few for one step per phase.
    """
    with_masks = mask_share > 0 and target < before
    count = 2 if with_masks else count_phases(settings, before, target)
    total_steps = tokens // tokens_per_step(settings)
    if total_steps < count:
        raise InvalidSettings(
            f"{tokens:,} tokens are {total_steps} steps of {tokens_per_step(settings):,}; "
            f"{count} phases need at least one each. Give more --tokens, a smaller --batch-tokens "
            "or fewer --phases."
        )

    def about(amount: int) -> int:
        return amount if parameters is None else round(parameters * amount / before)

    if with_masks:
        first, left, whole = round(mask_share * total_steps), about(target), about(before)
        first = min(max(1, first), total_steps - 1)
        masks = Phase(1, target, left, 0, first, masked=whole)
        return masks, Phase(2, target, left, first, total_steps - first)
    steps = _apportion(_shares(settings, count), total_steps)
    phases = []
    for j in range(1, count + 1):
        amount = before - round((before - target) * j / count)
        phases.append(Phase(j, amount, about(amount), sum(steps[: j - 1]), steps[j - 1]))
    return tuple(phases)


def tokens_per_step(settings: RecoverySettings) -> int:
    """`batch_tokens`, rounded down to whole windows."""
    return settings.batch_tokens // settings.sequence_length * settings.sequence_length


def _shares(settings: RecoverySettings, count: int) -> list[float]:
    """Of the tokens, by phase.

    >>> _shares(RecoverySettings(final_share=0.8), 3)
    [0.06666666666666665, 0.1333333333333333, 0.8]
    """
    weights = [_weight(settings.growth, j, count) for j in range(1, count + 1)]
    *first, last = [weight / sum(weights) for weight in weights]
    final = max(last, settings.final_share) if first else 1.0
    return [*(share * (1 - final) / (1 - last) for share in first), final]


def _weight(growth: str, j: int, count: int) -> float:
    if growth == "linear":
        return j
    if growth == "constant":
        return 1.0
    return (1 - math.cos(math.pi * j / count)) / 2


def _apportion(shares: list[float], total: int) -> list[int]:
    """Split `total` by shares into whole numbers of at least 1, the sum exact.

    >>> _apportion([1, 2, 3], 12)
    [2, 4, 6]
    """
    extra = total - len(shares)  # one each is given away first
    exact = [max(0.0, share / sum(shares) * total - 1) for share in shares]
    scale = extra / sum(exact) if sum(exact) else 0.0
    result, carried, given = [], 0.0, 0
    for value in exact:
        carried += value * scale
        result.append(1 + round(carried) - given)
        given = round(carried)
    result[-1] += total - sum(result)
    return result


def learning_rates(settings: RecoverySettings, total_steps: int) -> Callable[[int], float]:
    """Learning rate of optimizer step s, counted from 0, from transformers' own schedules.

    They begin at rate 0 and end at the lowest one; we read them one step later, so that no step of
    ours is without effect.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup = math.ceil(settings.warmup_ratio * total_steps)
    decay = math.ceil(settings.decay_ratio * total_steps)
    lowest = settings.min_learning_rate / settings.learning_rate
    if settings.lr_scheduler == "wsd":
        schedule = get_wsd_schedule(
            optimizer, warmup, decay, num_training_steps=total_steps + 1,
            decay_type="linear", min_lr_ratio=0.0,
        )  # fmt: skip
    elif settings.lr_scheduler == "cosine":
        schedule = get_cosine_schedule(optimizer, warmup, total_steps + 1, min_lr_rate=0.0)
    else:
        schedule = get_constant_schedule_with_warmup(optimizer, warmup)
    factor = schedule.lr_lambdas[0]

    def at(step: int) -> float:
        share = factor(step + 1)
        if step >= warmup:
            share = lowest + (1 - lowest) * share
        return settings.learning_rate * share

    return at
