"""What identifies code: a hash of what modules do, and all modules of the package they import."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from .store import digest

_MODEL = ("adapt_pruner.model.loading", "adapt_pruner.model.layers")
PRUNING = ("adapt_pruner.api", "adapt_pruner.data.calibration", *_MODEL)
TEXT = ("adapt_pruner.evaluation.perplexity", *_MODEL)
TASKS = ("adapt_pruner.evaluation.lm_eval_model", *_MODEL)
"""Modules that compute figures, by the kind of figure."""

_NO_FIGURES = {
    f"adapt_pruner.{name}"
    for name in (
        "cache", "claims", "durable", "errors", "figures", "files", "limits", "parsing", "settings",
    )
}  # fmt: skip
"""Imported everywhere, and without a say in any figure; values of settings are in keys anyway."""


@lru_cache
def of_modules(roots: tuple[str, ...]) -> str:
    """Hash of the code of modules and of all that they import at their head from their package.

    Comments, docstrings and layout do not count. What a function imports when it runs does not
    either: name it as a root.
    """
    return digest({name: _content(file) for name, file in sorted(modules(roots).items())})


def modules(roots: Sequence[str]) -> dict[str, Path]:
    """Files of the modules and of those they import from their package, by name."""
    found: dict[str, Path] = {}
    waiting, tops = list(roots), {root.split(".")[0] for root in roots}
    while waiting:
        name = waiting.pop()
        spec = None if name in found or name in _NO_FIGURES else find_spec(name)
        if spec is None or not spec.origin:
            continue
        found[name] = Path(spec.origin)
        package = name if spec.submodule_search_locations is not None else spec.parent or ""
        waiting += _imports(found[name], package, tops)
    return found


def _imports(file: Path, package: str, tops: set[str]) -> Iterator[str]:
    """Modules that a file imports at its head; of `from a import b` a.b, if that is one, else a."""
    for node in _head(ast.parse(file.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in tops)
            continue
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
        if base.split(".")[0] not in tops:
            continue
        for alias in node.names:
            yield f"{base}.{alias.name}" if _is_module(base, alias.name) else base


def _head(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.Try):
            yield from _head(node.body)


def _is_module(package: str, name: str) -> bool:
    try:
        return find_spec(f"{package}.{name}") is not None
    except ModuleNotFoundError:  # the name is looked up in something that is no package
        return False


def _content(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # docstrings, and strings below a constant that describe it
            kept = [child for child in body if not _is_text(child)]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    constant = node.value if isinstance(node, ast.Expr) else None
    return isinstance(constant, ast.Constant) and isinstance(constant.value, str)
