"""A small English corpus that every Python installation carries: Python's own documentation.

The documents are the help topics of :mod:`pydoc_data.topics` and the docstrings of the standard
library, read from the source files without importing them. Nothing is downloaded, so the corpus
serves offline examples and tests; its exact contents follow the running Python version.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics

SPLITS = ("train", "heldout")

_MIN_CHARACTERS = 600
_SKIPPED_DIRECTORIES = {
    "__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests",
    "turtledemo",
}  # fmt: skip


def documents(split: str) -> list[str]:
    """Returns the documents of `split` ("train" or "heldout"), sorted by document name.

    About one document in ten is held out. The choice depends on the document's name alone (a
    topic such as "for" or a module such as "asyncio.queues"), so it is the same everywhere.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return [text for name, text in _corpus() if _is_heldout(name) == (split == "heldout")]


@lru_cache(maxsize=1)
def _corpus() -> tuple[tuple[str, str], ...]:
    """Returns the (name, text) pairs of all documents, sorted by name."""
    return tuple(sorted([*topics.items(), *_standard_library()]))


def _is_heldout(name: str) -> bool:
    """Returns whether the document called `name` is held out from training."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0


def _standard_library() -> Iterator[tuple[str, str]]:
    """Yields (module name, docstrings joined with blank lines) for each well documented module."""
    root = Path(sysconfig.get_path("stdlib"))
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = set(subdirectories) - _SKIPPED_DIRECTORIES
        for path in (Path(directory, file) for file in files if file.endswith(".py")):
            source = path.read_bytes()
            # Parsing takes nearly all the time, and half of the files quote too little to be kept.
            quoted = source.replace(b"'''", b'"""').split(b'"""')[1::2]
            if sum(map(len, quoted)) < _MIN_CHARACTERS:
                continue
            text = "\n\n".join(_docstrings(_parse(source)))
            if len(text) >= _MIN_CHARACTERS:
                module = path.relative_to(root).with_suffix("")
                yield ".".join(module.parts).removesuffix(".__init__"), text


def _parse(source: bytes) -> ast.Module:
    """Returns the syntax tree of a source file, an empty one for a file that is not valid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return ast.Module(body=[], type_ignores=[])


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yields the docstrings of a module, and of its classes and functions, in source order."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
        yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from _docstrings(child)
