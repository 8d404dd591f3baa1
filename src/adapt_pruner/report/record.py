"""Read back what a run wrote about itself."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from ..api import edits_of_record
from ..errors import LoadingError
from ..model.axes import KV_GROUPS
from ..model.loading import read_json
from ..result import PRUNING_FILE, Size, StepRecord

RUN_FILE = "run.json"
Widths = list[dict[str, int]]
T = TypeVar("T")


class Protocol(BaseModel):
    """How quality was measured: `run.protocol`."""

    text: str
    window: int
    stride: int
    max_windows: int | None = None


class Recovery(BaseModel):
    """What run.json says of recovery training."""

    tokens: int


class RunRecord(BaseModel):
    """The content of run.json."""

    format: Literal[1]
    created: str
    source_model: str | None = None
    base_model: str | None = None
    target_parameters: int
    before: Size
    after: Size
    sparsity: float
    settings: dict[str, Any]
    widths_before: Widths
    widths_after: Widths
    layers_left: list[int] | None = None
    """Original numbers of the decoder layers that are left; None: all of them."""
    steps: list[StepRecord] = []
    seconds: float
    measurements: dict[str, dict[Literal["before", "after"], float]] = {}
    protocol: Protocol | None = None
    training: Recovery | None = None
    versions: dict[str, str] = {}

    @property
    def parameters_cut(self) -> list[int]:
        """Of each original decoder layer; empty where the record does not say it."""
        left = range(len(self.before.layers)) if self.layers_left is None else self.layers_left
        after = dict(zip(left, self.after.layers, strict=False))
        return [size - after.get(i, 0) for i, size in enumerate(self.before.layers)]

    @property
    def command(self) -> str:
        """The command that made the run."""
        return "adapt-pruner accel" if self.training else "adapt-pruner prune"


class TrainingStep(BaseModel):
    """One line of training.jsonl: an optimizer step of recovery training."""

    step: int
    phase: int
    tokens: int
    """Trained on so far, over all phases."""
    loss: float
    """Nats per token."""
    learning_rate: float
    tokens_per_second: float


class Phase(BaseModel):
    """One entry of phases.json: a cut, and the training that follows it."""

    phase: int
    tokens_before: int
    parameters: int
    widths: list[Any]
    evaluation: dict[str, float] | None = None


class _Pruned(BaseModel):
    units: int
    kept: list[int]


def _kept_groups(file: Path) -> dict[int, tuple[int, list[int]]]:
    """Layer -> how many KV groups it had, and which of them stayed."""
    record = parse(dict[str, Any], file)
    found = {}
    for edit in edits_of_record(record)[:1]:
        for name, entry in (edit.get("axes") or {}).items():
            layer, _, kind = name.partition("/")
            if kind == KV_GROUPS:
                axis = _checked(_Pruned, entry, file)
                found[int(layer)] = (axis.units, axis.kept)
    return found


@dataclass
class Run:
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
    phases: list[Phase] = field(default_factory=list)

    @property
    def is_heterogeneous(self) -> bool:
        """Whether layers differ in width, so that a reader must import this package."""
        return bool(self.config.get("per_layer_config"))

    @property
    def is_portable(self) -> bool:
        """Whether it carries the code that other readers need."""
        return bool(self.config.get("auto_map"))


def read_run(directory: str | Path, name: str | None = None) -> Run:
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
    phases = directory / "phases.json"
    return Run(
        directory=directory,
        name=name or directory.resolve().name,
        record=parse(RunRecord, directory / RUN_FILE),
        recipe=_text(recipe) if recipe.is_file() else "",
        config=parse(dict[str, Any], directory / "config.json"),
        kept_groups=_kept_groups(pruning) if pruning.is_file() else {},
        training=_training_log(directory / "training.jsonl"),
        phases=parse(list[Phase], phases) if phases.is_file() else [],
    )


def _training_log(file: Path) -> list[TrainingStep]:
    if not file.is_file():
        return []
    lines = _text(file).splitlines()
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            steps.append(TrainingStep.model_validate(json.loads(line)))
        except ValueError as error:
            if number == len(lines):  # a training that was stopped may leave half a line
                break
            raise LoadingError(
                f"Line {number} of '{file}' is no training step: {line!r:.80}"
            ) from (error)
    return [step for step in steps if math.isfinite(step.loss)]


def parse(kind: type[T], file: Path) -> T:
    """Read a JSON file as `kind`, with an error that names the file and the place in it."""
    return _checked(kind, read_json(file), file)


def _checked(kind: type[T], content: Any, file: Path) -> T:
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "its content"
        raise LoadingError(
            f"'{file}' is not what it should be: {place}: {problem['msg']}. It was damaged, or "
            "comes from another version; restore it, or make the run again."
        ) from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadingError(f"'{file}' cannot be read: {error}") from error
