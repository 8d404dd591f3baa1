"""After AdaPruner (AAAI 2025, "Sample-aware Adaptive Structured Pruning"): chosen samples and a
weighted importance, in one cut. `adapt-pruner search` finds the samples and the weights.

Shapes: P windows of the pool, T tokens, U units of an axis.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from ..allocate.chains import Limits, Removal, Scores, build_chains
from ..allocate.ranking import remove_ranked
from ..allocate.schedules import AdaptiveSchedule
from ..allocate.target import check_reachable
from ..compensate.refit import refit_outputs
from ..data import CalibrationData
from ..errors import CalibrationError, InvalidSettings, shown
from ..limits import Length, Ridge, SampleNumber, Share, Weight, Windows
from ..model.anatomy import Anatomy
from ..model.axes import Axis, AxisKey
from ..model.edits import Cut
from ..score.collect import Statistics, collect
from ..score.distance import LayerDistance, normalise
from ..score.importance import IMPORTANCES, taylor, taylor_second, taylor_vector
from ..score.observers import Fisher, Gram, Observer
from ..settings import OneOf, PruneSettings
from .base import Method, Outline, PruningStep, Work, limits_of

CAN_CUT = frozenset({"neurons", "kv-groups", "query-heads"})
FACTORS = {
    "none": {
        "factor_coarse": (1e-4,),
        "factor_first": (1e-2, 1e-3),
        "factor_second": (1e5, 1e6, 1e7),
    },
    "mean": {"factor_first": (0.1, 1.0, 10.0), "factor_second": (0.1, 1.0, 10.0)},
}
"""Alignment -> the factors to search. Those of `none` are the paper's sets, which it does not
attribute to terms."""
TERMS = {"coarse": taylor_vector, "first": taylor, "second": taylor_second}
"""Vector-wise |sum of w g|; element-wise sum of |w g| and of w^2 F."""


PRESETS = {
    "aligned": {},
    "paper": {
        "alignment": "none",
        "factor_coarse": 1e-4,
        "factor_first": 1e-3,
        "factor_second": 1e5,
    },
}


WEIGHTED = "weighted"
_importance = OneOf(IMPORTANCES, (WEIGHTED,))


class AdaPrunerSettings(PruneSettings):
    """Settings of AdaPruner. The defaults are LLM-Pruner's choice of samples: ten at random."""

    method: Annotated[Literal["ada-pruner"], Field(description="Pruning method.")] = "ada-pruner"
    samples: Annotated[
        tuple[SampleNumber, ...],
        Field(
            max_length=100_000,
            description="Numbers of the samples of the pool to calibrate on; default: as many as "
            "--windows, at random.",
        ),
    ] = ()
    pool: Annotated[
        Windows,
        Field(description="Samples to choose from: one window each of as many documents."),
    ] = 256
    windows: Annotated[
        Windows, Field(description="Samples to calibrate on, where --samples names none.")
    ] = 10
    window_length: Annotated[
        Length, Field(description="Tokens per sample; shorter documents are left out.")
    ] = 128
    importance: Annotated[
        str,
        AfterValidator(_importance),
        _importance,
        Field(
            description="Score of a unit: the terms that the alphas weigh, or one of the library's."
        ),
    ] = WEIGHTED
    alpha_coarse: Annotated[
        Share, Field(description="Weight of the vector-wise importance (alpha 1).")
    ] = 0.5
    alpha_fine: Annotated[
        Share, Field(description="Weight of the element-wise importance (alpha 2).")
    ] = 0.5
    alignment: Annotated[
        Literal["mean", "none"],
        Field(
            description="What brings the terms to one scale: each is divided by its mean over all "
            "units, or by nothing, so that the factors alone do it, as in the paper."
        ),
    ] = "mean"
    factor_coarse: Annotated[Weight, Field(description="Of the vector-wise term.")] = 1.0
    factor_first: Annotated[Weight, Field(description="Of the first-order element-wise term.")] = (
        1.0
    )
    factor_second: Annotated[
        Weight, Field(description="Of the second-order element-wise term.")
    ] = 1.0
    allocation: Annotated[
        Literal["even", "global"],
        Field(
            description="What each layer gives up: the same share, as LLM-Pruner does, or by one "
            "ranking of importance per parameter over all layers."
        ),
    ] = "even"
    layer_weights: Annotated[
        tuple[Weight, ...],
        Field(
            max_length=10_000,
            description="What each layer gives up compared to the others, with commas: 2 is twice "
            "the share of 1 (--allocation even).",
        ),
    ] = ()
    compensation: Annotated[
        Literal["none", "refit"],
        Field(description="Refit output projections on the units that stay, in closed form."),
    ] = "none"
    ridge: Annotated[
        Ridge, Field(description="Strength of the refit's pull to the present weights.")
    ] = 0.01


def ada_pruner(work: Work) -> Iterator[PruningStep]:
    """Cut the model in place to the target, in one step."""
    settings: AdaPrunerSettings = work.settings
    (target,) = work.targets
    anatomy = work.anatomy()
    limits = limits_of(settings, anatomy, CAN_CUT)
    check_reachable(anatomy, target, limits)
    _check_weights(settings, anatomy)
    if anatomy.amount <= target:
        yield PruningStep(0, anatomy, target=target)
        return
    began, axes = time.perf_counter(), limits.axes(anatomy)
    pool_PT = sample_pool(work.calibration, settings.pool)
    windows_BT = pool_PT[list(chosen_samples(settings, len(pool_PT)))]
    with collect(
        work.model, anatomy, windows_BT, _observers(settings), axes=axes, how=work.how,
        on_progress=work.progress_of(len(windows_BT)),
    ) as statistics:  # fmt: skip
        collected = time.perf_counter()
        scores = weighted_scores(axes, statistics, settings)
        keep = work.decide(keep_masks(anatomy, scores, target, limits, settings))
        if settings.compensation == "refit":
            refit_outputs(axes, keep, statistics[Gram])
        anatomy = work.apply(Cut(keep))
    distance = statistics[LayerDistance].distance
    yield PruningStep(
        step=1,
        anatomy=anatomy,
        layer_importance=normalise(distance, without=limits.protected_layers),
        layer_distance=distance,
        loss=statistics.loss,
        seconds={"collect": collected - began, "cut": time.perf_counter() - collected},
        target=target,
    )


def sample_pool(calibration: CalibrationData, number: int) -> Tensor:
    """(P, T) int64: one window, at a random place, of each of the first `number` documents that are
    long enough, or of all if there are fewer. Sample i of a pool is always the same."""
    documents, length = calibration.documents[:number], calibration.window_length
    generator = torch.Generator().manual_seed(calibration.seed)
    places = torch.rand(len(calibration.documents), generator=generator, dtype=torch.float64)
    windows = []
    for tokens, place in zip(documents, places.tolist(), strict=False):
        start = int(place * (len(tokens) - length + 1))
        windows.append(tokens[start : start + length])
    return torch.stack(windows).long()


def chosen_samples(settings: AdaPrunerSettings, size: int) -> tuple[int, ...]:
    """The samples of a pool that the settings name, or else as many as they say, at random.

    Raises:
        CalibrationError: if the pool is smaller.
    """
    if settings.samples:
        if max(settings.samples) >= size:
            raise CalibrationError(
                f"samples: the pool has samples 0 to {size - 1}; got {max(settings.samples)}. They "
                "belong to other calibration text, or to a larger pool."
            )
        return settings.samples
    check_enough(size, settings.windows, settings.window_length)
    generator = torch.Generator().manual_seed(settings.seed)
    return tuple(torch.randperm(size, generator=generator)[: settings.windows].tolist())


def check_enough(size: int, wanted: int, length: int) -> None:
    """Raise CalibrationError if a pool has fewer samples than are to be chosen."""
    if size < wanted:
        raise CalibrationError(
            f"The pool has {size} samples of at least {length} tokens, and {wanted} are to be "
            "chosen. Use more text, a larger --pool, a smaller --window-length, or fewer --windows."
        )


def terms_of(axes: Sequence[Axis], statistics: Statistics) -> dict[str, Scores]:
    """Every term of the importance, by name, of every axis."""
    return {
        name: {axis.key: term(axis, statistics) for axis in axes} for name, term in TERMS.items()
    }


def weighted_scores(
    axes: Sequence[Axis], statistics: Statistics, settings: AdaPrunerSettings
) -> dict[AxisKey, Tensor]:
    """(U,) per axis, by the importance that the settings name."""
    if settings.importance == WEIGHTED:
        return combine(terms_of(axes, statistics), settings)
    score = IMPORTANCES[settings.importance].score
    return {axis.key: score(axis, statistics, settings.seed) for axis in axes}


def combine(terms: Mapping[str, Scores], settings: AdaPrunerSettings) -> dict[AxisKey, Tensor]:
    """alpha_coarse * coarse + alpha_fine * (first + second), each term times its factor.

    Returns (U,) float64 per axis, higher = keep: with factors of 1e-4 and 1e7 side by side, float32
    would lose the smaller term.
    """
    weights = {
        "coarse": settings.alpha_coarse * settings.factor_coarse,
        "first": settings.alpha_fine * settings.factor_first,
        "second": settings.alpha_fine * settings.factor_second,
    }
    if settings.alignment == "mean":
        for name, of_axes in terms.items():
            mean = float(torch.cat([score_U.cpu().double() for score_U in of_axes.values()]).mean())
            weights[name] /= mean if mean > 0 else 1.0
    return {
        key: torch.stack([w * terms[name][key].cpu().double() for name, w in weights.items()]).sum(
            0
        )
        for key in terms["coarse"]
    }


def keep_masks(
    anatomy: Anatomy, scores: Scores, target: int, limits: Limits, settings: AdaPrunerSettings
) -> dict[AxisKey, Tensor]:
    """(U,) bool per axis that loses units: what meets the target by the allocation named."""
    removal = Removal(anatomy, build_chains(anatomy, scores, limits))
    if settings.allocation == "global":
        remove_ranked(removal, target)
    else:  # Adapt-Pruner's rule, with the weights in the place of layer importance
        weights = settings.layer_weights or [1.0] * len(anatomy.layers)
        spared = [1 - weight / max(weights) for weight in weights]
        schedule = AdaptiveSchedule(anatomy, steps=1, amplitude=1.0)
        while not schedule.advance(removal, target, spared, limits.uniform):
            pass
    return removal.keep_masks(scores)


def _observers(settings: AdaPrunerSettings) -> list[Observer]:
    needs: list[type[Observer]] = [Fisher]
    if settings.importance != WEIGHTED:
        needs = list(IMPORTANCES[settings.importance].needs)
    if settings.compensation == "refit" and Gram not in needs:
        needs.append(Gram)
    made = [Gram(settings.ridge) if kind is Gram else kind() for kind in needs]
    return [LayerDistance(), *made]


def _check_weights(settings: AdaPrunerSettings, anatomy: Anatomy) -> None:
    weights, count = settings.layer_weights, len(anatomy.layers)
    if not weights:
        return
    if len(weights) != count or not any(weights):
        raise InvalidSettings(
            f"layer_weights: the model has {count} layers, each of which needs a weight, one of "
            f"them above 0; got {shown(list(weights))}."
        )
    if settings.allocation != "even" or settings.layout == "uniform":
        raise InvalidSettings(
            "layer_weights say what each layer gives up, so they need --allocation even and "
            f"--layout per-layer; got {settings.allocation} and {settings.layout}."
        )


def outline(settings: AdaPrunerSettings, anatomy: Anatomy, target: int) -> Outline:
    check_reachable(anatomy, target, limits_of(settings, anatomy, CAN_CUT))
    _check_weights(settings, anatomy)
    coarse = settings.alpha_coarse * settings.factor_coarse
    fine = settings.alpha_fine * max(settings.factor_first, settings.factor_second)
    if coarse == fine == 0 and settings.importance == WEIGHTED:
        raise InvalidSettings(
            "The alphas and factors make every importance 0, which ranks nothing; got alpha_coarse "
            f"{settings.alpha_coarse:g}, alpha_fine {settings.alpha_fine:g}. Raise one of them."
        )
    return Outline([target] if target < anatomy.amount else [], _observers(settings))


METHOD = Method(
    run=ada_pruner,
    settings=AdaPrunerSettings,
    summary="Chosen calibration samples and a weighted importance; `search` finds both.",
    paper="AAAI 2025, AdaPruner",
    cuts=CAN_CUT,
    presets=PRESETS,
    outline=outline,
)
