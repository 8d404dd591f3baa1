"""The methods that are compared: names for settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import InvalidSettings, near_match, shown
from ..files import read_yaml
from ..methods import (
    DEFAULT_METHOD,
    METHODS,
    make_settings,
    method_named,
    settings_fields,
)
from ..parsing import ParsingError, parse_yaml
from ..settings import PruneSettings

VARIANTS: dict[str, dict[str, Any]] = {
    "best": {},
    "paper": {"preset": "paper"},
    "uniform": {"method": "uniform"},
    "activation-fisher": {"importance": "activation-fisher"},
    "magnitude": {"method": "magnitude"},
    "random": {"method": "random"},
}
"""Name -> settings that differ from the defaults, or from those of a `preset`. Every method of the
library is a variant under its own name, too."""
DEFAULT_VARIANTS = ("best", "paper", "uniform", "magnitude", "random")

MOST_VARIED, LONGEST_VARIANT_NAME = 100, 100


@dataclass(frozen=True)
class Variant:
    """One row of a comparison."""

    name: str
    settings: PruneSettings
    varied: tuple[tuple[str, Any], ...] = ()
    """The settings that a sweep gave it, with their values."""


def read_methods(file: Path) -> dict[str, dict[str, Any]]:
    """Read methods of one's own: a YAML mapping from names to settings.

    Raises:
        InvalidSettings: naming the file and what is wrong in it.
    """
    methods = read_yaml(file, "variants", InvalidSettings)
    if not isinstance(methods, dict) or not methods:
        raise InvalidSettings(
            f"Variants '{file}' must map names to settings, such as `mine: {{steps: 5}}`; "
            f"got {shown(methods)}."
        )
    for name, values in methods.items():
        if values is not None and not isinstance(values, dict):
            raise InvalidSettings(
                f"Variants '{file}': {shown(str(name))} must be a mapping of settings; got "
                f"{shown(values)}."
            )
        if not isinstance(name, str) or not 0 < len(name.strip()) <= LONGEST_VARIANT_NAME:
            raise InvalidSettings(
                f"Variants '{file}': a name must be text of 1 to {LONGEST_VARIANT_NAME} "
                f"characters; got {shown(name)}."
            )
    return {name: values or {} for name, values in methods.items()}


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """Read "amplitude=0,0.01,0.02" into a setting and its values, as YAML reads them.

    Raises:
        InvalidSettings: for an unknown setting, or no values.
    """
    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_")
    try:
        listed = [parse_yaml(value) for value in values.split(",") if value.strip()]
    except ParsingError:
        listed = []
    if not equals or not listed:
        raise InvalidSettings(f"A sweep reads such as amplitude=0,0.01,0.02; got {shown(text)}.")
    if len(listed) > MOST_VARIED:
        raise InvalidSettings(
            f"A sweep takes at most {MOST_VARIED} values; got {len(listed)} of {shown(name)}."
        )
    if name == "seed":
        raise InvalidSettings("Seeds are not swept but averaged over; use --seeds.")
    if name not in settings_fields():
        hint = near_match(name[:100], settings_fields())
        raise InvalidSettings(f"There is no setting {shown(name)} to vary.{hint}")
    return name, listed


def make_variants(
    names: Sequence[str],
    methods: Mapping[str, Mapping[str, Any]],
    sweeps: Iterable[tuple[str, list[Any]]] = (),
    overrides: Mapping[str, Any] | None = None,
) -> list[Variant]:
    """Build the rows: each method named, with every combination of the sweeps' values.

    Args:
        names: of `methods`; empty: all of them.
        overrides: settings that hold for all of them; a sweep's values override them.

    Raises:
        InvalidSettings: for an unknown method, setting or value.
    """
    sweeps = list(sweeps)
    count = math.prod(len(values) for _, values in sweeps)
    if count > MOST_VARIED**2:
        raise InvalidSettings(f"A grid of {count:,} settings is too large; sweep fewer values.")
    variants = []
    for name in dict.fromkeys(names or methods):
        if name not in methods:
            raise InvalidSettings(
                f"There is no method {shown(name)}.{near_match(name[:100], methods)} "
                f"Known: {', '.join(methods)}."
            )
        for values in product(*(values for _, values in sweeps)):
            varied = dict(zip((setting for setting, _ in sweeps), values, strict=True))
            chosen = {**methods[name], **_that_fit(methods[name], overrides or {}), **varied}
            try:
                settings = make_settings(chosen.pop("preset", None), **chosen)
            except InvalidSettings as error:
                raise InvalidSettings(f"Method '{name}': {error}") from None
            allocation = getattr(settings, "allocation", "adaptive")
            if "amplitude" in varied and allocation != "adaptive":
                raise InvalidSettings(
                    f"Method '{name}' has the allocation '{allocation}', on which the "
                    "amplitude has no effect; sweep it with --methods paper, or with "
                    "--allocation adaptive."
                )
            plain = settings.model_dump(mode="json", include=set(varied))
            label = ", ".join([name, *(f"{k} {_written(plain[k])}" for k in varied)])
            variants.append(Variant(label, settings, tuple((k, plain[k]) for k in varied)))
    return variants


def all_variants(own: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The names that can be compared: `own` ones, this module's, and every method's."""
    return {**{name: {"method": name} for name in METHODS}, **VARIANTS, **own}


def _that_fit(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Of settings that hold for all rows, those that the method of this one has."""
    fields = method_named(str(values.get("method", DEFAULT_METHOD))).settings.model_fields
    return {name: value for name, value in overrides.items() if name in fields}


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
