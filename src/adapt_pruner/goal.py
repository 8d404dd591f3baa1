"""What the user wants a model to become small enough for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .errors import InvalidSettings, InvalidTarget
from .methods import target_of
from .model.anatomy import Anatomy
from .model.resources import PARAMETERS, CacheBytes, Resource
from .settings import PruneSettings

EXAMPLES = "--sparsity 0.2, or --params 350M, or --bytes 80MB, or --kv-bytes 20kB"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A target, given in one of the ways; in none where the settings lead to a size themselves."""

    sparsity: float | None = None
    """Share of the decoder layers' parameters to remove, in [0, 1)."""
    params: int | None = None
    """Most parameters of the whole model."""
    bytes: int | None = None
    """Most bytes of the GGUF file of the whole model, stored as `quantize` says."""
    kv_bytes: int | None = None
    """Most bytes of KV cache per token, in 16-bit precision."""
    quantize: str | None = None
    """How the file stores values; default: F16."""

    @property
    def targets(self) -> dict[str, Any]:
        """The targets that are given, by name."""
        named = {name: getattr(self, name) for name in TARGETS}
        return {name: value for name, value in named.items() if value is not None}

    def resource(self, tokenizer: Any = None) -> Resource:
        """What the target limits.

        Args:
            tokenizer: a file holds it, too.

        Raises:
            InvalidTarget: for several targets.
            InvalidSettings: for an unknown quantisation, or bytes without a tokenizer.
            MissingExtra: if files of the kind asked for need a package that is not installed.
        """
        if len(self.targets) > 1:
            given = " and ".join(self.targets)
            raise InvalidTarget(f"Give the target once: {EXAMPLES}; got {given}.")
        if self.bytes is not None:
            from .export import FileBytes

            return FileBytes(self.quantize or "F16", tokenizer)
        return CacheBytes() if self.kv_bytes is not None else PARAMETERS

    def check_quantize(self) -> None:
        """Raise InvalidSettings if `quantize` says how to store a file that is not asked for."""
        if self.quantize is not None and self.bytes is None:
            raise InvalidSettings(
                f"quantize: says of what file `bytes` are meant; got {self.quantize} without bytes."
            )

    def target(self, settings: PruneSettings, anatomy: Anatomy) -> int:
        """The most that the whole model may have of the anatomy's resource. Raises InvalidTarget if
        the target is missing, malformed, or above what the model has."""
        most = next((v for name, v in self.targets.items() if name != "sparsity"), None)
        return target_of(settings, anatomy, self.sparsity, most)


TARGETS = ("sparsity", "params", "bytes", "kv_bytes")
GOAL_OPTIONS = {field.name for field in fields(Goal)}
