"""Files for other engines (GGUF, for llama.cpp and what is built on it), and commands to serve.

What needs the package gguf, an extra, is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import MissingExtra
from .commands import GgufCommands as GgufCommands

if TYPE_CHECKING:
    from .gguf_file import Export as Export
    from .gguf_file import Fallback as Fallback
    from .gguf_file import export_gguf as export_gguf
    from .size import FileBytes as FileBytes

_HOMES = {
    "Export": ".gguf_file",
    "Fallback": ".gguf_file",
    "export_gguf": ".gguf_file",
    "FileBytes": ".size",
}


def __getattr__(name: str):
    if name in _HOMES:
        try:
            return getattr(import_module(_HOMES[name], __name__), name)
        except ModuleNotFoundError as error:
            raise MissingExtra(
                f"GGUF files need the package '{error.name}': pip install 'adapt-pruner[gguf]'."
            ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
