"""Read back what a run wrote about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt, MaxLen
from pydantic import (
    AllowInfNan,
    BaseModel,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from typing_extensions import TypedDict

from ..api import edits_of_record
from ..errors import LoadingError, shown
from ..files import MAX_JSON_BYTES, read_bytes, read_json
from ..limits import MAX_TOKENS, Documents, NumTokens, Share, Width, first_problem
from ..model.axes import ATTENTION, KV_GROUPS, LAYERS
from ..model.checks import check_sizes
from ..parsing import parse_json
from ..result import PRUNING_FILE, Size, StepRecord

RUN_FILE = "run.json"
MOST_LAYERS, MOST_PARAMETERS = 2_000, 10**15
FiniteNumber = Annotated[float, AllowInfNan(False)]
Speedup = Annotated[float, Gt(0), Le(1e12), AllowInfNan(False)]
WholeNumber = Annotated[int, Ge(0), Le(MOST_PARAMETERS)]
TokenCount = Annotated[int, Ge(0), Le(MAX_TOKENS)]
Widths = Annotated[list[dict[str, Annotated[int, Ge(0), Le(10**9)]]], MaxLen(MOST_LAYERS)]
LayerNumber = Annotated[int, Ge(0), Lt(MOST_LAYERS)]
T = TypeVar("T")


class Pair(TypedDict):
    """A figure before and after."""

    before: FiniteNumber
    after: FiniteNumber


class Protocol(BaseModel):
    """How quality was measured: `run.protocol`."""

    text: str
    window: NumTokens
    stride: NumTokens
    max_windows: Documents | None = None


class Recovery(BaseModel):
    """What run.json says of recovery training."""

    tokens: TokenCount


class Timing(BaseModel):
    """What came of a target in time: `latency.Measured`."""

    promised_speedup: Speedup
    speedup: Speedup
    dense_ms: Speedup
    ms: Speedup
    circumstances: Annotated[str, MaxLen(5_000)]


class StoredTarget(BaseModel):
    """What was asked for, and how it was met."""

    limits: Annotated[str, MaxLen(200)]
    most: WholeNumber
    reached: WholeNumber
    timing: Timing | None = None


class RunRecord(BaseModel):
    """The content of run.json."""

    format: Literal[1]
    created: str
    source_model: str | None = None
    base_model: str | None = None
    target_parameters: WholeNumber | None = None
    target: StoredTarget | None = None
    """Where it is no number of parameters."""
    before: Size
    after: Size
    sparsity: Share
    settings: dict[str, Any]
    widths_before: Widths
    widths_after: Widths
    layers_left: Annotated[list[LayerNumber], MaxLen(MOST_LAYERS)] | None = None
    """Original numbers of the decoder layers that are left; None: all of them."""
    steps: Annotated[list[StepRecord], MaxLen(100_000)] = []
    seconds: Annotated[FiniteNumber, Ge(0)]
    measurements: dict[str, Pair] = {}
    protocol: Protocol | None = None
    training: Recovery | None = None
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> RunRecord:
        count = len(self.widths_before)
        left = range(count) if self.layers_left is None else self.layers_left
        if not count or len(self.widths_after) != count or any(i >= count for i in left):
            raise ValueError("widths_before and widths_after must have an entry for each layer")
        pairs = zip(self.widths_before, self.widths_after, strict=True)
        if any(old.keys() - new.keys() for old, new in pairs):
            raise ValueError("a layer must have the same widths before and after")
        if list(left) != sorted(set(left)):
            raise ValueError("layers_left must ascend")
        for size, layers in ((self.before, count), (self.after, len(left))):
            _check_size(size, layers)
        for step in self.steps:
            figures = [step.loss, *step.layer_importance, *step.layer_distance]
            too_many = len(step.layer_importance) > count
            if too_many or step.parameters < 1 or not all(map(isfinite, figures)):
                raise ValueError("a step must leave parameters, and has finite figures per layer")
        return self

    @property
    def parameters_cut(self) -> list[int]:
        """Of each original decoder layer; empty where the record does not say it."""
        left = range(len(self.before.layers)) if self.layers_left is None else self.layers_left
        after = dict(zip(left, self.after.layers, strict=False))
        return [size - after.get(i, 0) for i, size in enumerate(self.before.layers)]

    @property
    def target_sentence(self) -> str:
        """What was asked for, and how it was met."""
        target = self.target or StoredTarget(
            limits="parameters",
            most=self.target_parameters or self.after.total,
            reached=self.after.total,
        )
        spare = target.most - target.reached
        return f"The target was {target.most:,} {target.limits}, met with {spare:,} to spare"

    @property
    def command(self) -> str:
        """The command that made the run."""
        return "adapt-pruner accel" if self.training else "adapt-pruner prune"


def _check_size(size: Size, layers: int) -> None:
    """Raise ValueError for sizes that no model has."""
    if not 0 <= size.decoder_layers <= size.total or not 0 < size.total <= MOST_PARAMETERS:
        raise ValueError(
            f"sizes must be positive, at most {MOST_PARAMETERS:,}, and that of the decoder layers "
            "a part of all"
        )
    if len(size.layers) not in (0, layers) or any(one < 0 for one in size.layers):
        raise ValueError("a size must have a count for each layer")
    if any(one < 0 for one in size.parts.values()) or sum(size.parts.values()) > size.total:
        raise ValueError("parts must be positive, and add up to the total at most")


class TrainingStep(BaseModel):
    """One line of training.jsonl: an optimizer step of recovery training."""

    step: WholeNumber
    phase: WholeNumber
    tokens: TokenCount
    """Trained on so far, over all phases."""
    loss: float
    """Nats per token."""
    learning_rate: float
    tokens_per_second: float


class StoredPhase(BaseModel):
    """One entry of phases.json: a cut, and the training that follows it."""

    phase: WholeNumber
    tokens_before: TokenCount
    tokens: TokenCount = 0
    """That it trains on."""
    parameters: WholeNumber
    widths: list[Any]
    evaluation: dict[str, FiniteNumber] | None = None


class _Pruned(BaseModel):
    units: Width
    kept: list[WholeNumber]

    @model_validator(mode="after")
    def _are_units(self) -> _Pruned:
        if any(unit >= self.units for unit in self.kept) or len(self.kept) > self.units:
            raise ValueError(f"kept: there are {self.units} units, and others are named")
        return self


class _Edit(BaseModel):
    axes: dict[Annotated[str, StringConstraints(pattern=r"^(-1|\d{1,5})/[a-z-]+$")], _Pruned] = {}


class _Pruning(BaseModel):
    """Of a pruning.json, what is read of it, in either format."""

    format: int = 1
    layers: dict[int, dict[str, Any]] = {}
    edits: list[dict[str, Any]] = []


def _kept_groups(
    file: Path, widths_before: list[dict[str, int]]
) -> dict[int, tuple[int, list[int]]]:
    """Layer -> how many KV groups it had, and which of them stayed; nothing if all did."""
    groups = [widths.get("num_key_value_heads", 0) for widths in widths_before]
    found = {layer: (number, list(range(number))) for layer, number in enumerate(groups) if number}
    records = edits_of_record(parse(_Pruning, file).model_dump())
    edits = _checked(list[_Edit], records, file)
    _check_layers(edits, len(widths_before), file)
    whole = dict(found)
    for name, axis in edits[0].axes.items() if edits else ():
        place, _, kind = name.partition("/")
        layer = int(place)
        if kind == KV_GROUPS:
            found[layer] = (axis.units, axis.kept)
        elif kind in (ATTENTION, LAYERS) and layer in found:
            found[layer] = (found[layer][0], [])
    return {} if found == whole else found


def _check_layers(edits: list[_Edit], count: int, file: Path) -> None:
    """Raise LoadingError if an edit is of a layer that the model did not have."""
    named = [int(name.partition("/")[0]) for edit in edits for name in edit.axes]
    if beyond := [layer for layer in named if layer >= count]:
        raise LoadingError(
            f"'{file}' tells of layer {beyond[0]}, but by {RUN_FILE} there are {count}: the files "
            "are not of the same run. Restore them."
        )


@dataclass
class StoredRun:
    """A run directory, read."""

    directory: Path
    name: str
    record: RunRecord
    recipe: str
    """The text of recipe.yaml."""
    config: dict[str, Any]
    kept_groups: dict[int, tuple[int, list[int]]]
    """Layer -> how many KV groups it had, and which of them stayed."""
    training: list[TrainingStep] = field(default_factory=list)
    phases: list[StoredPhase] = field(default_factory=list)

    @property
    def is_heterogeneous(self) -> bool:
        """Whether layers differ in width, so that a reader must import this package."""
        return bool(self.config.get("per_layer_config"))

    @property
    def is_portable(self) -> bool:
        """Whether it carries the code that other readers need."""
        return bool(self.config.get("auto_map"))


def read_run(directory: str | Path, name: str | None = None) -> StoredRun:
    """Read the directory of a run; its weights are not touched.

    Args:
        name: what to call it; default: the name of the directory.

    Raises:
        LoadingError: if it is not the directory of a run, or a file in it is damaged.
    """
    directory = Path(directory).expanduser()
    if not (directory / RUN_FILE).is_file():
        raise LoadingError(
            f"'{directory}' holds no {RUN_FILE}; name a directory that `adapt-pruner prune` wrote."
        )
    recipe, pruning = directory / "recipe.yaml", directory / PRUNING_FILE
    training, phases = read_training(directory)
    config = parse(dict[str, Any], directory / "config.json")
    check_sizes(str(directory), config)
    record = parse(RunRecord, directory / RUN_FILE)
    groups = _kept_groups(pruning, record.widths_before) if pruning.is_file() else {}
    return StoredRun(
        directory=directory,
        name=name or directory.resolve().name,
        record=record,
        recipe=_text(recipe) if recipe.is_file() else "",
        config=config,
        kept_groups=groups,
        training=training,
        phases=phases,
    )


def read_training(directory: Path) -> tuple[list[TrainingStep], list[StoredPhase]]:
    """What the directory of a run of recovery training tells of it; empty of another.

    Raises:
        LoadingError: if a file is damaged.
    """
    file = directory / "phases.json"
    phases = parse(list[StoredPhase], file) if file.is_file() else []
    return _training_log(directory / "training.jsonl"), phases


def _training_log(file: Path) -> list[TrainingStep]:
    if not file.is_file():
        return []
    lines = _text(file).splitlines()
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            value = parse_json(line.encode("utf-8"), allow_nan=True)
            steps.append(TrainingStep.model_validate(value))
        except ValueError as error:
            if number == len(lines):  # a training that was stopped may leave half a line
                break
            raise LoadingError(
                f"Line {number} of '{file}' is no training step: {shown(line)}. Restore the file, "
                "or remove it."
            ) from error
    return [step for step in steps if isfinite(step.loss)]


def parse(kind: type[T], file: Path) -> T:
    """Read a JSON file as `kind`, with an error that names the file and the place in it."""
    return _checked(kind, read_json(file), file)


def _checked(kind: type[T], content: Any, file: Path) -> T:
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise LoadingError(
            f"'{file}' is not what it should be: {first_problem(error)}. It was damaged, "
            "or comes from another version; restore it, or make the run again."
        ) from error


def _text(file: Path) -> str:
    try:
        return read_bytes(file, "file", LoadingError, MAX_JSON_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise LoadingError(f"'{file}' is not a text file in UTF-8.") from error
