"""Turn the fields of a settings model into command-line options, and back."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..errors import InvalidSettings, near_match, shown
from ..figures import in_bytes, short
from ..files import read_yaml
from ..goal import CIRCUMSTANCES, TARGETS
from ..methods import DEFAULT_METHOD, METHODS, Method, make_settings, method_named, settings_fields
from ..settings import LatencySettings, OneOf, PruneSettings
from .parameters import (
    Bytes,
    Choice,
    Count,
    Duration,
    Integers,
    Names,
    Numbers,
    Several,
    WidthOrAuto,
)


def options_of(
    settings: type[BaseModel], only: Sequence[str] = (), leave_out: Sequence[str] = ()
) -> Callable:
    """A decorator that adds an option for every field of `settings`, or for `only` some of them.
    Unset options are None."""

    def add(command: Callable) -> Callable:
        for name, info in reversed(settings.model_fields.items()):
            if (not only or name in only) and name not in leave_out:
                click.decorators._param_memo(command, _option(name, info))
        return command

    return add


class MethodCommand(click.Command):
    """A command that takes the settings of one pruning method: that of --method, or of the recipe.

    `--method NAME --help` shows the settings of that method and no other's.
    """

    default_method = DEFAULT_METHOD

    def make_context(self, info_name, args: list[str], parent=None, **extra):
        self.method = _named_method(args, self.default_method)
        return super().make_context(info_name, args, parent, **extra)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        method = method_named(getattr(self, "method", self.default_method))
        presets = [_preset_option(method)] if method.presets else []
        settings = [_option(name, info) for name, info in method.settings.model_fields.items()]
        help_option = self.get_help_option(ctx)
        return [*self.params, *presets, *settings, *([help_option] if help_option else [])]


def _named_method(args: Sequence[str], default: str = DEFAULT_METHOD) -> str:
    """The method that a command line names, before it is parsed."""
    found = _value_of("--method", args)
    recipe = _value_of("--recipe", args)
    if found is None and recipe and Path(recipe).is_file():
        said = read_yaml(Path(recipe), "recipe", InvalidSettings)
        found = said.get("method") if isinstance(said, dict) else None
    method = str(found or default)
    try:
        method_named(method)
    except InvalidSettings as error:
        raise click.UsageError(f"Invalid value for '--method': {error}") from None
    return method


def _value_of(flag: str, args: Sequence[str]) -> str | None:
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
    return None


def _preset_option(method: Method) -> click.Option:
    return click.Option(
        ["--preset"], type=Choice(list(method.presets)), default=None,
        show_default=next(iter(method.presets)), help="Where settings start from.",
    )  # fmt: skip


def _option(name: str, info: FieldInfo) -> click.Option:
    flag = "--" + name.replace("_", "-")
    default = info.default.value if isinstance(info.default, Enum) else info.default
    if name == "method":
        default = DEFAULT_METHOD
    shown = {(): "none", None: "automatic"}.get(default, str(default))
    if isinstance(default, tuple) and default:
        shown = ",".join(map(str, default))
    if "default:" in (info.description or ""):
        shown = False
    common: dict[str, Any] = {"default": None, "help": info.description}
    kind = _without_none(info.annotation)
    if kind is bool:
        shown = "yes" if default else "no"
        return click.Option([f"{flag}/--no-{flag[2:]}"], show_default=shown, **common)
    return click.Option([flag], type=_type(name, kind, info), show_default=shown, **common)


def _type(name: str, kind: Any, info: FieldInfo) -> Any:
    if name == "method":
        return Choice(list(METHODS))
    if name == "multiple":
        return WidthOrAuto()
    table = next((of for of in info.metadata if isinstance(of, OneOf)), None)
    if table is not None:
        return Choice(table.names)
    if get_origin(kind) is Literal:
        return Choice([str(choice) for choice in get_args(kind)])
    if get_origin(kind) is tuple:
        of = get_args(kind)[0]
        tables = [table for table in getattr(of, "__metadata__", ()) if isinstance(table, OneOf)]
        of = _without_none(of)
        if tables or get_origin(of) is Literal:
            return Names(tables[0].names if tables else get_args(of))
        return Numbers(distinct=False) if of is float else Integers()
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


_KINDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list of them",
}


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
    known = {*own, *settings_fields()}.union(*(model.model_fields for model in more))
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

    A target given as a flag replaces one of any kind in the recipe.
    """
    values = {k: recipe.get(k) if v is None else v for k, v in flags.items()}
    if any(flags.get(name) is not None for name in TARGETS):
        values |= {name: flags[name] for name in TARGETS if name in flags}
        if flags.get("speedup") is None and flags.get("latency") is None:
            values |= {name: flags[name] for name in CIRCUMSTANCES if name in flags}
    for name, kind in _COUNTS.items():
        if (value := values.get(name)) is not None:
            try:
                many = isinstance(value, (list, tuple))
                counts = [kind.convert(each, None, None) for each in (value if many else [value])]
            except click.BadParameter as error:
                raise InvalidSettings(f"{name}: {error.message}") from None
            values[name] = counts if many else counts[0]
    return values


_COUNTS = {
    "params": Count(),
    "tokens": Count(),
    "bytes": Bytes(),
    "kv_bytes": Bytes(),
    "latency": Duration(),
}


def several_sizes(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Split a target of several sizes: name of each, such as "sparsity-0.2", -> its target."""
    for kind in TARGETS:
        sizes = values.get(kind)
        if sizes is None:
            continue
        sizes = sizes if isinstance(sizes, (list, tuple)) else [sizes]
        if not all(type(size) in (int, float) for size in sizes) or not sizes:
            raise InvalidSettings(f"{kind}: must be numbers; got {shown(sizes)}.")
        how = _WRITTEN.get(kind, "{:g}".format)
        written = [how(size) for size in sizes]
        found = dict(zip(written, sizes, strict=True))
        if len(found) < len(sizes):
            raise InvalidSettings(f"{kind}: the sizes must differ; got {', '.join(written)}.")
        return {f"{kind.replace('_', '-')}-{name}": {kind: size} for name, size in found.items()}
    return {"": {}}


def _short_bytes(count: int) -> str:
    return in_bytes(count).replace(" ", "")


_WRITTEN: dict[str, Callable[[Any], str]] = {
    "params": short,
    "bytes": _short_bytes,
    "kv_bytes": _short_bytes,
    "latency": lambda seconds: f"{1e3 * seconds:g}ms",
}
"""Targets as a part of a directory's name."""


def resolve_settings(
    preset: str | None, defaults: dict[str, Any], recipe: dict[str, Any], flags: dict[str, Any]
) -> PruneSettings:
    """Later ones win: the recipe's preset, `defaults`, the recipe, `preset`, the flags given.

    Whatever presets can set, a `preset` from the command line sets, whatever the recipe says. Of a
    recipe of another method, the settings that the method named does not have are left out.
    """
    given = {k: v for k, v in flags.items() if v is not None}
    method = method_named(str(given.get("method") or recipe.get("method") or DEFAULT_METHOD))
    of_presets = (
        {name for values in method.presets.values() for name in values} if preset else set()
    )
    of_another = "method" in given and given["method"] != recipe.get("method", DEFAULT_METHOD)
    known = set(method.settings.model_fields) if of_another else settings_fields()
    from_recipe = {k: v for k, v in recipe.items() if k in known and k not in of_presets}
    chosen = preset or (None if of_another else recipe.get("preset"))
    own = {k: v for k, v in defaults.items() if k in method.settings.model_fields}
    return make_settings(chosen, **{**own, **from_recipe, **given})


_RUN_OPTIONS = (
    click.argument("model", required=False),
    click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory to write."),
    click.option(
        "--sparsity",
        type=Several(float),
        help="Share of the decoder layers' parameters to cut. "
        "Several (0.2,0.4) in one run: the first is then a little worse than by itself.",
    ),
    click.option(
        "--params", type=Several(Count()), help="Parameters of the whole model, such as 350M."
    ),
    click.option(
        "--bytes", type=Several(Bytes()), help="Bytes of its GGUF file, such as 80MB (--quantize)."
    ),
    click.option(
        "--kv-bytes", type=Several(Bytes()), help="Bytes of KV cache per token, such as 20kB."
    ),
    click.option("--speedup", type=Several(float), help="Times as fast as it is now, such as 1.5."),
    click.option(
        "--latency", type=Several(Duration()), help="Time per token or prompt, such as 12ms."
    ),
    click.option(
        "--latency-table", metavar="FILE", help="Times of another device; default: of this one."
    ),
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
    command = options_of(LatencySettings)(command)
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


def check_before(models: Sequence[str], file: Path | None, trust_remote_code: bool) -> None:
    """Raise now what would end a measurement later: a file that cannot be written, a model that
    does not exist or is no causal language model."""
    from ..files import check_file
    from ..model.loading import check_causal, load_config

    if file is not None:
        check_file(file)
    for name in models:
        check_causal(load_config(name, trust_remote_code, prunable=False))
