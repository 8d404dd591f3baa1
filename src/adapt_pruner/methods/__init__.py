"""Pruning methods, one file each, and the table of them."""

from __future__ import annotations

from typing import Any

from ..allocate.target import resolve_target
from ..errors import InvalidSettings, near_match
from ..model.anatomy import Anatomy
from ..registry import Registry
from ..settings import PruneSettings, build
from . import (
    ada_pruner,
    adapt_pruner,
    baselines,
    depth,
    flap,
    llm_pruner,
    minitron,
    sheared_llama,
    slicegpt,
)
from .base import Limits as Limits
from .base import Method as Method
from .base import PruningStep as PruningStep
from .base import Work as Work

DEFAULT_METHOD = "adapt-pruner"

METHODS: Registry[Method] = Registry(
    "methods",
    {
        "adapt-pruner": adapt_pruner.METHOD,
        "llm-pruner": llm_pruner.METHOD,
        "flap": flap.METHOD,
        "depth": depth.METHOD,
        "uniform": baselines.UNIFORM,
        "magnitude": baselines.MAGNITUDE,
        "random": baselines.RANDOM,
        "minitron": minitron.METHOD,
        "slicegpt": slicegpt.METHOD,
        "ada-pruner": ada_pruner.METHOD,
        "sheared-llama": sheared_llama.METHOD,
    },
)
"""Other packages add to it: a `Method` as an entry point of the group `adapt_pruner.methods`."""


def method_named(name: str) -> Method:
    """Look up a method. Raises InvalidSettings with the nearest name if there is none."""
    if name not in METHODS:
        raise InvalidSettings(
            f"There is no method '{name}'.{near_match(name, METHODS)} Known: {', '.join(METHODS)}."
        )
    return METHODS[name]


def make_settings(
    preset: str | None = None, method: str = DEFAULT_METHOD, **values: Any
) -> PruneSettings:
    """Take a preset of a method, by default its first, and override some of its values.

    Raises:
        InvalidSettings: for an unknown method, preset or setting (with the nearest name), a setting
            of another method, or a bad value.
    """
    row = method_named(method)
    if preset is not None and preset not in row.presets:
        known = f"Known: {', '.join(row.presets)}." if row.presets else "It has none."
        raise InvalidSettings(
            f"{method} has no preset '{preset}'.{near_match(preset, row.presets)} {known}"
        )
    own = row.settings.model_fields
    for name in values:
        if name not in own and (owners := owners_of(name)):
            raise InvalidSettings(
                f"'{name}' is a setting of {', '.join(owners)}, not of {method}. Leave it out, or "
                "take that method."
            )
    start = row.presets[preset] if preset is not None else next(iter(row.presets.values()), {})
    return build(row.settings, {"method": method, **start, **values})


def build_settings(settings: PruneSettings, **values: Any) -> PruneSettings:
    """The same settings with other values. Raises InvalidSettings as `make_settings`."""
    return build(type(settings), {**settings.model_dump(), **values})


def target_of(
    settings: PruneSettings, anatomy: Anatomy, sparsity: float | None, most: int | None
) -> int:
    """The most that the whole model may have of what targets limit: that which is asked for, or,
    without it, that which the settings lead to. Raises InvalidTarget as `resolve_target`."""
    if sparsity is None and most is None:
        size = method_named(settings.method).size(settings, anatomy)
        if size is not None:
            return size
    return resolve_target(anatomy, sparsity, most)


def owners_of(setting: str) -> list[str]:
    """The methods that have a setting of that name."""
    return [name for name, row in METHODS.loaded() if setting in row.settings.model_fields]


def settings_fields() -> set[str]:
    """The names of all settings of all methods."""
    return {name for _, row in METHODS.loaded() for name in row.settings.model_fields}
