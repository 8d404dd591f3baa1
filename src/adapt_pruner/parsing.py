"""JSON and YAML from files that anybody may have written: bounded before a parser sees them.

Parsers recurse into nested values, and some of them end the whole process when the stack is full. A
YAML file of a kilobyte may stand for a value of gigabytes through aliases. So depth, and the number
of values that aliases stand for, are counted first, without recursion.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from .errors import shortened, shown

MAX_DEPTH = 100
"""Of nested lists and mappings."""
MAX_VALUES = 200_000
"""In a YAML file, aliases counted as often as they are used."""

_JSON_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class ParsingError(ValueError):
    """Why a text is no value: a clause that follows the name of its place and "is"."""


def parse_json(content: bytes, allow_nan: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        allow_nan: take NaN and Infinity, which are no JSON but written by some programs.

    Raises:
        ParsingError: if it is not JSON, not Unicode, or nested too deeply.
    """
    check_depth(content)
    try:
        text = content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise ParsingError("not UTF-8 text") from error
    try:
        value = json.loads(text, parse_constant=float if allow_nan else _refuse_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise ParsingError(f"not valid JSON: {error.msg} ({where})") from error
    except ParsingError:
        raise
    except ValueError as error:  # a number of too many digits
        raise ParsingError("not valid JSON: a number has too many digits") from error
    if _SURROGATE.search(content):
        _check_text(value)
    return value


def _refuse_constant(name: str) -> Any:
    raise ParsingError(f"not valid JSON: {name} is no number of it")


def check_depth(content: bytes) -> None:
    """Raise ParsingError if JSON text nests too deeply."""
    if content.count(b"[") + content.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for bracket in _BRACKET.finditer(_JSON_STRING.sub(b"", content)):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_DEPTH:
            raise ParsingError(f"nested more than {MAX_DEPTH} levels deep")


def _check_text(value: Any) -> None:
    """Raise ParsingError for text with half of a surrogate pair, which no file can hold."""
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            todo += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            todo += one
        elif isinstance(one, str) and one != one.encode("utf-8", "ignore").decode("utf-8"):
            raise ParsingError(f"not Unicode text: {shown(one)} holds half of a character")


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ParsingError: if it is not YAML, nested too deeply, or stands for too large a value.
    """
    try:
        _check_events(text)
        value = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ParsingError(f"not YAML: {shortened(str(error.problem))}{line}") from error
    except yaml.YAMLError as error:
        raise ParsingError("not a text file in UTF-8") from error
    except ParsingError:
        raise
    except (ValueError, TypeError, RecursionError) as error:  # a date or a number that is none
        raise ParsingError("not YAML: a number or date in it is none") from error
    _check_text(value)
    return value


def _check_events(text: str) -> None:
    """Look at the structure alone: no value is built."""
    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []  # anchor, and values counted before
    values = depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ParsingError(f"not YAML: alias '{event.anchor}' stands for itself or nothing")
            values += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            depth, values = depth + 1, values + 1
            open_.append((event.anchor, values))
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = values - before + 1
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if depth > MAX_DEPTH:
            raise ParsingError(f"nested more than {MAX_DEPTH} levels deep")
        if values > MAX_VALUES:
            raise ParsingError(f"too large: it stands for more than {MAX_VALUES:,} values")
