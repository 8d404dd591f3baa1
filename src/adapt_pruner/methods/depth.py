"""Whole layers, or their attention and MLPs, go: by how little they change the residual stream
(ShortGPT, arXiv:2403.03853), by the loss without them (SLEB, arXiv:2402.09025), or as told.

Needs forward passes alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..allocate.chains import Limits, Removal, build_chains, units_alike
from ..allocate.ranking import remove_ranked
from ..allocate.target import check_reachable
from ..errors import InvalidSettings, InvalidTarget
from ..limits import Layer
from ..model.anatomy import Anatomy
from ..model.axes import ATTENTION, LAYERS, MLP, Axis, AxisKey, Site
from ..model.edits import Cut
from ..score.collect import collect
from ..score.distance import Distance, LayerDistance, normalise
from ..score.observers import Loss, Observer, watch
from ..settings import PruneSettings, with_defaults
from .base import Method, Outline, PruningStep, Work, limits_of

CAN_CUT = frozenset({"layers", "sublayers"})
LayerScores = tuple[dict[AxisKey, float], float, list[float]]
"""Score of each axis, the loss before the cut if it was measured, and the layers' distances."""


class DepthSettings(with_defaults(PruneSettings, "depth", cut=("layers",), windows=128)):
    """Settings of depth pruning. The defaults are those of the preset `shortgpt`, which does not
    say on how much text it measures."""

    criterion: Annotated[
        Literal["block-influence", "perplexity"],
        Field(
            description="Which go first: those that change the residual stream least (ShortGPT), "
            "or, one by one, those without which the model's perplexity is lowest (SLEB)."
        ),
    ] = "block-influence"
    layers: Annotated[
        tuple[Layer, ...],
        Field(
            description="Decoder layers to remove, such as 3,7 (-1 is the last), instead of a "
            "criterion; a target is then not needed."
        ),
    ] = ()


PRESETS = {
    "shortgpt": {},
    "sleb": {"criterion": "perplexity", "protect_layers": (0, -1), "window_length": 2048},
}


class SublayerDistance(Observer):
    """How far attention and MLP each move the residual stream; see `LayerDistance`.

    With x the input of a layer, and a and m what attention and MLP add to it, attention moves x to
    x + a, and the MLP x + a to x + a + m, also where the two run side by side.
    """

    def attach(self) -> Iterator[Any]:
        self.distance: dict[AxisKey, float] = {}
        self._found: dict[AxisKey, Tensor] = {}
        self._added: dict[AxisKey, Tensor] = {}
        for axis in self.axes:
            if axis.kind in (ATTENTION, MLP):
                yield watch(axis.sites[0], self._on_addition(axis))
        for i, layer in enumerate(self.anatomy.layers):
            yield layer.register_forward_hook(self._on_layer(i), with_kwargs=True)

    def _on_addition(self, axis: Axis):
        def see(y_BTD: Tensor) -> None:
            self._added[axis.key] = y_BTD.detach()

        return see

    def _on_layer(self, i: int):
        def hook(module, args, kwargs, output):
            x_BTD = args[0] if args else kwargs["hidden_states"]
            y_BTD = output[0] if isinstance(output, tuple) else output
            x_BTD = x_BTD.to(y_BTD.device)
            scale = self._scale
            if (i, ATTENTION) in self._added:
                after_BTD = x_BTD + scale * self._added.pop((i, ATTENTION))
                self._add((i, ATTENTION), x_BTD, after_BTD)
            if (i, MLP) in self._added:
                before_BTD = y_BTD - scale * self._added.pop((i, MLP))
                self._add((i, MLP), before_BTD, y_BTD)

        return hook

    @property
    def _scale(self) -> float:
        """What Granite multiplies additions to the residual stream with."""
        model: Any = self.anatomy.model
        return getattr(model.config, "residual_multiplier", 1.0)

    def _add(self, key: AxisKey, x_BTD: Tensor, y_BTD: Tensor) -> None:
        distance = Distance.COSINE.between(x_BTD, y_BTD) * len(x_BTD)
        self._found[key] = self._found.get(key, 0) + distance

    def sums(self) -> Iterable[Tensor]:
        return self._found.values()

    def finish(self, num_windows: int) -> None:
        self.distance = {key: float(sum_) / num_windows for key, sum_ in self._found.items()}

    def values(self):
        for (layer, kind), distance in self.distance.items():
            yield f"the output of {kind} in layer {layer}", distance


def depth(work: Work) -> Iterator[PruningStep]:
    """Remove layers or sublayers in place, to at most the target, in one step."""
    settings: DepthSettings = work.settings
    anatomy, target = work.anatomy(), work.targets[-1]
    limits = _limits(settings, anatomy, target)
    if target >= anatomy.amount:
        yield PruningStep(0, anatomy, target=target)
        return
    began, loss, distances = time.perf_counter(), 0.0, []
    if settings.layers:
        keep = {(i, LAYERS): torch.zeros(1, dtype=torch.bool) for i in _given(settings, anatomy)}
    else:
        find = by_influence if settings.criterion == "block-influence" else by_loss
        found, loss, distances = find(work, anatomy, limits)
        scores = {key: torch.tensor([value], dtype=torch.float64) for key, value in found.items()}
        alike = units_alike(limits.axes(anatomy), scores)
        removal = Removal(anatomy, build_chains(anatomy, alike, limits))
        remove_ranked(removal, target)
        keep = removal.keep_masks(scores)
    collected = time.perf_counter()
    anatomy = work.apply(Cut(work.decide(keep)))
    yield PruningStep(
        step=1,
        anatomy=anatomy,
        layer_importance=normalise(distances) if distances else [],
        layer_distance=distances,
        loss=loss,
        seconds={"collect": collected - began, "cut": time.perf_counter() - collected},
        target=target,
    )


def by_influence(work: Work, anatomy: Anatomy, limits: Limits) -> LayerScores:
    """Block influence: 1 - mean over tokens of the cosine between the residual stream before and
    after (ShortGPT, equation 1), all in the whole model."""
    axes, windows_BT = limits.axes(anatomy), work.calibration.draw()
    observers = _observers(work.settings)
    with collect(
        work.model, anatomy, windows_BT, observers, axes=axes, how=work.how,
        on_progress=work.progress_of(len(windows_BT)),
    ) as statistics:  # fmt: skip
        distances = statistics[LayerDistance].distance
    of_all = {(i, LAYERS): distance for i, distance in enumerate(distances)}
    for observer in observers:
        if isinstance(observer, SublayerDistance):
            of_all |= observer.distance
    return {axis.key: 1 + of_all[axis.key] for axis in axes}, 0.0, distances


def by_loss(work: Work, anatomy: Anatomy, limits: Limits) -> LayerScores:
    """The order in which a greedy search removes: always that without which the loss is lowest,
    until the target is met (SLEB, algorithm 1). What it leaves scores above all that it removes."""
    axes, windows_BT, how = limits.axes(anatomy), work.calibration.draw(), work.how

    def loss_without(silent: Sequence[Axis]) -> float:
        with ExitStack() as stack:
            for site in (site for axis in silent for site in axis.sites):
                stack.callback(silence(site).remove)
            with collect(work.model, anatomy, windows_BT, [Loss()], axes=axes, how=how) as found:
                return found.loss

    before, gone = loss_without([]), []
    while anatomy.cost.total(dict.fromkeys([axis.key for axis in gone], 0)) > work.targets[-1]:
        candidates, losses = _may_go_next(axes, gone), []
        for axis in candidates:
            losses.append(loss_without([*gone, axis]))
            work.on_progress(len(losses) / len(candidates))
        gone.append(candidates[work.decide(losses.index(min(losses)))])
    touched = {axis.layer for axis in gone}
    scores = {axis.key: float(len(axes) + (axis.layer not in touched)) for axis in axes}
    return scores | {axis.key: float(i) for i, axis in enumerate(gone)}, before, []


def _may_go_next(axes: Sequence[Axis], gone: Sequence[Axis]) -> list[Axis]:
    """Those that are still there, but for the last layer of which nothing went."""
    lost = {axis.layer for axis in gone if axis.kind == LAYERS}
    touched = {axis.layer for axis in gone}
    untouched = {axis.layer for axis in axes} - touched
    last = untouched if len(untouched) == 1 else set()
    keys = {axis.key for axis in gone}
    return [axis for axis in axes if axis.key not in keys and axis.layer not in lost | last]


def silence(site: Site) -> Any:
    """Let what passes the output of a site be zero. Returns the handle of the hook."""

    def hook(module, args, output):
        if isinstance(output, tuple):
            return torch.zeros_like(output[0]), *output[1:]
        return torch.zeros_like(output)

    return site.module.register_forward_hook(hook)


def _observers(settings: DepthSettings) -> list[Observer]:
    if settings.layers:
        return []
    if settings.criterion == "perplexity":
        return [Loss()]
    return [LayerDistance(), *([SublayerDistance()] if "sublayers" in settings.cut else [])]


def _given(settings: DepthSettings, anatomy: Anatomy) -> list[int]:
    count = len(anatomy.layers)
    for layer in settings.layers:
        if not -count <= layer < count:
            raise InvalidSettings(f"layers: the model has layers 0 to {count - 1}; got {layer}.")
    return sorted({layer % count for layer in settings.layers})


def size_without_layers(settings: DepthSettings, anatomy: Anatomy) -> int | None:
    """Parameters that the model has without the layers that the settings name, if they do."""
    if not settings.layers:
        return None
    return anatomy.parameters({(layer, LAYERS): 0 for layer in _given(settings, anatomy)})


def _limits(settings: DepthSettings, anatomy: Anatomy, target: int) -> Limits:
    limits = limits_of(settings, anatomy, CAN_CUT)
    if not settings.layers:
        check_reachable(anatomy, target, limits)
        return limits
    given = _given(settings, anatomy)
    left = anatomy.cost.total(dict.fromkeys([(layer, LAYERS) for layer in given], 0))
    names = ", ".join(map(str, given))
    if settings.cut != ("layers",):
        raise InvalidSettings(
            f"layers: whole layers are named, so cut must be layers; got {', '.join(settings.cut)}."
        )
    if len(given) == len(anatomy.layers):
        raise InvalidSettings("layers: one has to stay; got all of them.")
    if both := limits.protected_layers.intersection(given):
        raise InvalidSettings(
            f"layers and protect_layers: layer {min(both)} cannot both go and stay."
        )
    if left > target:
        raise InvalidTarget(
            f"Without layers {names} the model has {anatomy.resource.written(left)}, above the "
            f"target of {target:,}. Name more layers, or a larger target, or none."
        )
    return limits


def outline(settings: DepthSettings, anatomy: Anatomy, target: int) -> Outline:
    _limits(settings, anatomy, target)
    return Outline([target] if target < anatomy.amount else [], _observers(settings))


def check_phases(settings: DepthSettings, num_phases: int | None) -> None:
    if settings.layers and num_phases != 1:
        raise InvalidSettings(
            "layers: the layers named go at once, and their numbers then mean others; take "
            "--phases 1."
        )


METHOD = Method(
    run=depth,
    settings=DepthSettings,
    summary="Whole layers, or attention and MLPs, that the model misses least.",
    paper="arXiv:2403.03853, arXiv:2402.09025",
    cuts=CAN_CUT,
    needs="forward",
    presets=PRESETS,
    outline=outline,
    size=size_without_layers,
    check_phases=check_phases,
)
