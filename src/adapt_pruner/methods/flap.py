"""FLAP (arXiv:2312.11983): units whose activations hardly fluctuate go, and a bias stands for them.

Needs forward passes alone. Where the text is silent, its published code decides (`lib/prune.py`).

Shapes: C columns of an output projection, U units of an axis, K columns per unit.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..allocate.chains import (
    Chain,
    Limits,
    Removal,
    Scores,
    build_chains,
    units_alike,
)
from ..allocate.ranking import remove_ranked
from ..allocate.schedules import AdaptiveSchedule
from ..allocate.target import check_reachable
from ..compensate.bias import add_means, without_bias
from ..errors import InvalidSettings
from ..limits import Rank
from ..model.anatomy import Anatomy
from ..model.axes import KV_GROUPS, Axis, AxisKey
from ..model.edits import AddBias, Cut
from ..precision import where_float64_is
from ..score.collect import collect
from ..score.observers import Observer, add_to, projections, watch
from ..settings import PruneSettings, with_defaults
from .base import Method, Outline, PruningStep, Work, check_counts_parameters, limits_of

CAN_CUT = frozenset({"neurons", "kv-groups"})


class FlapSettings(with_defaults(PruneSettings, "flap", windows=1024, window_length=128)):
    """Settings of FLAP, with the published values as defaults."""

    metric: Annotated[
        Literal["WIFV", "IFV", "WIFN"],
        Field(
            description="Of a column: variance of its input times its squared norm, the variance "
            "alone, or its mean absolute weight times the norm of its input."
        ),
    ] = "WIFV"
    structure: Annotated[
        Literal["AL-AM", "AL-MM", "UL-UM", "UL-MM"],
        Field(
            description="AL: one ranking over all layers, UL: the same share of each. AM: attention"
            " and MLPs in one ranking, UM: the same share of both, MM: --remove-heads."
        ),
    ] = "AL-AM"
    remove_heads: Annotated[
        Rank, Field(description="KV groups that go in all (--structure AL-MM or UL-MM).")
    ] = 8
    compensation: Annotated[
        Literal["bias", "none"],
        Field(description="Biases of output projections stand for the mean of what goes."),
    ] = "bias"


class Fluctuation(Observer):
    """Mean and variance, over all tokens, of what each output projection reads.

    Sums in float64, which add over processes; so results do not depend on the order of the windows.
    """

    def attach(self) -> Iterator[Any]:
        self.mean: dict[AxisKey, Tensor] = {}
        """(C,) float64 by `Axis.projection`."""
        self.variance: dict[AxisKey, Tensor] = {}
        """(C,) sample variance."""
        self.square: dict[AxisKey, Tensor] = {}
        """(C,) mean of squares."""
        self._sums_3C: dict[AxisKey, Tensor] = {}
        for key, site in projections(self.axes).items():
            yield watch(site, self._on_input(key))

    def _on_input(self, key: AxisKey):
        def see(x_BTC: Tensor) -> None:
            x_NC = where_float64_is(x_BTC.detach()).flatten(0, -2)
            total_C = x_NC.sum(dim=0, dtype=torch.float64)
            count_C = torch.full_like(total_C, len(x_NC))
            add_to(self._sums_3C, key, torch.stack([count_C, total_C, _norm(x_NC).square()]))

        return see

    def sums(self) -> Iterable[Tensor]:
        return self._sums_3C.values()

    def finish(self, num_windows: int) -> None:
        for key, (count_C, total_C, squares_C) in self._sums_3C.items():
            mean_C = self.mean[key] = total_C / count_C
            self.square[key] = squares_C / count_C
            around_mean_C = squares_C - count_C * mean_C.square()
            self.variance[key] = around_mean_C.clamp(min=0) / (count_C - 1)

    def values(self):
        for (layer, path), variance_C in self.variance.items():
            yield f"the input of {path} in layer {layer}", variance_C


def flap(work: Work) -> Iterator[PruningStep]:
    """Cut the model in place to at most the target, in one step."""
    settings: FlapSettings = work.settings
    anatomy, target = work.anatomy(), work.targets[-1]
    limits = _limits(settings, anatomy, target)
    if target >= anatomy.amount:
        yield PruningStep(0, anatomy, target=target)
        return
    began, axes = time.perf_counter(), limits.axes(anatomy)
    windows_BT = work.calibration.draw()
    with collect(
        work.model, anatomy, windows_BT, [Fluctuation()], axes=axes, how=work.how,
        on_progress=work.progress_of(len(windows_BT)),
    ) as statistics:  # fmt: skip
        collected = time.perf_counter()
        found = statistics[Fluctuation]
        scores = {axis.key: score(axis, found, settings) for axis in axes}
        removal, biases = _choose(settings, anatomy, scores, limits, target)
        keep, biases = work.decide((removal.keep_masks(scores), biases))
        if biases:
            work.apply(AddBias(biases))
        if settings.compensation == "bias":
            add_means(axes, keep, found.mean)
        anatomy = work.apply(Cut(keep))
    seconds = {"collect": collected - began, "cut": time.perf_counter() - collected}
    yield PruningStep(1, anatomy, seconds=seconds, target=target)


def score(axis: Axis, found: Fluctuation, settings: FlapSettings) -> Tensor:
    """The metric of each unit, (U,) float64, higher = keep.

    That of attention is squared first. Over layers (AL) columns are standardised within theirs.
    """
    assert axis.output is not None
    weight, key = where_float64_is(axis.output.tensor.detach()), axis.projection
    metric_C = {
        "WIFV": lambda: found.variance[key] * _norm(weight).square(),
        "IFV": lambda: found.variance[key],
        "WIFN": lambda: weight.abs().mean(dim=0, dtype=torch.float64) * found.square[key].sqrt(),
    }[settings.metric]()
    if axis.kind == KV_GROUPS:
        metric_C = metric_C.square()
    index_UK = axis.output.index_UK.to(metric_C.device)
    if settings.structure.startswith("UL"):
        return metric_C[index_UK].sum(dim=1)
    deviation = metric_C.std()
    standardised_C = (metric_C - metric_C.mean()) / torch.where(deviation > 0, deviation, 1)
    return standardised_C[index_UK].mean(dim=1)


def _norm(matrix: Tensor) -> Tensor:
    """Of each column, in float64."""
    return torch.linalg.vector_norm(where_float64_is(matrix), dim=0, dtype=torch.float64)


def _choose(
    settings: FlapSettings, anatomy: Anatomy, scores: Scores, limits: Limits, target: int
) -> tuple[Removal, dict[int, tuple[str, ...]]]:
    """What goes, and the projections that get a bias: those that lose something. The parameters of
    biases count, so that each lets more go, and that may ask for another."""
    lacking, named = _lacking(settings, limits.axes(anatomy)), set()
    while True:
        size = target - sum(lacking[projection] for projection in named)
        removal = _remove(settings, anatomy, scores, limits, size)
        losing = {
            axis.projection for chain in removal.chains if chain.removed for axis in chain.members
        }.intersection(lacking)
        if losing <= named:
            return removal, _by_layer(named)
        named |= losing


def _by_layer(projections: Iterable[AxisKey]) -> dict[int, tuple[str, ...]]:
    names: dict[int, tuple[str, ...]] = {}
    for layer, path in sorted(projections):
        names[layer] = (*names.get(layer, ()), path)
    return names


def _remove(
    settings: FlapSettings, anatomy: Anatomy, scores: Scores, limits: Limits, size: int
) -> Removal:
    chains = build_chains(anatomy, units_alike(limits.axes(anatomy), scores), limits)
    removal = Removal(anatomy, chains)
    if not settings.structure.endswith("MM"):
        _remove_to(settings, removal, limits, size)
        return removal
    heads = [chain for chain in chains if chain.members[0].kind == KV_GROUPS]
    neurons = [chain for chain in chains if chain not in heads]
    _remove_heads(settings, heads)
    left = Removal(anatomy, heads).amount
    if left < size:
        raise InvalidSettings(
            f"remove_heads: without {settings.remove_heads} KV groups the model has "
            f"{anatomy.resource.written(left)}, below the {size:,} that it may keep. Remove fewer, "
            "or take --structure AL-AM."
        )
    # Attention and MLPs share no tensors: what went there is left for the neurons to keep.
    _remove_to(settings, Removal(anatomy, neurons), limits, size + anatomy.amount - left)
    return removal


def _remove_to(settings: FlapSettings, removal: Removal, limits: Limits, size: int) -> None:
    if settings.structure.startswith("AL"):
        remove_ranked(removal, size)
    else:
        schedule = AdaptiveSchedule(removal.anatomy, steps=1, amplitude=0)
        schedule.advance(removal, size, [0.0] * len(removal.anatomy.layers), limits.uniform)


def _remove_heads(settings: FlapSettings, chains: list[Chain]) -> None:
    """Of all layers together the lowest, or of each the same number."""
    if settings.structure.startswith("UL"):
        layers = sum(len(chain.members) for chain in chains)
        for chain in chains:
            of_each = chain.sizes.cumsum(dim=0) * layers
            chain.removed = int((of_each <= settings.remove_heads).sum())
        return
    blocks = [
        (float(density), chain, int(size) * len(chain.members))
        for chain in chains
        for density, size in zip(chain.density, chain.sizes, strict=True)
    ]
    left = settings.remove_heads
    for _, chain, units in sorted(blocks, key=lambda block: block[0]):
        if units > left:
            break
        chain.removed, left = chain.removed + 1, left - units


def _lacking(settings: FlapSettings, axes: list[Axis]) -> dict[AxisKey, int]:
    return without_bias(axes) if settings.compensation == "bias" else {}


def _limits(settings: FlapSettings, anatomy: Anatomy, target: int) -> Limits:
    limits = limits_of(settings, anatomy, CAN_CUT)
    axes = limits.axes(anatomy)
    lacking = _lacking(settings, axes)
    if settings.compensation == "bias":
        check_counts_parameters(anatomy, "FLAP, which adds biases,", "take --compensation none")
    if lacking and limits.uniform:
        raise InvalidSettings(
            "A uniform layout is an ordinary model of its architecture, which has no biases where "
            "FLAP would add some; take --compensation none with it."
        )
    if target < anatomy.amount:
        check_reachable(anatomy, target, limits, added=sum(lacking.values()))
    most = sum(axis.size - 1 for axis in axes if axis.kind == KV_GROUPS)
    if settings.structure.endswith("MM") and settings.remove_heads > most:
        raise InvalidSettings(
            f"remove_heads: at most {most} KV groups can go, for one stays in each layer; got "
            f"{settings.remove_heads}."
        )
    return limits


def outline(settings: FlapSettings, anatomy: Anatomy, target: int) -> Outline:
    _limits(settings, anatomy, target)
    return Outline([target] if target < anatomy.amount else [], [Fluctuation()])


METHOD = Method(
    run=flap,
    settings=FlapSettings,
    summary="Units whose activations hardly fluctuate go, and a bias stands for their mean.",
    paper="arXiv:2312.11983",
    cuts=CAN_CUT,
    needs="forward",
    outline=outline,
)
