"""Settings that all pruning methods share, and those of evaluation. Each default, limit and
description stands here, or beside the method that has it, and nowhere else: the command line,
recipe files and the documentation take them from these fields."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo

from .errors import InvalidSettings, near_match, shortened, shown
from .limits import (
    BatchSize,
    Documents,
    Layer,
    Length,
    Limit,
    Name,
    NumTokens,
    Rounds,
    Seed,
    Shots,
    Width,
    Windows,
    about,
    message_of,
)
from .model.axes import CUTS
from .score.importance import IMPORTANCES


@dataclass(frozen=True)
class OneOf:
    """A name from a table that other packages may add to."""

    table: Mapping[str, Any]
    more: tuple[str, ...] = ()
    """Names that one setting knows besides."""

    @property
    def names(self) -> list[str]:
        return [*self.more, *self.table]

    def __call__(self, name: str) -> str:
        if name not in self.names:
            raise ValueError(f"there is no {shown(name)}{_hint(name[:100], self.names)}")
        return name


def _hint(name: str, known: Collection[str]) -> str:
    return f".{near_match(name, known)} Known: {', '.join(known)}"


AUTO = "auto"
"""As `multiple`, where a run is asked for: it is chosen by times, and a number in the settings."""
_importance, _cut = OneOf(IMPORTANCES), OneOf(CUTS)
ImportanceName = Annotated[str, AfterValidator(_importance), _importance]
CutName = Annotated[str, AfterValidator(_cut), _cut]
Settings = TypeVar("Settings", bound=BaseModel)


class PruneSettings(BaseModel):
    """What every pruning method is told. Methods add settings of their own, and other defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Annotated[str, Field(description="Pruning method; `adapt-pruner methods` lists them.")]

    cut: Annotated[
        tuple[CutName, ...],
        Field(
            min_length=1,
            max_length=100,
            description="What may be cut: " + ", ".join(CUTS) + ", with commas.",
        ),
    ] = ("neurons", "kv-groups")
    protect_layers: Annotated[
        tuple[Layer, ...],
        Field(
            max_length=10_000,
            description="Decoder layers that stay whole, such as 0,1,-1 (-1 is the last).",
        ),
    ] = ()
    multiple: Annotated[
        Width,
        Field(
            description="Round MLP widths and the hidden size to a multiple (hardware, "
            "quantisation); prune takes auto, too: the one that times on this machine ask for.",
        ),
    ] = 1
    layout: Annotated[
        Literal["per-layer", "uniform"],
        Field(description="Whether layers may differ in width; uniform models load everywhere."),
    ] = "per-layer"

    windows: Annotated[Windows, Field(description="Calibration windows per step.")] = 512
    window_length: Annotated[Length, Field(description="Tokens per calibration window.")] = 64
    redraw: Annotated[bool, Field(description="Draw other calibration windows at each step.")] = (
        True
    )
    calibration: Annotated[
        Name,
        Field(
            description="Calibration text: hub data set, local txt, jsonl or parquet file or "
            "directory, or 'pydocs' (Python's own documentation)."
        ),
    ] = "DKYoon/SlimPajama-6B"
    text_column: Annotated[Name, Field(description="Column of the text in tabular data.")] = "text"
    max_documents: Annotated[
        Documents, Field(description="Calibration documents to read and tokenise at most.")
    ] = 10_000
    seed: Annotated[Seed, Field(description="Seed of everything that is random.")] = 0

    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"],
        Field(description="Precision to load in; auto: float32 on CPU, else as stored."),
    ] = "auto"
    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(
            description="Precision of matrix products in passes over the calibration text, where "
            "weights are in float32; auto: bfloat16 where the hardware has it and the model has "
            "100M parameters.",
        ),
    ] = "auto"
    device: Annotated[
        Name, Field(description="Device, such as cpu, cuda:0; auto takes a GPU if there is one.")
    ] = "auto"
    device_map: Annotated[
        Name | None,
        Field(description="Spread the model over devices, as in transformers: auto, balanced."),
    ] = None
    micro_batch_size: Annotated[
        BatchSize | None,
        Field(description="Windows per forward pass; default: found automatically."),
    ] = None
    gradient_checkpointing: Annotated[
        bool, Field(description="Less memory for activations, about a third more time.")
    ] = False


Pruning = TypeVar("Pruning", bound=PruneSettings)


def with_defaults(base: type[Pruning], method: str, **defaults: Any) -> type[Pruning]:
    """A class of settings like `base`, for `method`, where some have another default.

    `base` alone says what they mean and which values they may have.
    """
    fields: dict[str, Any] = {
        "method": (Literal[method], _changed(base, "method", method)),
        **{
            name: (base.model_fields[name].annotation, _changed(base, name, value))
            for name, value in defaults.items()
            if value != base.model_fields[name].default
        },
    }
    return create_model(base.__name__, __base__=base, __module__=base.__module__, **fields)


def _changed(base: type[BaseModel], name: str, default: Any) -> FieldInfo:
    info = copy(base.model_fields[name])
    info.default = default
    return info


Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "float64"],
    Field(description="Precision to load in; auto: as stored."),
]
Device = Annotated[
    Name, Field(description="Device, such as cpu, cuda:0; auto takes a GPU if there is one.")
]


class EvaluationSettings(BaseModel):
    """How a model is measured. Everything here goes into the key under which results are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: Annotated[
        Limit | None,
        Field(description="Items per task, or documents of a text; below 1 their share."),
    ] = None
    num_fewshot: Annotated[
        Shots | None,
        Field(description="Shots of --tasks; default: the task's own. Suites have theirs."),
    ] = None
    batch_size: Annotated[
        str,
        Field(
            pattern=r"^(auto|[1-9]\d{0,4})$",
            description="Items per forward pass; auto: on a GPU what fits, on the CPU 1.",
        ),
    ] = "auto"
    max_length: Annotated[
        Length | None,
        Field(description="Longest input of --suite and --tasks; default: the model's."),
    ] = None
    window: Annotated[
        Length | None,
        Field(description="Tokens per window of --text; default: the model's, up to 2048."),
    ] = None
    stride: Annotated[
        NumTokens | None,
        Field(
            description="Tokens from one window of --text to the next; default: the window. Below "
            "it windows overlap, and each token is scored once.",
        ),
    ] = None
    text_column: Annotated[Name, Field(description="Column of --text in tabular data.")] = "text"
    seed: Annotated[
        Seed | None,
        Field(description="Seed of all that is random; default: lm-eval's 0,1234,1234,1234."),
    ] = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    device_map: Annotated[
        Name | None,
        Field(description="Spread the model over devices, as in transformers: auto, balanced."),
    ] = None

    @model_validator(mode="after")
    def _stride_within_window(self) -> EvaluationSettings:
        if self.stride and self.window and self.stride > self.window:
            raise ValueError(f"stride must be at most the window of {self.window} tokens")
        return self


class BenchSettings(BaseModel):
    """How the cost of models is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_tokens: Annotated[
        NumTokens, Field(description="Tokens read; fewer where a model's context is too short.")
    ] = 256
    new_tokens: Annotated[NumTokens, Field(description="Tokens written after them.")] = 32
    batch_size: Annotated[BatchSize, Field(description="Sequences at once.")] = 1
    repetitions: Annotated[Rounds, Field(description="Rounds, in which models take turns.")] = 7
    dtype: Dtype = "auto"
    device: Device = "auto"


class LatencySettings(BaseModel):
    """What the time of a target is measured on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: Annotated[
        Literal["decode", "prefill"],
        Field(description="What is timed: writing a token, or reading a prompt."),
    ] = "decode"
    batch_size: Annotated[BatchSize, Field(description="Sequences at once, for times.")] = 1
    context: Annotated[
        NumTokens, Field(description="Tokens in the cache, or of the prompt, for times.")
    ] = 256
    engine: Annotated[
        Literal["torch", "llama.cpp"], Field(description="What runs the model, for times.")
    ] = "torch"


def make_latency_settings(**values: Any) -> LatencySettings:
    """Build the circumstances of a time from single values. Raises as `make_settings`."""
    return build(LatencySettings, values)


def make_evaluation_settings(**values: Any) -> EvaluationSettings:
    """Build settings of an evaluation from single values. Raises as `make_settings`."""
    return build(EvaluationSettings, values)


def make_bench_settings(**values: Any) -> BenchSettings:
    """Build settings of `adapt-pruner bench` from single values. Raises as `make_settings`."""
    return build(BenchSettings, values)


def build(settings: type[Settings], values: dict[str, Any]) -> Settings:
    """Build settings from single values. Raises InvalidSettings about the first that is wrong."""
    try:
        return settings(**values)
    except ValidationError as error:
        raise InvalidSettings(explain(error, settings)) from None


def explain(error: ValidationError, settings: type[BaseModel]) -> str:
    """One sentence about the first problem that pydantic found."""
    problem = error.errors()[0]
    if not problem["loc"]:  # of several settings together
        return f"{message_of(problem)}; got {shown(problem['input'])}."
    name = shortened(str(problem["loc"][0]))
    if problem["type"] == "extra_forbidden":
        return f"There is no setting '{name}'.{near_match(name, settings.model_fields)}"
    return about(name, problem)
