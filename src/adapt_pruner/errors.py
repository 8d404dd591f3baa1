"""The errors that users meet. Each says what is wrong, the value received and what to do."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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
    """Calibration text is missing, malformed, empty or too short, or does not fit the tokenizer."""


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


class NotConverged(AdaptPrunerError, ArithmeticError):
    """A training has not brought about what it was for."""


class Interrupted(AdaptPrunerError):
    """The user stopped a run; says what is kept."""


def near_match(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name nearest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""


class _Short(reprlib.Repr):
    """Looks at the outermost parts of a value only: a small file can describe an endless one."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxother = 2, 80
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 4
        self.maxstring = 120

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 256:
            return f"{'-' * (x < 0)}<a number of {int(x.bit_length() * 0.30103) + 1} digits>"
        return repr(x)

    def repr_str(self, x: str, level: int) -> str:
        text = repr(x[: self.maxstring])
        return text if len(x) <= self.maxstring else f"{text[:-1]}...{text[-1]}"


def shown(value: Any, most: int = 120) -> str:
    """A value as messages show it: shortened, however large or deep it is, and printable. A path
    stands without quotation marks.

    >>> shown([[[[1]]]]), shown(10**4000), shown(Path("a" * 300), 10)
    ('[[[...]]]', '<a number of 4001 digits>', 'aaaaaaa...')
    """
    return shortened(str(value) if isinstance(value, Path) else _Short().repr(value), most)


def shortened(text: str, most: int = 120) -> str:
    """The beginning of a text on one line, printable."""
    text = " ".join(text[: 2 * most].split()).encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= most else f"{text[: most - 3]}..."
