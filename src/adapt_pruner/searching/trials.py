"""One trial: settings proposed, units chosen, a value found."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..allocate.target import resolve_target
from ..api import prune
from ..methods import build_settings, method_named
from ..methods.ada_pruner import (
    WEIGHTED,
    AdaPrunerSettings,
    chosen_samples,
    combine,
    keep_masks,
)
from ..methods.base import Limits, limits_of, pass_of
from ..model.anatomy import Anatomy
from ..model.axes import Axis, AxisKey
from ..model.edits import Cut
from ..score.collect import Pass
from ..settings import PruneSettings
from .costs import costs_of
from .measuring import Validation, can_mask, masked
from .pool import choose, first_order
from .request import SearchSettings
from .samples import Samples
from .space import Space


@dataclass
class Bench:
    """What all trials work on. The model is the dense one again after every trial."""

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    target: int
    """Parameters of the whole model, where the space does not say it."""
    settings: PruneSettings
    search: SearchSettings
    space: Space
    samples: Samples
    validation: Validation
    written: torch.dtype = torch.float32
    """Of the weights in a checkpoint."""

    def settings_of(self, values: Mapping[str, Any]) -> PruneSettings:
        """The settings that values of the space stand for; samples are told from groups."""
        names = set(type(self.settings).model_fields)
        settings = build_settings(self.settings, **{k: values[k] for k in values if k in names})
        if not isinstance(settings, AdaPrunerSettings):
            return settings
        if "draw" in values:
            self.samples.calibration(settings)  # are there enough?
            weights = [values[f"group {g}"] for g in range(self.search.groups)]
            group_P = self.samples.group_P(settings)
            samples = choose(group_P, weights, values["draw"], settings.windows)
            settings = build_settings(settings, samples=samples)
        layers = [value for name, value in values.items() if name.startswith("layer ")]
        if layers and getattr(settings, "allocation", None) == "even":
            settings = build_settings(settings, layer_weights=tuple(layers))
        return settings

    def target_of(self, values: Mapping[str, Any]) -> int:
        """Parameters that the whole model may have."""
        if "sparsity" not in values:
            return self.target
        return resolve_target(self.anatomy, values["sparsity"], None)

    def keep(self, settings: AdaPrunerSettings, target: int) -> dict[AxisKey, Tensor]:
        """The units that `ada-pruner` would keep, from what is known of the pool."""
        method_named(settings.method).outline(settings, self.anatomy, target)
        limits, axes = self._limits(settings)
        pool = self.samples.pool(settings)
        samples = list(chosen_samples(settings, len(pool)))
        terms: dict[str, Any] = dict(pool.terms(samples))
        if settings.alpha_fine * settings.factor_first:
            windows_BT, how = pool.windows_PT[samples], self._how(settings)
            terms["first"] = first_order(self.model, self.anatomy, axes, windows_BT, how)
        else:
            terms["first"] = terms["coarse"]  # which counts for nothing
        here = {axis.key for axis in axes}
        terms = {name: {k: v for k, v in of.items() if k in here} for name, of in terms.items()}
        scores = combine(terms, settings)
        return keep_masks(self.anatomy, scores, target, limits, settings)

    def _how(self, settings: PruneSettings) -> Pass:
        return pass_of(settings, self.samples.compute_dtype)

    def _limits(self, settings: PruneSettings) -> tuple[Limits, list[Axis]]:
        limits = limits_of(settings, self.anatomy, method_named(settings.method).cuts)
        return limits, limits.axes(self.anatomy)

    @contextmanager
    def pruned(self, settings: PruneSettings, target: int) -> Iterator[Any]:
        """The model that these settings make: masked where that tells the same, else cut."""
        axes = self._limits(settings)[1]
        told: AdaPrunerSettings | None = None
        if isinstance(settings, AdaPrunerSettings) and can_mask(self.anatomy, axes):
            is_known = settings.compensation == "none" and settings.importance == WEIGHTED
            told = settings if is_known else None
        if told is not None and not self.search.costs:
            with masked(axes, self.keep(told, target)):
                yield self.model
            return
        model = copy.deepcopy(self.model)
        if told is not None:
            Cut(self.keep(told, target)).apply(model)
        else:
            calibration = self.samples.calibration(settings)
            prune(model, self.tokenizer, params=target, calibration=calibration, settings=settings)
        yield model

    def values_of(self, settings: PruneSettings, target: int) -> Iterator[float]:
        """The quality of the model that these settings make, on growing parts of the text."""
        with self.pruned(settings, target) as model:
            yield from self.validation.grows(model)

    def objectives_of(self, settings: PruneSettings, target: int) -> dict[str, float]:
        """Every objective by its name."""
        with self.pruned(settings, target) as model:
            quality = {self.search.quality: self.validation.measure(model)}
            return quality | costs_of(model, self.model, self.tokenizer, self.search, self.written)
