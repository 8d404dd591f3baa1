"""The errors that users meet. Each says what is wrong, the value received and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdaptPrunerError(Exception):
    """Base of all errors meant for the user; the command line prints it as one message."""


class UnsupportedModel(AdaptPrunerError, ValueError):
    """The model's architecture, or the form its weights are in, cannot be pruned."""


class InvalidTarget(AdaptPrunerError, ValueError):
    """The size asked for is malformed or cannot be reached."""


class InvalidSettings(AdaptPrunerError, ValueError):
    """A setting has a value that it cannot have."""


class DataError(AdaptPrunerError, ValueError):
    """Text to read is missing, malformed, empty or too short, or does not fit the tokenizer."""


class CalibrationError(DataError):
    """The same of the calibration text."""


class EvaluationError(AdaptPrunerError, ValueError):
    """What is to be measured is unknown, or its data is missing or does not fit."""


class MissingExtra(AdaptPrunerError, ImportError):
    """A feature needs a package that is not installed."""


class LoadingError(AdaptPrunerError, OSError):
    """A model or tokenizer cannot be read."""


class WritingError(AdaptPrunerError, OSError):
    """A result cannot be written."""


class NonFiniteError(AdaptPrunerError, ArithmeticError):
    """A loss, gradient or activation is NaN or infinite."""


class Interrupted(AdaptPrunerError):
    """The user stopped a run; says what is kept."""


def near_match(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name nearest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""
