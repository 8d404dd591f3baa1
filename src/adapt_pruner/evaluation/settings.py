"""Settings of an evaluation: defaults, limits and descriptions, for Python and the command line."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import InvalidSettings
from ..settings import explain


class EvaluationSettings(BaseModel):
    """How a model is measured. Everything here goes into the key under which results are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: Annotated[
        float | None,
        Field(gt=0, description="Items per task, or documents of a text; below 1 their share."),
    ] = None
    num_fewshot: Annotated[
        int | None,
        Field(ge=0, description="Shots of --tasks; default: the task's own. Suites have theirs."),
    ] = None
    batch_size: Annotated[
        str,
        Field(
            pattern=r"^(auto|[1-9]\d*)$",
            description="Items per forward pass; auto: on a GPU what fits, on the CPU 1.",
        ),
    ] = "auto"
    max_length: Annotated[
        int | None,
        Field(ge=2, description="Longest input of --suite and --tasks; default: the model's."),
    ] = None
    window: Annotated[
        int | None,
        Field(ge=2, description="Tokens per window of --text; default: the model's, up to 2048."),
    ] = None
    stride: Annotated[
        int | None,
        Field(
            ge=1,
            description="Tokens from one window of --text to the next; default: the window. Below "
            "it windows overlap, and each token is scored once.",
        ),
    ] = None
    text_column: Annotated[str, Field(description="Column of --text in tabular data.")] = "text"
    seed: Annotated[
        int | None,
        Field(ge=0, description="Seed of all that is random; default: lm-eval's 0,1234,1234,1234."),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"],
        Field(description="Precision to load in; auto: as stored."),
    ] = "auto"
    device: Annotated[
        str, Field(description="Device, such as cpu, cuda:0; auto takes a GPU if there is one.")
    ] = "auto"
    device_map: Annotated[
        str | None,
        Field(description="Spread the model over devices, as in transformers: auto, balanced."),
    ] = None

    @model_validator(mode="after")
    def _stride_within_window(self) -> EvaluationSettings:
        if self.stride and self.window and self.stride > self.window:
            raise ValueError(f"stride must be at most the window of {self.window} tokens")
        return self


def make_evaluation_settings(**values: Any) -> EvaluationSettings:
    """Build settings from single values.

    Raises:
        InvalidSettings: for an unknown setting (with the nearest name) or a bad value.
    """
    try:
        return EvaluationSettings(**values)
    except ValidationError as error:
        raise InvalidSettings(explain(error, EvaluationSettings)) from None
