"""Adapt-Pruner (arXiv:2502.03460, algorithm 1): score, allocate, compensate, cut, step by step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..allocate.chains import Limits, Removal, build_chains
from ..allocate.ranking import hold_back, remove_ranked
from ..allocate.schedules import AdaptiveSchedule, sizes_after_steps
from ..allocate.target import check_reachable
from ..compensate.refit import refit_outputs
from ..compensate.scales import Tuning, dense_states, tune_scales
from ..data import CalibrationData
from ..errors import InvalidSettings
from ..limits import Amplitude, Rank, Ridge, Rounds, Share
from ..model.anatomy import Anatomy, find_anatomy
from ..model.axes import (
    CUTS,
    HIDDEN,
    KV_GROUPS,
    LAYERS,
    NEURONS,
    SUBLAYERS,
    Axis,
    Slot,
)
from ..model.edits import Cut
from ..score.collect import Statistics, collect, prepared
from ..score.distance import Distance, LayerDistance, normalise
from ..score.head import plain_head
from ..score.importance import IMPORTANCES
from ..score.observers import Fisher, Gram, Observer, WeightGradients
from ..settings import ImportanceName, PruneSettings, with_defaults
from .base import Method, Outline, PruningStep, Work, limits_of

CAN_CUT = frozenset(CUTS)
WIDTHS = frozenset({KV_GROUPS, NEURONS})
"""Cuts after which every layer is still there, and says the same to those that stay."""
TUNING_WINDOW = 256
"""Tokens per window that scales are trained on."""


class AdaptPrunerSettings(with_defaults(PruneSettings, "adapt-pruner", windows=256)):
    """Settings of Adapt-Pruner. The defaults are the preset `best`."""

    importance: Annotated[
        ImportanceName,
        Field(description="Score of a unit: how much worse the model gets without it."),
    ] = "residual-fisher"
    allocation: Annotated[
        Literal["adaptive", "global"],
        Field(
            description="What each layer gives up: by layer importance (the paper's rule, eq. 6) "
            "or by one ranking of importance per parameter over all layers."
        ),
    ] = "global"
    kv_scores: Annotated[
        Literal["own", "official"],
        Field(
            description="Which query heads count for a KV group: its own, or those that the "
            "official code adds to it (k, k + n, ... of n groups)."
        ),
    ] = "own"
    compensation: Annotated[
        Literal["none", "refit"],
        Field(description="Refit output projections on the units that stay, in closed form."),
    ] = "refit"
    ridge: Annotated[
        Ridge,
        Field(
            description="Strength of the refit's pull to the present weights; residual-fisher "
            "scores assume the same.",
        ),
    ] = 0.1
    carry: Annotated[
        Share,
        Field(
            description="What statistics of earlier steps count beside those of the present one; "
            "1: every refit sees the tokens of all steps so far."
        ),
    ] = 1.0
    tuning_steps: Annotated[
        Rank,
        Field(
            description="Steps that train scales of rows and columns on the dense model's "
            "predictions when a target is met; they are folded into the weights if they help on "
            "other windows. 0: none; nor are there any if the hidden size is cut or logits are "
            "softcapped.",
        ),
    ] = 24
    steps: Annotated[
        Rounds,
        Field(
            description="Rounds of scoring and cutting; with --allocation adaptive the rounds from "
            "sparsity 0 to 1, of which a smaller sparsity needs only its share.",
        ),
    ] = 5
    amplitude: Annotated[
        Amplitude,
        Field(description="Amplitude A of eq. 6, per step (--allocation adaptive)."),
    ] = 0.02
    distance: Annotated[Distance, Field(description="How far a layer moves its input (eq. 3).")] = (
        Distance.COSINE
    )


PRESETS = {
    "best": {},
    "paper": {
        "importance": "taylor",
        "allocation": "adaptive",
        "compensation": "none",
        "carry": 0.0,
        "tuning_steps": 0,
        "steps": 50,
        "amplitude": 0.02,
        "distance": "cosine",
        "windows": 512,
        "window_length": 64,
    },
}


def adapt_pruner(work: Work) -> Iterator[PruningStep]:
    """Cut the model in place to at most the targets, one step per yield."""
    settings: AdaptPrunerSettings = work.settings
    anatomy = work.anatomy()
    limits = _limits(settings, anatomy)
    check_reachable(anatomy, work.targets[-1], limits)
    importance, how = IMPORTANCES[settings.importance], work.how
    scored = with_official_heads if settings.kv_scores == "official" else _as_it_is
    schedule = _schedule(settings, anatomy, work.targets, limits)
    lesson = _lesson(work, settings.tuning_steps, limits)
    observers = _observers(settings)
    step = 0
    for target in work.targets:
        done = anatomy.amount <= target
        if done:
            yield PruningStep(step, anatomy, target=target)
        while not done:
            step += 1
            began = time.perf_counter()
            windows_BT = work.calibration.draw(step - 1)
            axes = limits.axes(anatomy)

            with collect(
                work.model, anatomy, windows_BT, observers, axes=axes, how=how,
                on_progress=work.progress_of(len(windows_BT)),
            ) as statistics:  # fmt: skip
                collected = time.perf_counter()
                scores = {
                    axis.key: importance.score(scored(axis), statistics, settings.seed + step)
                    for axis in axes
                }
                removal = Removal(anatomy, build_chains(anatomy, scores, limits))
                done = schedule(removal, target, statistics)
                keep, done = work.decide((removal.keep_masks(scores), done))
                if settings.compensation == "refit":
                    refit_outputs(axes, keep, statistics[Gram])
                is_last = done and target == work.targets[-1]
                known = keep if limits.kinds <= WIDTHS and not is_last else None
                for observer in observers:
                    observer.carry(known, settings.carry)
                anatomy = work.apply(Cut(keep))
            if done and lesson is not None:
                tuning = Tuning(compute_dtype=work.compute_dtype)
                tune_scales(work.model, anatomy, *lesson, tuning, work.group)
            seconds = {"collect": collected - began, "cut": time.perf_counter() - collected}
            made = _account(step, anatomy, statistics, limits, seconds)
            del statistics  # its matrices would live on through the next pass
            yield replace(made, target=target if done else None)


def _account(
    step: int, anatomy: Anatomy, statistics: Statistics, limits: Limits, seconds: dict[str, float]
) -> PruningStep:
    distance = statistics[LayerDistance].distance
    importance = normalise(distance, without=limits.protected_layers)
    return PruningStep(step, anatomy, importance, distance, statistics.loss, seconds)


def _as_it_is(axis: Axis) -> Axis:
    return axis


def with_official_heads(axis: Axis) -> Axis:
    """KV groups with the query heads that the official code adds to their scores.

    It folds the scores of heads onto n groups by `view(-1, n).sum(0)`, so group k gets those of
    heads k, k + n, ...; attention reads k * r, ..., k * r + r - 1 with it. Equal for r = 1.
    """
    if axis.kind != KV_GROUPS:
        return axis
    slots = []
    for slot in axis.slots:
        num_heads, rest = divmod(slot.index_UK.shape[1], axis.grain)
        heads = num_heads - 2 if _is_fused(axis, slot) else num_heads  # without keys and values
        if rest == 0 and heads > 1:
            own_UK, others_UK = slot.index_UK.split(
                [heads * axis.grain, slot.index_UK.shape[1] - heads * axis.grain], dim=1
            )
            by_head = own_UK.reshape(heads, axis.num_units, axis.grain)
            index_UK = torch.cat([by_head.transpose(0, 1).flatten(1), others_UK], dim=1)
            slot = replace(slot, index_UK=index_UK)
        slots.append(slot)
    return replace(axis, slots=slots)


def _is_fused(axis: Axis, slot: Slot) -> bool:
    assert axis.output is not None
    return slot.index_UK.shape[1] > axis.output.index_UK.shape[1]


def _lesson(work: Work, steps: int, limits: Limits) -> tuple[Tensor, Tensor] | None:
    """Windows that scales are trained on, and what the dense model makes of them."""
    if not steps:
        return None
    documents = work.calibration.documents
    # Longer than those of the scores, as far as the text allows; step -1 is drawn by no other.
    length = min(TUNING_WINDOW, max(map(len, documents)))
    number = steps * Tuning.windows_per_step + Tuning.judging_windows
    windows_BT = CalibrationData(documents, length, number, work.calibration.seed).draw(-1)
    with prepared(work.model, find_anatomy(work.model), [], [], False):
        if HIDDEN in limits.kinds or plain_head(work.model) is None:
            return None  # what the head makes of stored states is not what the model predicts
        return windows_BT, dense_states(work.model, windows_BT, work.compute_dtype)


def _observers(settings: AdaptPrunerSettings) -> list[Observer]:
    kinds = list(IMPORTANCES[settings.importance].needs)
    if settings.compensation == "refit" and Gram not in kinds:
        kinds.append(Gram)
    gram = Gram(settings.ridge, carries=settings.carry > 0 and settings.steps > 1)
    made = [gram if kind is Gram else kind() for kind in kinds]
    return [LayerDistance(settings.distance), *made]


def _limits(settings: AdaptPrunerSettings, anatomy: Anatomy) -> Limits:
    limits = limits_of(settings, anatomy, CAN_CUT)
    needs = set(IMPORTANCES[settings.importance].needs)
    if settings.kv_scores == "official" and not needs <= {WeightGradients, Fisher}:
        raise InvalidSettings(
            "kv_scores: official is about scores that are sums over weights, such as taylor; got "
            f"importance {settings.importance}."
        )
    if settings.allocation == "adaptive" and limits.kinds & {LAYERS, *SUBLAYERS}:
        raise InvalidSettings(
            "allocation: adaptive decides how wide each layer stays, not whether it stays; take "
            "--allocation global to cut layers or sublayers."
        )
    return limits


def _schedule(
    settings: AdaptPrunerSettings, anatomy: Anatomy, targets: Sequence[int], limits: Limits
) -> Callable[[Removal, int, Statistics], bool]:
    """What decides in each step how much goes where. Returns whether the target is met then."""
    if settings.allocation == "adaptive":
        rule = AdaptiveSchedule(anatomy, settings.steps, settings.amplitude)

        def by_layer(removal: Removal, target: int, statistics: Statistics) -> bool:
            distance = statistics[LayerDistance].distance
            importance = normalise(distance, without=limits.protected_layers)
            return rule.advance(removal, target, importance, limits.uniform)

        return by_layer
    sizes = sizes_after_steps(anatomy, targets[-1], settings.steps)

    def by_rank(removal: Removal, target: int, statistics: Statistics) -> bool:
        now = removal.amount
        for size in [max(size, target) for size in sizes if size < now]:
            remove_ranked(removal, size)
            if removal.amount <= target:
                remove_ranked(removal, target)
                return True
            hold_back(removal)
            if removal.amount < now:
                break  # else nothing may go yet, and a larger step is taken
        return False

    return by_rank


def outline(settings: AdaptPrunerSettings, anatomy: Anatomy, target: int) -> Outline:
    """With the adaptive rule all sizes but the last are approximate."""
    check_reachable(anatomy, target, _limits(settings, anatomy))
    removed, sizes = anatomy.amount - target, []
    if removed and settings.allocation == "adaptive":
        inside = anatomy.amount - anatomy.cost.outside
        steps = max(1, math.ceil(settings.steps * removed / inside))
        share = inside / settings.steps
        sizes = [max(target, round(anatomy.amount - share * (i + 1))) for i in range(steps)]
    elif removed:
        sizes = sizes_after_steps(anatomy, target, settings.steps)
    tuned = settings.tuning_steps * Tuning.windows_per_step * TUNING_WINDOW
    return Outline(sizes, _observers(settings), tuned if removed else 0)


METHOD = Method(
    run=adapt_pruner,
    settings=AdaptPrunerSettings,
    summary="Layer by layer, sparsity adapted to how much each layer changes its input.",
    paper="arXiv:2502.03460",
    cuts=CAN_CUT,
    presets=PRESETS,
    outline=outline,
    meets_several_targets=True,
)
