"""Imports point down the flow of data: a module imports its own layer's, or those further down."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import adapt_pruner

ROOT = Path(adapt_pruner.__file__).parent

LAYERS = [
    {"errors"},
    {"durable", "figures", "limits", "markup", "parsing", "precision", "processes", "registry"},
    {"files"},
    {"cache", "claims"},
    {"model"},
    {"data", "score"},
    {"allocate", "compensate"},
    {"settings"},
    {"methods", "evaluation"},
    {"result"},
    {"api", "goal", "plan", "inspection", "export", "latency"},
    {"report"},
    {"checkpoint"},
    {"run"},
    {"recovery", "comparison", "searching"},
    {"cli"},
]
"""From the bottom up."""
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

KNOWN = {
    ("result", "checkpoint"),  # result.save(directory) reads better than save(result, directory)
}
"""Imports that point up: (module, what it imports). A list to shrink: none may be added."""


def name_of(file: Path) -> str:
    """Such as "model.axes"; of a package, its own name."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(file: Path) -> set[str]:
    """Names inside the package of all that a file imports, at the top or in a function; what is
    imported for type checkers alone does not count."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    ignored = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for child in ast.walk(statement)
    }
    package = list(file.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(tree):
        if id(node) in ignored:
            continue
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif (node.module or "").split(".")[0] == "adapt_pruner":
                base = []
            else:
                continue
            module = (node.module or "").removeprefix("adapt_pruner").strip(".")
            base += module.split(".") if module else []
            for alias in node.names:
                whole = ROOT.joinpath(*base, alias.name)
                is_module = whole.is_dir() or whole.with_suffix(".py").is_file()
                found.add(".".join([*base, alias.name] if is_module else base))
        elif isinstance(node, ast.Import):
            inside = (alias.name for alias in node.names if alias.name.startswith("adapt_pruner."))
            found.update(name.removeprefix("adapt_pruner.") for name in inside)
    return found - {""}


def imports() -> set[tuple[str, str]]:
    files = [file for file in ROOT.rglob("*.py") if file.parent != ROOT or file.stem[:2] != "__"]
    return {(name_of(file), imported) for file in files for imported in imports_of(file)}


def layer(name: str) -> str:
    return name.split(".")[0]


def test_every_module_has_a_layer():
    assert {layer(name) for pair in imports() for name in pair} <= RANK.keys()


def test_imports_point_down():
    up = {pair for pair in imports() if RANK[layer(pair[0])] < RANK[layer(pair[1])]}
    assert up - KNOWN == set(), "imports that point up the flow of data"
    assert KNOWN - up == set(), "these are mended: take them off the list"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from ..model import axes", {"model.axes"}),
        ("def f():\n    from ..model.axes import Axis", {"model.axes"}),
        ("from . import observers", {"score.observers"}),
        ("from .. import api\nimport adapt_pruner.report.page", {"api", "report.page"}),
        ("from adapt_pruner.cli import main\nimport json", {"cli.main"}),
        ("if TYPE_CHECKING:\n    from ..api import prune\nelse:\n    from ..run import x", {"run"}),
    ],
)
def test_imports_are_found(tmp_path, monkeypatch, source, found):
    for path in ("api.py", "run.py", "cli/main.py", "model/axes.py", "score/observers.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "score" / "file.py").write_text(source)
    monkeypatch.setattr("test_layering.ROOT", tmp_path)
    assert imports_of(tmp_path / "score" / "file.py") == found
