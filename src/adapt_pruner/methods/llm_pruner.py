"""LLM-Pruner (arXiv:2305.11627): one cut by a Taylor expansion of the loss, ends of the model kept.

Where the text is silent, its published code decides (`hf_prune.py --block_wise`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from ..allocate.chains import (
    Limits,
    Removal,
    Scores,
    build_chains,
    units_alike,
)
from ..allocate.ranking import remove_ranked
from ..allocate.schedules import AdaptiveSchedule
from ..allocate.target import check_reachable
from ..errors import InvalidSettings
from ..limits import Rank, Rounds
from ..model.anatomy import Anatomy
from ..model.axes import Axis
from ..model.edits import Cut
from ..score.collect import Statistics, collect
from ..score.importance import IMPORTANCES, Importance
from ..settings import PruneSettings, with_defaults
from .adapt_pruner import with_official_heads
from .base import Method, Outline, PruningStep, Work, limits_of

CAN_CUT = frozenset({"neurons", "kv-groups", "query-heads", "hidden"})
SCORES = {
    ("first", "element"): "taylor",
    ("second", "element"): "taylor-second",
    ("mixed", "element"): "taylor-mixed",
    ("first", "vector"): "taylor-vector",
    ("second", "vector"): "taylor-second",  # w^2 F is never negative: the sum is the same
    ("mixed", "vector"): "taylor-vector-mixed",
}


class LLMPrunerSettings(with_defaults(PruneSettings, "llm-pruner", windows=10, window_length=64)):
    """Settings of LLM-Pruner, with the values of its script for LLaMA-7B as defaults."""

    order: Annotated[
        Literal["first", "second", "mixed"],
        Field(description="Terms of the loss's expansion in a weight: first, second, or both."),
    ] = "first"
    granularity: Annotated[
        Literal["element", "vector"],
        Field(
            description="Absolute values of each weight's term, or of sums over rows and columns."
        ),
    ] = "element"
    ranking: Annotated[
        Literal["local", "global"],
        Field(description="The same share of every layer, or the lowest scores of all layers."),
    ] = "local"
    protect_first: Annotated[
        Rank | None,
        Field(description="Layers at the beginning that stay whole; default: an eighth."),
    ] = None
    protect_last: Annotated[
        Rank | None,
        Field(description="Layers at the end that stay whole; default: a sixteenth."),
    ] = None
    iterative_steps: Annotated[
        Rounds, Field(description="Rounds of scoring and cutting, each of equal size.")
    ] = 1
    kv_scores: Annotated[
        Literal["own", "official"],
        Field(description="Query heads that count for a KV group: its own, or as published."),
    ] = "own"


def llm_pruner(work: Work) -> Iterator[PruningStep]:
    """Cut the model in place to at most the target, one step per yield."""
    settings: LLMPrunerSettings = work.settings
    anatomy, target = work.anatomy(), work.targets[-1]
    limits = _limits(settings, anatomy)
    check_reachable(anatomy, target, limits)
    sizes = _sizes(settings, anatomy, target)
    schedule = AdaptiveSchedule(anatomy, steps=1, amplitude=0)  # every layer alike
    if not sizes:
        yield PruningStep(0, anatomy, target=target)
    for step, size in enumerate(sizes, start=1):
        began = time.perf_counter()
        windows_BT = work.calibration.draw(step - 1)
        importance, axes = _importance(settings), limits.axes(anatomy)
        with collect(
            work.model, anatomy, windows_BT, [need() for need in importance.needs], axes=axes,
            how=work.how, on_progress=work.progress_of(len(windows_BT)),
        ) as statistics:  # fmt: skip
            collected = time.perf_counter()
            scores = {axis.key: _score(settings, axis, statistics) for axis in axes}
            removal = _remove(settings, anatomy, scores, limits, schedule, size)
            anatomy = work.apply(Cut(work.decide(removal.keep_masks(scores))))
        yield PruningStep(
            step=step,
            anatomy=anatomy,
            loss=statistics.loss,
            seconds={"collect": collected - began, "cut": time.perf_counter() - collected},
            target=target if step == len(sizes) else None,
        )


def _remove(
    settings: LLMPrunerSettings,
    anatomy: Anatomy,
    scores: Scores,
    limits: Limits,
    schedule: AdaptiveSchedule,
    size: int,
) -> Removal:
    axes = limits.axes(anatomy)
    removal = Removal(anatomy, build_chains(anatomy, units_alike(axes, scores), limits))
    if settings.ranking == "global":
        remove_ranked(removal, size)
    else:
        schedule.advance(removal, size, [0.0] * len(anatomy.layers), limits.uniform)
    return removal


def _score(settings: LLMPrunerSettings, axis: Axis, statistics: Statistics):
    scored = with_official_heads(axis) if settings.kv_scores == "official" else axis
    return _importance(settings).score(scored, statistics)


def _importance(settings: LLMPrunerSettings) -> Importance:
    return IMPORTANCES[SCORES[settings.order, settings.granularity]]


def _sizes(settings: LLMPrunerSettings, anatomy: Anatomy, target: int) -> list[int]:
    """What is left after each step; every step removes equally much."""
    total, steps = anatomy.amount, settings.iterative_steps
    sizes = [total - (total - target) * step // steps for step in range(1, steps + 1)]
    return sizes if target < total else []


def _limits(settings: LLMPrunerSettings, anatomy: Anatomy) -> Limits:
    """The published run leaves layers 0 to 3 and 30 to 31 of 32 whole: an eighth, a sixteenth."""
    limits = limits_of(settings, anatomy, CAN_CUT)
    count = len(anatomy.layers)
    if limits.uniform:
        if settings.protect_first or settings.protect_last:
            raise InvalidSettings(
                "A uniform layout cuts every layer alike, so protect_first and protect_last must "
                f"be 0; got {settings.protect_first or 0} and {settings.protect_last or 0}."
            )
        return limits
    first = _default(settings.protect_first, count / 8)
    last = _default(settings.protect_last, count / 16)
    if first + last >= count:
        raise InvalidSettings(
            f"protect_first and protect_last leave none of the model's {count} layers to cut; got "
            f"{first} and {last}."
        )
    ends = {*range(first), *range(count - last, count)}
    return replace(limits, protected_layers=limits.protected_layers | ends)


def _default(value: int | None, otherwise: float) -> int:
    return int(otherwise + 0.5) if value is None else value


def outline(settings: LLMPrunerSettings, anatomy: Anatomy, target: int) -> Outline:
    check_reachable(anatomy, target, _limits(settings, anatomy))
    observers = [need() for need in _importance(settings).needs]
    return Outline(_sizes(settings, anatomy, target), observers)


METHOD = Method(
    run=llm_pruner,
    settings=LLMPrunerSettings,
    summary="One cut by gradients, the same share of every layer but the first and last ones.",
    paper="arXiv:2305.11627",
    cuts=CAN_CUT,
    outline=outline,
)
