"""What to train on: sources with weights, from a file, a name, or a YAML description."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import DataError, near_match, shown
from ..files import read_yaml
from ..limits import LossValue, Name, Weight, about
from .formats import FORMATS
from .reading import EMBEDDED, READERS, local_path

FormatName = Literal[("auto", *FORMATS)]  # pyright: ignore[reportInvalidTypeForm]
_SUFFIXES = (".yaml", ".yml")


class Source(BaseModel):
    """One source of text, a domain of the mixture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Annotated[
        Name,
        Field(
            description="Hub data set, local txt, jsonl, json or parquet file or directory, or "
            "'pydocs'; relative to the mixture file.",
        ),
    ]
    name: Annotated[
        str, Field(max_length=200, description="Name of the domain; default: from the path.")
    ] = ""
    weight: Annotated[
        Weight,
        Field(strict=True, description="Share of the tokens, any scale."),
    ] = 1.0
    format: Annotated[
        FormatName,  # pyright: ignore[reportInvalidTypeForm]
        Field(description="What rows are; auto: seen from their columns."),
    ] = "auto"
    columns: Annotated[
        dict[str, str],
        Field(description="Columns of unusual names by role, such as {text: body}."),
    ] = {}
    subset: Annotated[Name | None, Field(description="Configuration of a hub data set.")] = None
    split: Annotated[Name | None, Field(description="Split of a hub data set; default: train.")] = (
        None
    )
    revision: Annotated[Name | None, Field(description="Commit or tag of a hub data set.")] = None

    @model_validator(mode="before")
    @classmethod
    def _name_from_path(cls, values: Any) -> Any:
        if isinstance(values, str):
            values = {"path": values}
        if isinstance(values, dict) and not values.get("name") and values.get("path"):
            path = Path(str(values["path"]))
            return {**values, "name": path.stem if path.suffix in READERS else path.name}
        return values

    @property
    def place(self) -> Path | None:
        """The local file or directory; None for data sets of the hub and embedded text."""
        return None if self.path == EMBEDDED else local_path(self.path)


class Mixture(BaseModel):
    """Sources and how they are mixed. Weights are normalised to a sum of one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: Annotated[
        tuple[Source, ...], Field(min_length=1, max_length=1_000, description="The domains.")
    ]
    policy: Annotated[
        Literal["fixed", "dynamic"],
        Field(
            description="Whether weights stay, or follow the loss of each domain (dynamic batch "
            "loading of Sheared-LLaMA)."
        ),
    ] = "fixed"
    reference_losses: Annotated[
        dict[Name, LossValue],
        Field(description="Loss to reach per domain, in nats; default: the source model's."),
    ] = {}
    default_chat_template: Annotated[
        Name | None,
        Field(description="Jinja file, or 'alpaca', for tokenizers without a chat template."),
    ] = None

    @property
    def weights(self) -> dict[str, float]:
        return {source.name: source.weight for source in self.sources}


def read_mixture(source: str | Path | Mapping[str, Any] | Mixture) -> Mixture:
    """Read a mixture of sources.

    Args:
        source: a YAML file; the name of a mixture that ships with the package ("adapt-llm"); or
            one source, given as the `path` of a `Source`.

    Raises:
        DataError: naming the file and what is wrong in it.
    """
    if isinstance(source, Mixture):
        return _make(source.model_dump(), "The mixture", Path())
    if isinstance(source, Mapping):
        return _make(dict(source), "The mixture", Path())
    name = str(source)
    file = Path(name).expanduser()
    if name in shipped_mixtures() and not file.exists():
        file = Path(str(_SHIPPED / f"{name}.yaml"))
    if file.suffix in _SUFFIXES:
        return _make(_read_yaml(file), f"Mixture '{file}'", file.parent)
    hint = near_match(file.name, shipped_mixtures())
    if hint and file.name == name.removeprefix("./") and not file.exists():
        raise DataError(f"There is no mixture '{name}'.{hint}")
    if name != EMBEDDED:
        local_path(name)
    return _make({"sources": [{"path": name}]}, f"'{name}'", Path())


_SHIPPED = resources.files("adapt_pruner") / "data" / "mixtures"


def shipped_mixtures() -> list[str]:
    """Names of the mixtures that ship with the package."""
    return sorted(
        file.name.removesuffix(".yaml") for file in _SHIPPED.iterdir() if ".yaml" in file.name
    )


def _read_yaml(file: Path) -> dict[str, Any]:
    content = read_yaml(file, "mixture", DataError)
    if not isinstance(content, dict):
        raise DataError(
            f"Mixture '{file}' must be a mapping such as `sources: [{{path: a.txt}}]`; "
            f"got {shown(content)}."
        )
    return content


def _make(content: dict[str, Any], name: str, directory: Path) -> Mixture:
    """Check a description, and resolve what is relative or not normalised in it."""
    try:
        mixture = Mixture(**content)
    except ValidationError as error:
        raise DataError(f"{name}: {_explain(error)}") from None
    except TypeError:
        raise DataError(f"{name}: keys must be text; got {shown(list(content))}.") from None
    sources = mixture.sources
    names = [source.name for source in sources]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise DataError(f"{name}: two sources are called '{twice[0]}'; give one another `name`.")
    if unknown := sorted(set(mixture.reference_losses) - set(names)):
        raise DataError(
            f"{name}: reference_losses names '{unknown[0]}', which is no source."
            f"{near_match(unknown[0], names)}"
        )
    total = sum(source.weight for source in sources)
    total = 1.0 if math.isclose(total, 1) else total  # what is normalised stays as it is
    if not total:
        raise DataError(f"{name}: all weights are 0; give at least one source a positive weight.")
    resolved = tuple(
        source.model_copy(
            update={"path": _resolve(source, directory, name), "weight": source.weight / total}
        )
        for source in sources
    )
    template = mixture.default_chat_template
    if template is not None and (directory / template).is_file():
        mixture = mixture.model_copy(update={"default_chat_template": str(directory / template)})
    return mixture.model_copy(update={"sources": resolved})


def _resolve(source: Source, directory: Path, name: str) -> str:
    """The path of a source, which a mixture file names from where it stands."""
    if source.path == EMBEDDED:
        return source.path
    beside = directory / Path(source.path).expanduser()
    path = str(beside) if beside.exists() else source.path
    try:
        place = local_path(path)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    for key in ("subset", "split", "revision"):
        if place is not None and getattr(source, key) is not None:
            raise DataError(
                f"{name}: '{source.path}' is local, but `{key}` is for data sets of the hub; "
                f"leave `{key}` out, or name the file."
            )
    if (roles := _roles(source.format)) and (unknown := sorted(set(source.columns) - roles)):
        raise DataError(
            f"{name}: format {source.format} has no column role '{unknown[0]}'."
            f"{near_match(unknown[0], roles)} Known: {', '.join(sorted(roles))}."
        )
    return path


def _roles(format: str) -> set[str]:
    formats = FORMATS.values() if format == "auto" else [FORMATS[format]]
    return {role for form in formats for role in form.roles}


def _explain(error: ValidationError) -> str:
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]  # a misspelt key is why another is missing
    place = [part for part in problem["loc"] if isinstance(part, str)]
    index = next((part for part in problem["loc"] if isinstance(part, int)), None)
    where = f"source {index + 1}: " if index is not None else ""
    name = ".".join(place[1:] if index is not None and len(place) > 1 else place)
    if problem["type"] == "extra_forbidden":
        known = Source.model_fields if index is not None else Mixture.model_fields
        hint = near_match(name, known)
        return f"{where}there is no key '{name}'.{hint} Known: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"{where}`{name}` is missing; add it, such as `{name}: ...`."
    if problem["type"] == "literal_error":
        known = (
            problem.get("ctx", {})["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        )
        hint = near_match(shown(problem["input"]), known)
        return f"{where}{name}: got {shown(problem['input'])}.{hint} Known: {', '.join(known)}."
    return where + about(name, problem)
