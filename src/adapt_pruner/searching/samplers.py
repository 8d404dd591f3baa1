"""Optuna's samplers, seeded anew for every trial.

So the proposal for trial n depends on the seed, n and the trials that are known, and on nothing
else: a study that goes on after a kill repeats no proposal, nor do workers repeat each other's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler

from .request import SearchSettings
from .space import Space

FIRST_TRIALS = 10
"""Random trials before the first that is proposed, and before the first that is stopped early."""


class SeededSampler(BaseSampler):
    """Makes a sampler for each trial from a seed."""

    def __init__(self, make: Callable[[int], BaseSampler], seed: int):
        self.make, self.seed = make, seed
        self.inner = make(seed)

    def reseed_rng(self) -> None:
        self.inner.reseed_rng()

    def before_trial(self, study: Any, trial: Any) -> None:
        self.inner = self.make((self.seed * 1_000_003 + trial.number) % 2**32)
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(self, study, trial, param_name, param_distribution) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study, trial, state, values) -> None:
        self.inner.after_trial(study, trial, state, values)


def make_sampler(search: SearchSettings, space: Space, seed: int) -> BaseSampler:
    """The sampler that the settings name."""
    if search.sampler == "grid":
        grid = {name: of.grid() for name, of in space.items()}
        return GridSampler(grid, seed=seed)  # all workers visit one grid in one order
    if search.sampler == "random":
        return SeededSampler(lambda seed: RandomSampler(seed=seed), seed)
    return SeededSampler(
        lambda seed: TPESampler(seed=seed, n_startup_trials=FIRST_TRIALS, multivariate=True), seed
    )


def make_pruner(search: SearchSettings) -> optuna.pruners.BasePruner:
    """What stops trials early."""
    if not search.early_stop:
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(n_startup_trials=FIRST_TRIALS)
