"""Types of settings: every number is finite and has an upper limit that means something.

A limit is far above every useful value, and far below the values that fill the memory or overflow.
NaN, infinity, true and false are not accepted as numbers.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import AfterValidator, AllowInfNan, BeforeValidator, TypeAdapter, ValidationError

from .errors import InvalidSettings, shortened, shown

MAX_SEED = 2**32 - 1
"""The largest that torch, numpy and Python's random all take."""
MAX_TOKENS = 10**15
MAX_WINDOW = 10_000_000
"""Tokens of one sequence; the longest contexts have a tenth of it."""


def _not_a_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


_finite = AllowInfNan(False)
_number = BeforeValidator(_not_a_switch)  # last, or limits would not be in the JSON schema

Seed = Annotated[int, Ge(0), Le(MAX_SEED), _number]
Rounds = Annotated[int, Ge(1), Le(10_000), _number]
"""Times that something is done again as a whole."""
Runs = Annotated[int, Ge(1), Le(1_000), _number]
"""Seeds of a comparison."""
BatchSize = Annotated[int, Ge(1), Le(65_536), _number]
"""Sequences at once."""
Windows = Annotated[int, Ge(1), Le(1_000_000), _number]
Length = Annotated[int, Ge(2), Le(MAX_WINDOW), _number]
"""Tokens of a window in which something is to be predicted."""
NumTokens = Annotated[int, Ge(1), Le(MAX_WINDOW), _number]
"""Tokens of a part of a sequence."""
Documents = Annotated[int, Ge(1), Le(1_000_000_000), _number]
Steps = Annotated[int, Ge(1), Le(1_000_000_000), _number]
"""Optimizer steps."""
Budget = Annotated[int, Ge(1), Le(MAX_TOKENS), _number]
"""Tokens to train on in all."""
BatchTokens = Annotated[int, Ge(2), Le(1_000_000_000), _number]
Width = Annotated[int, Ge(1), Le(1_000_000), _number]
"""Neurons, tokens of a vocabulary, or other entries along a side of a matrix."""
SampleNumber = Annotated[int, Ge(0), Le(1_000_000_000), _number]
"""Number of one of a pool, from 0 on."""
Rank = Annotated[int, Ge(0), Le(65_536), _number]
Shots = Annotated[int, Ge(0), Le(1_000), _number]
Layer = Annotated[int, Ge(-10_000), Le(10_000), _number]
"""Number of a decoder layer; negative from the end."""

Share = Annotated[float, Ge(0), Le(1), _finite, _number]
ShareBelowOne = Annotated[float, Ge(0), Lt(1), _finite, _number]
PartBelowOne = Annotated[float, Gt(0), Lt(1), _finite, _number]
"""A share that is neither nothing nor all."""
Amplitude = Annotated[float, Ge(0), Le(1_000), _finite, _number]
Ridge = Annotated[float, Ge(1e-12), Le(1e6), _finite, _number]
"""Relative to the mean of a diagonal."""
LearningRate = Annotated[float, Gt(0), Le(10), _finite, _number]
LearningRateOrZero = Annotated[float, Ge(0), Le(10), _finite, _number]
Decay = Annotated[float, Ge(0), Le(100), _finite, _number]
Norm = Annotated[float, Ge(1e-9), Le(1e9), _finite, _number]
Temperature = Annotated[float, Ge(0.01), Le(1_000), _finite, _number]
Factor = Annotated[float, Ge(1e-6), Le(1e6), _finite, _number]
Weight = Annotated[float, Ge(0), Le(1e12), _finite, _number]
"""Of one of several, on any scale."""
Nats = Annotated[float, Gt(0), Le(1e6), _finite, _number]
LossValue = Annotated[float, Ge(-1e6), Le(1e6), _finite, _number]
Hours = Annotated[float, Gt(0), Le(1e6), _finite, _number]


def _whole_above_one(value: float) -> float:
    if value > 1 and value != round(value):
        raise ValueError("must be a whole number of items, or a share below 1")
    return value


Limit = Annotated[float, Gt(0), Le(1e9), _finite, _number, AfterValidator(_whole_above_one)]
"""Items, or their share below 1."""

Name = Annotated[str, Len(1, 4096)]
"""A name or a path: a file system takes no longer one."""

T = TypeVar("T")


def checked_value(kind: type[T], name: str, value: Any) -> T:
    """Check one value that is no field of settings.

    Raises:
        InvalidSettings: saying what it must be.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise InvalidSettings(about(name, error.errors()[0])) from None


def about(name: str, problem: Any) -> str:
    """One sentence about a value that pydantic refuses."""
    return f"{name}: {message_of(problem)}; got {shown(problem['input'])}."


def first_problem(error: ValidationError) -> str:
    """Where in a file something is wrong, and what: "steps.3.loss: Input should be ..."."""
    problem = error.errors()[0]
    place = shortened(".".join(map(str, problem["loc"]))) or "its content"
    return f"{place}: {message_of(problem)}"


def message_of(problem: Any) -> str:
    """What pydantic says is wrong with a value, without its preface."""
    return problem["msg"].removeprefix("Value error, ")
