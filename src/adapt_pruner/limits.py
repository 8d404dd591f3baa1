"""Types of settings: every number is finite and has an upper limit that means something.

A limit is far above what anybody has use for, and far below what fills a memory or overflows. NaN
and infinity are refused by type, and true and false are no numbers.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import AllowInfNan, BeforeValidator, TypeAdapter, ValidationError

from .errors import InvalidSettings, shown

MAX_SEED = 2**32 - 1
"""The largest that torch, numpy and Python's random all take."""
MAX_TOKENS = 10**15
MAX_WINDOW = 10_000_000
"""Tokens of one sequence; the longest contexts have a tenth of it."""


def _not_a_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


_number = BeforeValidator(_not_a_switch)

Whole = Annotated[int, _number]
"""A whole number; limits are to be added."""
Finite = Annotated[float, AllowInfNan(False), _number]
"""A number that is neither NaN nor infinite; limits are to be added."""

Seed = Annotated[Whole, Ge(0), Le(MAX_SEED)]
Rounds = Annotated[Whole, Ge(1), Le(10_000)]
"""Times that something is done again as a whole."""
Batch = Annotated[Whole, Ge(1), Le(65_536)]
"""Sequences at once."""
Windows = Annotated[Whole, Ge(1), Le(1_000_000)]
Length = Annotated[Whole, Ge(2), Le(MAX_WINDOW)]
"""Tokens of a window in which something is to be predicted."""
Tokens = Annotated[Whole, Ge(1), Le(MAX_WINDOW)]
"""Tokens of a part of a sequence."""
Documents = Annotated[Whole, Ge(1), Le(1_000_000_000)]
Steps = Annotated[Whole, Ge(1), Le(1_000_000_000)]
"""Optimizer steps."""
Budget = Annotated[Whole, Ge(1), Le(MAX_TOKENS)]
"""Tokens to train on in all."""
BatchTokens = Annotated[Whole, Ge(2), Le(1_000_000_000)]
Width = Annotated[Whole, Ge(1), Le(1_000_000)]
"""Neurons, tokens of a vocabulary, or other entries along a side of a matrix."""
Rank = Annotated[Whole, Ge(0), Le(65_536)]
Shots = Annotated[Whole, Ge(0), Le(1_000)]
Layer = Annotated[Whole, Ge(-10_000), Le(10_000)]
"""Number of a decoder layer; negative from the end."""

Share = Annotated[Finite, Ge(0), Le(1)]
ShareBelowOne = Annotated[Finite, Ge(0), Lt(1)]
PartBelowOne = Annotated[Finite, Gt(0), Lt(1)]
"""A share that is neither nothing nor all."""
Amplitude = Annotated[Finite, Ge(0), Le(1_000)]
Ridge = Annotated[Finite, Ge(1e-12), Le(1e6)]
"""Relative to the mean of a diagonal."""
LearningRate = Annotated[Finite, Ge(1e-12), Le(10)]
LearningRateOrZero = Annotated[Finite, Ge(0), Le(10)]
Decay = Annotated[Finite, Ge(0), Le(100)]
Norm = Annotated[Finite, Ge(1e-9), Le(1e9)]
Temperature = Annotated[Finite, Ge(0.01), Le(1_000)]
Factor = Annotated[Finite, Ge(1e-6), Le(1e6)]
Weight = Annotated[Finite, Ge(0), Le(1e12)]
"""Of one of several, on any scale."""
Nats = Annotated[Finite, Gt(0), Le(1e6)]
Loss = Annotated[Finite, Ge(-1e6), Le(1e6)]
Hours = Annotated[Finite, Gt(0), Le(1e6)]
Limit = Annotated[Finite, Ge(1e-9), Le(1e9)]
"""Items, or their share below 1."""

Name = Annotated[str, Len(1, 4096)]
"""A name or a path: a file system takes no longer one."""

T = TypeVar("T")


def checked(kind: type[T], name: str, value: Any) -> T:
    """Check one value that is no field of settings.

    Raises:
        InvalidSettings: saying what it must be.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        raise InvalidSettings(f"{name}: {message_of(problem)}; got {shown(value)}.") from None


def message_of(problem: Any) -> str:
    """What pydantic says is wrong with a value, without its preface."""
    return problem["msg"].removeprefix("Value error, ")
