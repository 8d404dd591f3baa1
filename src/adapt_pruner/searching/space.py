"""The space that is searched: names with what each of them can be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import InvalidSettings, near_match, shown
from ..methods.ada_pruner import FACTORS, AdaPrunerSettings
from ..settings import PruneSettings, build
from .request import SearchSettings

OF_THE_POOL = {
    "method", "calibration", "text_column", "max_documents", "seed", "pool", "samples", "dtype",
    "device", "device_map",
}  # fmt: skip
"""Settings that decide what the samples are; all trials share them."""
GRID_POINTS = 3
"""Values of a range that a grid tries."""
MOST_POINTS = 100_000
"""Of a grid, which is in memory as a whole."""


@dataclass(frozen=True)
class Choices:
    """One of several values."""

    values: tuple[Any, ...]

    def suggest(self, trial: Any, name: str) -> Any:
        # By number: what a study stores of a choice must be a plain value.
        return self.values[trial.suggest_categorical(name, list(range(len(self.values))))]

    def grid(self) -> list[Any]:
        return list(range(len(self.values)))

    def record(self) -> dict[str, Any]:
        return {"choice": list(self.values)}

    def value_of(self, stored: Any) -> Any:
        return self.values[stored]


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def suggest(self, trial: Any, name: str) -> Any:
        suggest = trial.suggest_int if self.whole else trial.suggest_float
        return suggest(name, self.low, self.high, log=self.log)

    def grid(self) -> list[Any]:
        low, high = (math.log(x) if self.log else x for x in (self.low, self.high))
        points = [low + (high - low) * i / (GRID_POINTS - 1) for i in range(GRID_POINTS)]
        values = [min(max(math.exp(x) if self.log else x, self.low), self.high) for x in points]
        return list(dict.fromkeys(round(x) if self.whole else x for x in values))

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def value_of(self, stored: Any) -> Any:
        return stored


Space = dict[str, Choices | Range]


def make_space(
    settings: PruneSettings, search: SearchSettings, extra: Mapping[str, Any], layers: int = 0
) -> Space:
    """All that is searched: the parts of `ada-pruner` that `search` names, and `extra`.

    Args:
        layers: decoder layers of the model.

    Raises:
        InvalidSettings: if that is nothing, or a range is malformed.
    """
    space: Space = {}
    is_ours = isinstance(settings, AdaPrunerSettings)
    if is_ours and search.over in ("both", "samples"):
        if search.groups > settings.pool:
            raise InvalidSettings(
                f"groups: a pool of {settings.pool:,} samples has at most so many groups; got "
                f"{search.groups:,}."
            )
        space.update({f"group {i}": Range(0.0, 1.0) for i in range(search.groups)})
        space["draw"] = Choices(tuple(range(search.draws)))
    if is_ours and search.over in ("both", "importance"):
        space.update(dict.fromkeys(("alpha_coarse", "alpha_fine"), Range(0.0, 1.0)))
        space.update({name: Choices(v) for name, v in FACTORS[settings.alignment].items()})
    if search.layer_spread:
        if not is_ours or settings.allocation != "even":
            raise InvalidSettings(
                "layer_spread: layers have shares of their own in the method ada-pruner with "
                f"--allocation even; got {search.layer_spread:g} with {settings.method}"
                f"{', ' + settings.allocation if is_ours else ''}."
            )
        share = Range(1 - search.layer_spread, 1 + search.layer_spread)
        space.update({f"layer {i}": share for i in range(layers)})
    space.update(parse_space(extra, settings, search.costs))
    if not any(len(of.grid()) > 1 for of in space.values()):
        raise InvalidSettings(
            "The search space is empty: give settings a range in the recipe, such as `space: "
            "{ridge: {low: 0.001, high: 0.1, log: true}}`, or take --over both."
        )
    points = math.prod(len(of.grid()) for of in space.values())
    if search.sampler == "grid" and points > MOST_POINTS:
        raise InvalidSettings(
            f"sampler: a grid over this space has {points:,} points, more than {MOST_POINTS:,}. "
            "Search less at once (--over, --draws), or take tpe or random."
        )
    return space


def parse_space(
    section: Mapping[str, Any], settings: PruneSettings, costs: Sequence[str] = ()
) -> Space:
    """The `space` of a recipe: settings of the method, each a list of values or a mapping with low,
    high and perhaps log. Whole numbers on both ends mean whole numbers. Where the model's costs
    are objectives, `sparsity` can be searched, too.

    Raises:
        InvalidSettings: naming the first setting that is unknown, or whose values it cannot have.
    """
    space: Space = {}
    known = set(type(settings).model_fields) - OF_THE_POOL
    for name, said in section.items():
        if name == "sparsity":
            space[name] = _parsed_sparsity(said, costs)
            continue
        if name not in known:
            why = "all trials share it" if name in OF_THE_POOL else "there is no such setting"
            raise InvalidSettings(
                f"space: {shown(str(name))} cannot be searched: {why}."
                f"{near_match(str(name)[:100], known)}"
            )
        space[name] = _parsed(name, said)
        for value in _ends(space[name]):
            build(type(settings), {**settings.model_dump(), name: value})
    lengths = space.get("window_length")
    if isinstance(settings, AdaPrunerSettings) and isinstance(lengths, Range):
        raise InvalidSettings(
            "space: window_length must be a list, such as [64, 128], because a pool is scored for "
            f"each length; got {shown(section['window_length'])}."
        )
    return space


def _parsed_sparsity(said: Any, costs: Sequence[str]) -> Choices | Range:
    if not costs:
        raise InvalidSettings(
            "space: sparsity can be searched with several objectives alone, such as --objective "
            "perplexity,bytes; with one, the smallest cut is always the best. Name one --sparsity."
        )
    found = _parsed("sparsity", said)
    for value in _ends(found):
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise InvalidSettings(f"space: sparsity must be from 0 to below 1; got {shown(value)}.")
    return Range(found.low, found.high, found.log) if isinstance(found, Range) else found


def lengths_of(settings: PruneSettings, space: Space) -> list[int]:
    """Tokens per sample that trials can ask for: of a range, both ends."""
    found = space.get("window_length")
    return list(_ends(found)) if found else [settings.window_length]


def greatest(of: Choices | Range) -> Any:
    """The largest value."""
    return max(_ends(of))


def _parsed(name: str, said: Any) -> Choices | Range:
    if isinstance(said, list) and said:
        return Choices(tuple(said))
    if isinstance(said, Mapping) and {"low", "high"} <= said.keys() <= {"low", "high", "log"}:
        low, high, log = said["low"], said["high"], said.get("log", False)
        numbers = all(type(x) in (int, float) and math.isfinite(x) for x in (low, high))
        if numbers and isinstance(log, bool) and low <= high and not (log and low <= 0):
            return Range(low, high, log, whole=isinstance(low, int) and isinstance(high, int))
    raise InvalidSettings(
        f"space: {name} must be a list of values, or {{low: 0.001, high: 0.1}}, with log: true "
        f"where its magnitude is searched; got {shown(said)}."
    )


def _ends(of: Choices | Range) -> tuple[Any, ...]:
    return of.values if isinstance(of, Choices) else (of.low, of.high)
