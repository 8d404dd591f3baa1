"""One trial: settings proposed, units chosen, a value found."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ..api import prune
from ..data import CalibrationData
from ..methods import build_settings, method_named
from ..methods.ada_pruner import (
    AdaPrunerSettings,
    check_enough,
    chosen_samples,
    combine,
    keep_masks,
    sample_pool,
)
from ..methods.base import Limits, limits_of
from ..model.anatomy import Anatomy
from ..model.axes import Axis, AxisKey
from ..score.collect import Pass
from ..settings import PruneSettings
from .measuring import Validation, can_mask, masked
from .pool import Pool, choose, first_order, grouped
from .request import SearchSettings
from .space import Space


@dataclass
class Bench:
    """What all trials work on. The model is the dense one again after every trial."""

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    target: int
    settings: PruneSettings
    search: SearchSettings
    space: Space
    calibration: CalibrationData
    validation: Validation
    pool: Pool | None = None
    """Of ada-pruner alone."""

    @cached_property
    def group_P(self) -> Tensor:
        assert self.pool is not None
        return grouped(self.pool, self.search.describe, self.search.groups, self.settings.seed)

    def settings_of(self, values: Mapping[str, Any]) -> PruneSettings:
        """The settings that values of the space stand for; samples are told from groups."""
        own = {k: v for k, v in values.items() if k != "draw" and not k.startswith("group ")}
        settings = build_settings(self.settings, **own)
        if "draw" in values:
            assert self.pool is not None
            check_enough(len(self.pool), settings.windows, settings.window_length)
            weights = [values[f"group {g}"] for g in range(self.search.groups)]
            samples = choose(self.group_P, weights, values["draw"], settings.windows)
            settings = build_settings(settings, samples=samples)
        return settings

    def keep(self, settings: AdaPrunerSettings) -> dict[AxisKey, Tensor]:
        """The units that `ada-pruner` would keep, from what is known of the pool."""
        assert self.pool is not None
        method_named(settings.method).outline(settings, self.anatomy, self.target)
        limits, axes = self._limits(settings)
        samples = list(chosen_samples(settings, len(self.pool)))
        terms: dict[str, Any] = dict(self.pool.terms(samples))
        if settings.alpha_fine * settings.factor_first:
            how = Pass(settings.micro_batch_size, settings.gradient_checkpointing)
            windows_BT = self.pool.windows_PT[samples]
            terms["first"] = first_order(self.model, self.anatomy, axes, windows_BT, how)
        else:
            terms["first"] = terms["coarse"]  # which counts for nothing
        here = {axis.key for axis in axes}
        terms = {name: {k: v for k, v in of.items() if k in here} for name, of in terms.items()}
        scores = combine(terms, settings)
        return keep_masks(self.anatomy, scores, self.target, limits, settings.allocation)

    def _limits(self, settings: PruneSettings) -> tuple[Limits, list[Axis]]:
        limits = limits_of(settings, self.anatomy, method_named(settings.method).cuts)
        return limits, limits.axes(self.anatomy)

    def values_of(self, settings: PruneSettings):
        """The objective of the model that these settings make, on growing parts of the text."""
        axes = self._limits(settings)[1]
        if (
            isinstance(settings, AdaPrunerSettings)
            and settings.compensation == "none"
            and can_mask(self.anatomy, axes)
        ):
            with masked(axes, self.keep(settings)):
                yield from self.validation.grows(self.model)
            return
        model = copy.deepcopy(self.model)
        prune(
            model, self.tokenizer, params=self.target, calibration=self._data(settings),
            settings=settings,
        )  # fmt: skip
        yield from self.validation.grows(model)

    def _data(self, settings: PruneSettings) -> CalibrationData:
        """The documents are read and tokenised once for all trials."""
        of = self.calibration
        return CalibrationData(
            of.documents, of.window_length, settings.windows, of.seed, settings.redraw, of.source
        )


def pool_windows(settings: PruneSettings, calibration: CalibrationData) -> Tensor | None:
    """(P, T) of ada-pruner; other methods draw windows. Raises CalibrationError if too few."""
    if not isinstance(settings, AdaPrunerSettings):
        return None
    windows_PT = sample_pool(calibration, settings.pool)
    check_enough(len(windows_PT), settings.windows, settings.window_length)
    return windows_PT
