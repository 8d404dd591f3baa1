"""Adapt-Pruner (arXiv:2502.03460, algorithm 1): score, allocate, compensate, cut, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..allocate.chains import (
    AdaptiveSchedule,
    Limits,
    build_chains,
    check_reachable,
    keep_masks,
    remove_ranked,
    removed_parameters,
    sizes_after_steps,
)
from ..compensate.refit import refit_output
from ..data import CalibrationData
from ..errors import InvalidSettings
from ..model.anatomy import Anatomy, find_anatomy
from ..model.edits import cut
from ..processes import copy_from_first, decided_by_first
from ..score.collect import Pass, Wants, collect
from ..score.importance import IMPORTANCES
from ..settings import PruneSettings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

GroupKey = tuple[int, str]


@dataclass
class PruningStep:
    """What one round of scoring and cutting did."""

    step: int
    """Counted from 1."""
    anatomy: Anatomy
    """The model as it is after the cut."""
    kept: dict[GroupKey, Tensor]
    """(U,) bool per group that lost units, over its units before this cut."""
    layer_importance: list[float]
    """Per decoder layer before the cut, mean 0 and max |.| 1."""
    layer_distance: list[float]
    loss: float
    """Calibration loss before the cut, nats per token; 0 if the scores needed no loss."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the pass over the calibration windows and of the cut."""


def adapt_pruner(
    model: nn.Module,
    calibration: CalibrationData,
    target: int,
    settings: PruneSettings,
    on_progress: Callable[[float], None] = lambda share: None,
    group: ProcessGroup | None = None,
) -> Iterator[PruningStep]:
    """Cut `model` in place to at most `target` parameters, one step per yield.

    Args:
        on_progress: called during a step with the share of its calibration windows done.
        group: processes that cut the same model together, see `prune`.
    """
    anatomy = find_anatomy(model)
    limits = limits_of(settings, anatomy)
    check_reachable(anatomy, target, limits)
    importance = IMPORTANCES[settings.importance]
    wants = importance.wants
    if settings.compensation == "refit":
        wants |= Wants.GRAM
    how = Pass(
        settings.micro_batch_size,
        settings.gradient_checkpointing,
        settings.distance,
        settings.ridge,
        group,
    )
    schedule = AdaptiveSchedule(anatomy, settings.steps, settings.amplitude)
    sizes = sizes_after_steps(anatomy, target, settings.steps)
    step, done = 0, anatomy.total_parameters <= target

    while not done:
        step += 1
        began = time.perf_counter()
        windows_BT = calibration.draw(step - 1)

        def report(windows_done: int, total: int = len(windows_BT)) -> None:
            on_progress(windows_done / total)

        with collect(model, anatomy, windows_BT, wants, how, report) as statistics:
            collected = time.perf_counter()
            scores = {
                units.key: importance.score(units, statistics, settings.seed + step)
                for units in anatomy.groups
            }
            chains = build_chains(anatomy.groups, scores, limits)
            needed = anatomy.total_parameters - target
            if settings.allocation == "adaptive":
                importances = statistics.layer_importance
                done = schedule.advance(chains, needed, importances, limits.uniform)
            else:
                remove_ranked(chains, anatomy.total_parameters - sizes[step - 1])
                done = step == settings.steps or removed_parameters(chains) >= needed
                if done:
                    remove_ranked(chains, needed)
            kept, done = decided_by_first((keep_masks(chains, scores), done), group)
            if settings.compensation == "refit":
                changed = [units for units in anatomy.groups if units.key in kept]
                for units in changed:
                    refit_output(units, kept[units.key], statistics.inverse_gram(units.key))
                copy_from_first((units.output.tensor for units in changed), group)
            anatomy = cut(model, anatomy, kept)
        made = PruningStep(
            step=step,
            anatomy=anatomy,
            kept=kept,
            layer_importance=statistics.layer_importance,
            layer_distance=statistics.layer_distance,
            loss=statistics.loss,
            seconds={"collect": collected - began, "cut": time.perf_counter() - collected},
        )
        del statistics  # its matrices would live on through the next pass
        yield made


def limits_of(settings: PruneSettings, anatomy: Anatomy) -> Limits:
    """Turn the settings that say what may be cut into limits for this model.

    Raises:
        InvalidSettings: if a protected layer does not exist, or settings exclude each other.
    """
    count = len(anatomy.layers)
    for layer in settings.protect_layers:
        if not -count <= layer < count:
            raise InvalidSettings(
                f"protect_layers: the model has layers 0 to {count - 1}; got {layer}."
            )
    if settings.protect_layers and settings.layout == "uniform":
        raise InvalidSettings(
            "A uniform layout cuts every layer alike, so protect_layers must be empty; got "
            f"{list(settings.protect_layers)}."
        )
    kinds = {group.kind for group in anatomy.groups}
    if settings.prune != "all":
        kinds &= {settings.prune}
        if not kinds:
            raise InvalidSettings(
                f"prune: the {settings.prune} of this architecture cannot be cut; use mlp."
            )
    return Limits(
        kinds=frozenset(kinds),
        protected_layers=frozenset(layer % count for layer in settings.protect_layers),
        multiple=settings.multiple,
        uniform=settings.layout == "uniform",
    )
