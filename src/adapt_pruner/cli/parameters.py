"""Types of command-line values: counts, numbers with limits, lists."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import click

from ..errors import InvalidSettings, near_match, shown
from ..limits import checked_value
from ..settings import AUTO

MOST_VALUES = 100
"""Of a list in one option."""


class Count(click.ParamType):
    """A number of parameters or tokens: 350M, 1.2B, 125K or 260032."""

    name = "count"
    factors = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}  # noqa: RUF012

    def convert(self, value: Any, param, ctx) -> int:
        text = str(value).strip().lower().replace(",", "").replace("_", "")
        factor = self.factors.get(text[-1:], 1)
        try:
            count = float(text[:-1] if factor > 1 else text) * factor
        except ValueError:
            count = -1.0
        if not 1 <= count < 10**15 or (factor == 1 and count % 1):
            self.fail(
                f"expected a count such as 350M, 1.2B or 260032; got {quoted(value)}.", param, ctx
            )
        return round(count)


class Bytes(click.ParamType):
    """A number of bytes: 80MB, 1.5GB, 20kB, 64MiB or 80000000."""

    name = "bytes"
    factors = {"b": 1} | {
        f"{letter}{ending}": base**power
        for power, letter in enumerate("kmgt", 1)
        for ending, base in (("b", 1000), ("ib", 1024))
    }

    def convert(self, value: Any, param, ctx) -> int:
        text = str(value).strip().lower().replace(",", "").replace("_", "")
        number = text.rstrip("bikmgt ")
        factor = self.factors.get(text[len(number) :].strip() or "b")
        try:
            count = float(number) * (factor or math.nan)
        except ValueError:
            count = math.nan
        if not 1 <= count < 10**15 or count % 1:
            self.fail(
                f"expected bytes such as 80MB, 1.5GB, 64MiB or 20kB; got {quoted(value)}.",
                param, ctx,
            )  # fmt: skip
        return round(count)


class Duration(click.ParamType):
    """A span of time with its unit: 12ms, 0.5s, 800us. Becomes seconds."""

    name = "time"
    factors = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0}  # noqa: RUF012

    def convert(self, value: Any, param, ctx) -> float:
        text = str(value).strip().lower()
        number = text.rstrip("nuµμms ")
        factor = self.factors.get(text[len(number) :].strip())
        try:
            seconds = float(number) * (factor or math.nan)
        except ValueError:
            seconds = math.nan
        if not 1e-9 <= seconds <= 1e5:
            self.fail(
                f"expected a time with its unit, such as 12ms, 0.5s or 800us; got {quoted(value)}.",
                param, ctx,
            )  # fmt: skip
        return seconds


class WidthOrAuto(click.ParamType):
    """A number, or `auto`."""

    name = "integer|auto"

    def convert(self, value: Any, param, ctx) -> Any:
        if value == AUTO:
            return value
        try:
            return click.INT.convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"expected a number or {AUTO}; got {quoted(value)}.", param, ctx)


class Number(click.ParamType):
    """A number of one of the types in `limits`, which say how large it may be."""

    name = "number"

    def __init__(self, kind: Any, name: str = "number"):
        self.kind, self.name = kind, name

    def convert(self, value: Any, param, ctx) -> Any:
        try:
            return checked_value(self.kind, self.name, value)
        except InvalidSettings as error:
            self.fail(str(error).removeprefix(f"{self.name}: "), param, ctx)


class Several(click.ParamType):
    """One value, or several with commas, which become a tuple."""

    def __init__(self, one: Any):
        self.one = click.types.convert_type(one)
        self.name = self.one.name

    def convert(self, value: Any, param, ctx) -> Any:
        if not isinstance(value, str) or "," not in value:
            return self.one.convert(value, param, ctx)
        parts = [part for part in value.split(",") if part.strip()]
        if len(parts) > MOST_VALUES:
            self.fail(f"at most {MOST_VALUES} values; got {len(parts)}.", param, ctx)
        return tuple(self.one.convert(part, param, ctx) for part in parts)


class Choice(click.Choice):
    """One of several names; another name gets the nearest of them as a hint."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        known = [str(choice) for choice in self.choices]
        hint = near_match(str(value)[:100], known)
        return f"there is no {quoted(value)}.{hint} Known: {', '.join(known)}."


class Integers(click.ParamType):
    """Integers separated by commas."""

    name = "integers"

    def convert(self, value: Any, param, ctx) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in _parts(value))
        except ValueError:
            self.fail(f"expected integers such as 0,1,-1; got {quoted(value)}.", param, ctx)


class Numbers(click.ParamType):
    """Numbers separated by commas; where they must differ, what is said again counts once."""

    name = "numbers"

    def __init__(self, distinct: bool = True):
        self.distinct = distinct

    def convert(self, value: Any, param, ctx) -> tuple[float, ...]:
        try:
            numbers = tuple(float(part) for part in _parts(value))
        except ValueError:
            numbers = ()
        if not numbers or not all(map(math.isfinite, numbers)) or len(numbers) > MOST_VALUES:
            self.fail(
                f"expected up to {MOST_VALUES} numbers such as 0.2,0.4; got {quoted(value)}.",
                param,
                ctx,
            )
        return tuple(dict.fromkeys(numbers)) if self.distinct else numbers


class Names(click.ParamType):
    """Names separated by commas, of a table if there is one."""

    name = "names"

    def __init__(self, known: Iterable[str] = ()):
        self.known = list(known)

    def convert(self, value: Any, param, ctx) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(part.strip() for part in _parts(value))
        if not names:
            self.fail(f"expected names with commas; got {quoted(value)}.", param, ctx)
        for name in names:
            if self.known and name not in self.known:
                hint, known = near_match(name[:100], self.known), ", ".join(self.known)
                self.fail(f"there is no {quoted(name)}.{hint} Known: {known}.", param, ctx)
        return names


def _parts(value: Any) -> list[str]:
    return [part for part in str(value).split(",") if part.strip()]


def quoted(value: Any) -> str:
    """What was typed, as messages show it."""
    return shown(str(value))
