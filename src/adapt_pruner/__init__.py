"""Make a Hugging Face causal language model smaller, to exactly the size you name.

Importing this package makes transformers able to load checkpoints whose layers differ in width.
Nothing else happens at import; the names below are imported when they are first used.
"""

from importlib import import_module

from .model import layers as _per_layer
from .model import portable as _portable

__version__ = "0.1.0"

_per_layer.register()
_portable.register_portable()

_EXPORTS = {
    "AdaptPrunerError": "errors",
    "CalibrationData": "data",
    "accel": "recovery.accel",
    "Evaluation": "evaluation",
    "EvaluationSettings": "settings",
    "PruneSettings": "settings",
    "PruningResult": "result",
    "ResultStore": "evaluation",
    "evaluate": "evaluation",
    "export_gguf": "export",
    "find_anatomy": "model.anatomy",
    "load_calibration": "data",
    "load_model": "model.loading",
    "load_tokenizer": "model.loading",
    "make_settings": "methods",
    "perplexity": "evaluation",
    "prune": "api",
    "replay": "api",
    "search": "searching",
}
__all__ = list(_EXPORTS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
