"""Values that are wrong almost anywhere, and files that are: made from the settings' own
declarations, so that a new setting or file is tried without a line of test.

`benchmarks/reliability.py` counts over the same calls what the tests assert.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import adapt_pruner
from adapt_pruner.data.calibration import read_documents
from adapt_pruner.data.mixture import Mixture, Source, read_mixture
from adapt_pruner.data.reading import read_rows
from adapt_pruner.errors import AdaptPrunerError
from adapt_pruner.inspection import inspect_model
from adapt_pruner.model.loading import empty_model
from adapt_pruner.settings import PruneSettings

DEEP = 100_000
NO_NUMBERS = {
    "not a number": float("nan"),
    "infinity": float("inf"),
    "minus infinity": float("-inf"),
    "huge": 10**40,
    "minus huge": -(10**40),
    "huge float": 1e300,
    "5,000 digits": "9" * 5_000,
    "NaN as text": "nan",
    "infinity as text": "-inf",
    "switch": True,
}
NO_TEXTS = {
    "empty": "",
    "list": [],
    "mapping": {},
    "number": 7,
    "long": "é" * 100_000,
    "half a character": "\ud800",
    "nested": [[[[[[[["x"]]]]]]]],
    "bytes": b"\xff\xfe",
    "NUL": "a\0b",
}
WRONG = {**NO_NUMBERS, **NO_TEXTS, "words": "some words", "HTML": "<b>x</b>", "nothing": None}


@dataclass(frozen=True)
class Call:
    """A wrong call: `run` must raise an AdaptPrunerError, or return if `may_pass`."""

    name: str
    run: Callable[[], Any]
    may_pass: bool = False


def settings_models() -> list[type[BaseModel]]:
    """Every model of settings in the package: what people write and name."""
    for module in pkgutil.walk_packages(adapt_pruner.__path__, "adapt_pruner."):
        if not module.name.endswith(("__main__", ".report.page")):
            importlib.import_module(module.name)
    found, todo = [Source, Mixture], BaseModel.__subclasses__()
    while todo:
        model = todo.pop()
        todo += model.__subclasses__()
        is_ours = model.__module__.startswith("adapt_pruner.")
        if is_ours and model.__name__.endswith("Settings") and model not in found:
            found.append(model)
    return sorted(found, key=lambda model: model.__name__)


def is_number(schema: dict[str, Any]) -> bool:
    return schema.get("type") in ("integer", "number")


def arms(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """What a field may hold: the alternatives of a union, and the items of a list."""
    found = [schema] if "anyOf" not in schema else list(schema["anyOf"])
    more = [one["items"] for one in found if isinstance(one.get("items"), dict)]
    more += [
        one["additionalProperties"]
        for one in found
        if isinstance(one.get("additionalProperties"), dict)
    ]
    return found + more


def wrong_settings() -> Iterator[Call]:
    """Every field of every model, with every wrong value."""
    for model in settings_models():
        base = {"path": "pydocs"} if model is Source else {}
        base = {"sources": ["pydocs"]} if model is Mixture else base
        base = {"method": "adapt-pruner"} if issubclass(model, PruneSettings) else base
        for field, schema in model.model_json_schema()["properties"].items():
            parts = arms(schema)
            values = dict(WRONG)
            for part in filter(is_number, parts):
                low = part.get("minimum", part.get("exclusiveMinimum"))
                high = part.get("maximum", part.get("exclusiveMaximum"))
                if low is not None and high is not None:
                    values |= {"below": low - 1, "above": high * 2 + 1}
            numeric = all(is_number(part) or part.get("type") == "null" for part in parts)
            for what, value in values.items():
                must = what in (*NO_NUMBERS, "below", "above", "list", "mapping", "words", "empty")
                yield Call(
                    f"{model.__name__}.{field}: {what}",
                    lambda m=model, v={**base, field: value}: build(m, v),
                    may_pass=not (numeric and must),
                )


def build(model: type[BaseModel], values: dict[str, Any]) -> Any:
    """Make settings the way the package does, so that errors come as users see them."""
    from adapt_pruner import settings as plain
    from adapt_pruner.recovery.settings import RecoverySettings, make_recovery_settings

    if model is RecoverySettings:
        return make_recovery_settings(**values)
    if model in (Mixture, Source):
        return read_mixture({"sources": [values]} if model is Source else values)
    return plain.build(model, values)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n"
    for a, b in zip("abcdefghijklmnop", "bcdefghijklmnopq", strict=True)
)
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "binary": bytes(range(256)) * 8,
    "half a bracket": b'{"text": [',
    "deep list": b"[" * DEEP + b"]" * DEEP,
    "deep mapping": b'{"text": ' * DEEP + b"1" + b"}" * DEEP,
    "deep and open": b'{"text": ' * DEEP,
    "deep in a list": b'[{"text": ' + b"[" * DEEP + b"]" * DEEP + b"}]",
    "digits": b'{"text": ' + b"9" * 5_000 + b"}",
    "NaN": b'{"text": NaN}',
    "infinite": b'{"text": 1e999}',
    "half a character": b'{"text": "\\ud800"}',
    "a list": b'["text"]',
    "a number": b"7",
    "null": b"null",
    "a string": b'"text"',
    "UTF-16": '{"text": "x"}'.encode("utf-16"),
    "YAML bomb": BOMB.encode(),
    "YAML circle": b"a: &a [*a]",
    "YAML date": b"a: 2024-99-99",
    "YAML object": b"a: !!python/object/apply:os.system ['true']",
    "YAML deep": b"- " * 5_000 + b"x",
    "long": b"x" * (2 << 20),
}


def wrong_files(directory: Path, llama: Path, run: Path, every: int = 1) -> Iterator[Call]:
    """Every file that the package reads, with every wrong content.

    Args:
        llama: directory of a model; run: directory of a run of `prune`.
        every: of the wrong values inside a file, take each so-manieth.
    """
    readers = text_readers()
    for number, (what, content) in enumerate(TEXTS.items()):
        for suffix, name, read in readers:
            file = directory / f"{number}{suffix}"
            if not file.exists():
                file.write_bytes(content)
            yield Call(f"{name}: {what}", lambda f=file, r=read: r(f), may_pass=True)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        yield from _damaged(directory, llama, name, _inspect, every)
    for name in ("run.json", "pruning.json", "recipe.yaml", "config.json"):
        yield from _damaged(directory, run, name, _report, every)


def text_readers() -> list[tuple[str, str, Callable[[Path], Any]]]:
    """Suffix, name and reader of what users write."""
    from adapt_pruner.cli.options import read_recipe
    from adapt_pruner.comparison.variants import make_variants, read_methods
    from adapt_pruner.report.record import read_run  # noqa: F401
    from adapt_pruner.report.scores import _File, parse

    def variants(file: Path) -> Any:
        return make_variants((), read_methods(file))

    return [
        (".yaml", "recipe", lambda file: read_recipe(file, {"sparsity": (float, int)})),
        (".yaml", "variants", variants),
        (".yaml", "mixture", read_mixture),
        (".jsonl", "calibration", lambda file: list(read_documents(str(file)))),
        (".json", "calibration", lambda file: list(read_documents(str(file)))),
        (".txt", "calibration", lambda file: list(read_documents(str(file)))),
        (".parquet", "calibration", lambda file: list(read_documents(str(file)))),
        (".jsonl", "training data", lambda file: list(read_rows(str(file)))),
        (".json", "training data", lambda file: list(read_rows(str(file)))),
        (".txt", "training data", lambda file: list(read_rows(str(file)))),
        (".json", "evaluation", lambda file: parse(_File, file)),
    ]


def _inspect(directory: Path) -> Any:
    return inspect_model(empty_model(str(directory)))


def _report(directory: Path) -> str:
    from adapt_pruner.report.page import render
    from adapt_pruner.report.record import read_run

    return render([read_run(directory)])


def _damaged(
    directory: Path, source: Path, name: str, read: Callable[[Path], Any], every: int
) -> Iterator[Call]:
    """A directory in which one file is of every wrong content."""
    place = directory / f"{source.name}-{name}"
    if not place.exists():
        place.mkdir()
        for file in source.iterdir():
            if file.name != name:
                (place / file.name).symlink_to(file)

    def run(content: bytes) -> Any:
        (place / name).write_bytes(content)
        return read(place)

    for what, content in TEXTS.items():
        yield Call(f"{name}: {what}", lambda c=content: run(c), may_pass=True)
    if not name.endswith(".json"):
        return
    whole = json.loads((source / name).read_text())
    wrong = {k: v for k, v in WRONG.items() if k not in ("bytes", "long")}
    pairs = product(_leaves(whole), wrong.items())
    for path, (what, value) in islice(pairs, 0, None, every):
        yield Call(
            f"{name}: {'.'.join(map(str, path))} is {what}",
            lambda p=path, v=value: run(json.dumps(_with(whole, p, v)).encode()),
            may_pass=True,
        )


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to values: all keys, and of lists the first item."""
    if len(path) > 4:
        return
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and value:
        yield from _leaves(value[0], (*path, 0))


def _with(whole: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = deepcopy(whole)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@dataclass(frozen=True)
class Verdict:
    """How a call ended: "refused" in one sentence, "passed", or "bad", and why."""

    outcome: str
    why: str = ""


def judge(call: Call) -> Verdict:
    """Make a call and judge its end."""
    try:
        call.run()
    except AdaptPrunerError as error:
        text = str(error)
        for sign in ("Traceback", "object has no attribute", "unexpected keyword"):
            if sign in text:
                return Verdict("bad", f"Python's own words: {text[:200]}")
        if len(text) > 800 or "\n" in text or not text.rstrip().endswith((".", "?", ")")):
            return Verdict("bad", f"not a sentence: {text[:200]}... ({len(text)})")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return Verdict("bad", f"cannot be printed: {text[:200]!r}")
        return Verdict("refused")
    except Exception as error:
        return Verdict("bad", f"{type(error).__name__}: {error}"[:300])
    return Verdict("passed") if call.may_pass else Verdict("bad", "passed in silence")
