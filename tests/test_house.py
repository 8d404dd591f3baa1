"""Sizes that keep the code readable: of files, of functions, and of calls without names."""

from __future__ import annotations

import ast
from collections import defaultdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import adapt_pruner

SOURCE = Path(adapt_pruner.__file__).parent
ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted(ROOT.glob("benchmarks/*.py"))
FILES = sorted([*SOURCE.rglob("*.py"), *ROOT.glob("tests/*.py"), *BENCHMARKS])

LONGEST_FILE, LONGEST_FUNCTION = 350, 50
MOST_POSITIONAL = 6


def too_long(tree: ast.AST) -> list[str]:
    """Functions of more lines than allowed; decorators do not count."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f"{f.name} in line {f.lineno}": f.end_lineno - f.lineno + 1 for f in functions}
    return [name for name, length in lengths.items() if length > LONGEST_FUNCTION]


def unnamed(tree: ast.AST) -> list[str]:
    """Calls with more positional arguments than a reader can tell apart."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        f"{ast.unparse(call.func)} in line {call.lineno}"
        for call in calls
        if len(call.args) > MOST_POSITIONAL
    ]


def test_files_are_short():
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {file.name: count for file, count in lines.items() if count > LONGEST_FILE} == {}


@pytest.mark.parametrize("find", [too_long, unnamed])
def test_source(find):
    trees = {
        file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(SOURCE.rglob("*.py"))
    }
    found = {str(file.relative_to(SOURCE)): find(tree) for file, tree in trees.items()}
    assert {file: places for file, places in found.items() if places} == {}


OF_EACH = {"METHOD", "PRESETS", "CAN_CUT", "RECIPE_KEYS", "T", "outline", "command", "show"}
"""Names that several modules give to the same thing of theirs: its row, its command."""


def names_of(tree: ast.Module) -> set[str]:
    """What a module defines for others: classes, functions, constants, names of types."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            each = [part for target in targets for part in getattr(target, "elts", [target])]
            found |= {name.id for name in each if isinstance(name, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def test_a_name_means_one_thing():
    places = defaultdict(list)
    for file in sorted(SOURCE.rglob("*.py")):
        for name in names_of(ast.parse(file.read_text(encoding="utf-8"))):
            places[name].append(str(file.relative_to(SOURCE)))
    several = {name: files for name, files in places.items() if len(files) > 1}
    assert {name: files for name, files in several.items() if name not in OF_EACH} == {}


def test_what_is_too_long_is_found():
    body = "\n".join(["    pass"] * LONGEST_FUNCTION)
    assert too_long(ast.parse(f"def long():\n{body}")) == ["long in line 1"]
    assert unnamed(ast.parse("a.b(1, 2, 3, 4, 5, 6, 7)\nc(1, 2, 3, 4, 5, *rest, d=7)")) == [
        "a.b in line 1"
    ]


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_benchmarks_import_what_there_is(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adapt_pruner"):
            module = import_module(str(node.module))
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert [name for name in missing if not find_spec(f"{node.module}.{name}")] == []
