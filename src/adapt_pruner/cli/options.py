"""Turn the fields of a settings model into command-line options, and back."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..errors import InvalidSettings, near_match, shown
from ..files import read_yaml
from ..limits import checked
from ..settings import PRESETS, PruneSettings, make_settings

MOST_VALUES = 100
"""Of a list in one option."""


class Count(click.ParamType):
    """A number of parameters or tokens: 350M, 1.2B, 125K or 260032."""

    name = "count"
    factors = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}  # noqa: RUF012

    def convert(self, value: Any, param, ctx) -> int:
        text = str(value).strip().lower().replace(",", "").replace("_", "")
        factor = self.factors.get(text[-1:], 1)
        try:
            count = float(text[:-1] if factor > 1 else text) * factor
        except ValueError:
            count = -1.0
        if not 1 <= count < 10**15 or (factor == 1 and count % 1):
            self.fail(
                f"expected a count such as 350M, 1.2B or 260032; got {quoted(value)}.", param, ctx
            )
        return round(count)


class Number(click.ParamType):
    """A number of one of the types in `limits`, which say how large it may be."""

    name = "number"

    def __init__(self, kind: Any, name: str = "number"):
        self.kind, self.name = kind, name

    def convert(self, value: Any, param, ctx) -> Any:
        try:
            return checked(self.kind, self.name, value)
        except InvalidSettings as error:
            self.fail(str(error).removeprefix(f"{self.name}: "), param, ctx)


class Choice(click.Choice):
    """One of several names; another name gets the nearest of them as a hint."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        known = [str(choice) for choice in self.choices]
        hint = near_match(str(value)[:100], known)
        return f"there is no {quoted(value)}.{hint} Known: {', '.join(known)}."


class Integers(click.ParamType):
    """Integers separated by commas."""

    name = "integers"

    def convert(self, value: Any, param, ctx) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in _parts(value))
        except ValueError:
            self.fail(f"expected integers such as 0,1,-1; got {quoted(value)}.", param, ctx)


class Numbers(click.ParamType):
    """Numbers separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param, ctx) -> tuple[float, ...]:
        try:
            numbers = tuple(float(part) for part in _parts(value))
        except ValueError:
            numbers = ()
        if not numbers or not all(map(math.isfinite, numbers)) or len(numbers) > MOST_VALUES:
            self.fail(
                f"expected up to {MOST_VALUES} numbers such as 0.2,0.4; got {quoted(value)}.",
                param,
                ctx,
            )
        return tuple(dict.fromkeys(numbers))


class Names(click.ParamType):
    """Names separated by commas."""

    name = "names"

    def convert(self, value: Any, param, ctx) -> tuple[str, ...]:
        names = tuple(part.strip() for part in _parts(value))
        if not names:
            self.fail(f"expected names with commas; got {quoted(value)}.", param, ctx)
        return names


def _parts(value: Any) -> list[str]:
    return [part for part in str(value).split(",") if part.strip()]


def quoted(value: Any) -> str:
    """What was typed, as messages show it."""
    return shown(str(value))


def options_of(settings: type[BaseModel], only: Sequence[str] = ()) -> Callable:
    """A decorator that adds an option for every field of `settings`, or for `only` some of them.
    Unset options are None."""

    def add(command: Callable) -> Callable:
        for name, info in reversed(settings.model_fields.items()):
            if not only or name in only:
                command = _option(name, info)(command)
        return command

    return add


settings_options = options_of(PruneSettings)


def _option(name: str, info: FieldInfo) -> Callable:
    flag = "--" + name.replace("_", "-")
    default = info.default.value if isinstance(info.default, Enum) else info.default
    shown = {(): "none", None: "automatic"}.get(default, str(default))
    if "default:" in (info.description or ""):
        shown = False
    common: dict[str, Any] = {"default": None, "help": info.description}
    kind = _without_none(info.annotation)
    if kind is bool:
        shown = "yes" if default else "no"
        return click.option(f"{flag}/--no-{flag[2:]}", show_default=shown, **common)
    return click.option(flag, type=_type(kind), show_default=shown, **common)


def _type(kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return Choice([str(choice) for choice in get_args(kind)])
    if get_origin(kind) is tuple:
        return Integers()
    if isinstance(kind, type) and issubclass(kind, Enum):
        return Choice([member.value for member in kind])
    return kind


def _without_none(annotation: Any) -> Any:
    """The type itself, without `| None` and without limits."""
    if get_origin(annotation) in (Union, types.UnionType):
        arms = get_args(annotation)
        return _without_none(next(arm for arm in arms if arm is not type(None)))
    if get_origin(annotation) is Annotated:
        return _without_none(get_args(annotation)[0])
    return annotation


_KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


def read_recipe(
    file: Path, own: dict[str, tuple[type, ...]], *more: type[BaseModel]
) -> dict[str, Any]:
    """Read a recipe: a YAML mapping of `PruneSettings`, `more` settings, and the keys in `own` with
    their types.

    Raises:
        InvalidSettings: naming the file and what is wrong in it.
    """
    recipe = read_yaml(file, "recipe", InvalidSettings) or {}
    if not isinstance(recipe, dict):
        raise InvalidSettings(
            f"Recipe '{file}' must be a mapping such as `sparsity: 0.2`; got {shown(recipe)}."
        )
    known = {*own}.union(*(model.model_fields for model in (PruneSettings, *more)))
    for key, value in recipe.items():
        if key not in known:
            raise InvalidSettings(
                f"Recipe '{file}' has an unknown key {shown(str(key))}."
                f"{near_match(str(key)[:100], known)}"
            )
        if key in own and type(value) not in own[key]:
            kinds = " or ".join(_KINDS[kind] for kind in own[key])
            raise InvalidSettings(f"Recipe '{file}': {key} must be {kinds}; got {shown(value)}.")
        if key in own and value == "":
            raise InvalidSettings(f"Recipe '{file}': {key} is empty; give it a value.")
    return recipe


def own_values(flags: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Values that are not settings, from flags or else the recipe; targets and counts as numbers.

    A target given as a flag replaces one of either kind in the recipe.
    """
    values = {k: recipe.get(k) if v is None else v for k, v in flags.items()}
    if flags["sparsity"] is not None:
        values["params"] = flags["params"]
    elif flags["params"] is not None:
        values["sparsity"] = None
    for name in ("params", "tokens"):
        if values.get(name) is not None:
            try:
                values[name] = Count().convert(values[name], None, None)
            except click.BadParameter as error:
                raise InvalidSettings(f"{name}: {error.message}") from None
    return values


def resolve_settings(
    preset: str | None, defaults: dict[str, Any], recipe: dict[str, Any], flags: dict[str, Any]
) -> PruneSettings:
    """Later ones win: the recipe's preset, `defaults`, the recipe, `preset`, the flags given.

    Whatever presets can set, a `preset` from the command line sets, whatever the recipe says.
    """
    of_presets = {name for values in PRESETS.values() for name in values} if preset else set()
    preset = preset or str(recipe.get("preset", "best"))
    from_recipe = {
        k: v for k, v in recipe.items() if k in PruneSettings.model_fields and k not in of_presets
    }
    given = {k: v for k, v in flags.items() if v is not None}
    return make_settings(preset, **{**defaults, **from_recipe, **given})


preset_option = click.option(
    "--preset", type=Choice(list(PRESETS)), default=None, show_default="best",
    help="Where settings start from: what measured best, or the paper's values.",
)  # fmt: skip

_RUN_OPTIONS = (
    click.argument("model", required=False),
    click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory to write."),
    click.option("--sparsity", type=float, help="Share of the decoder layers' parameters to cut."),
    click.option("--params", type=Count(), help="Parameters of the whole model, such as 350M."),
    preset_option,
    click.option("--recipe", type=click.Path(path_type=Path), help="YAML file; flags override it."),
    click.option("--evaluate", metavar="TEXT", help="Text to measure on, before and after."),
    click.option("--portable", is_flag=True, default=None, help="Add a modelling file (auto_map)."),
    click.option("--overwrite", is_flag=True, help="Replace the model or run that is there."),
    click.option("--dry-run", is_flag=True, help="Plan only, without weights."),
    click.option(
        "--trust-remote-code", is_flag=True, default=None, help="Run code that comes with MODEL."
    ),
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
)


def run_options(command: Callable) -> Callable:
    """A decorator that adds what every command that makes a model smaller takes."""
    for option in reversed(_RUN_OPTIONS):
        command = option(command)
    return command


def named_model(model: str | None, output: Path | None, dry_run: bool) -> str:
    """The model. Raises UsageError unless there is one, and a place for what is made of it."""
    if not model:
        raise click.UsageError("Name a MODEL: a directory, or a model on the hub.")
    if output is None and not dry_run:
        raise click.UsageError("Name the directory to write: -o DIR.")
    return model
