"""What a pruning run gives back: the model, and the account of how it came about."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .model.anatomy import WIDTH_OF, Anatomy
from .settings import PruneSettings

GroupKey = tuple[int, str]
PRUNING_FILE = "pruning.json"


@dataclass(frozen=True)
class Size:
    """Parameters of a model, tied ones counted once."""

    total: int
    decoder_layers: int

    @classmethod
    def of(cls, anatomy: Anatomy) -> Size:
        return cls(anatomy.total_parameters, anatomy.layer_parameters)

    @property
    def other(self) -> int:
        """Embeddings, final norm and head: what is never cut."""
        return self.total - self.decoder_layers


@dataclass
class StepRecord:
    """One step in figures, as it goes into run.json."""

    step: int
    parameters: int
    loss: float
    layer_importance: list[float]
    layer_distance: list[float]
    widths: list[dict[str, int]]
    seconds: dict[str, float]


@dataclass
class PruningResult:
    """A pruned model and the account of how it came about."""

    model: Any
    tokenizer: Any
    settings: PruneSettings
    target: int
    """Most parameters allowed for the whole model."""
    before: Size
    after: Size
    widths_before: list[dict[str, int]]
    widths_after: list[dict[str, int]]
    kept: dict[GroupKey, Tensor]
    """Per group, the units that stayed, as indices into the units before pruning, ascending."""
    steps: list[StepRecord] = field(default_factory=list)
    seconds: float = 0.0
    measurements: dict[str, dict[str, float]] = field(default_factory=dict)
    """What was measured before and after, such as {"perplexity": {"before": 7., "after": 9.}}."""
    protocol: dict[str, Any] = field(default_factory=dict)
    """On what text it was measured, and how: `run.protocol`."""
    previous: dict[str, Any] | None = None
    """The record of an earlier pruning of the same model, if it had one."""
    training: dict[str, Any] | None = None
    """The account of recovery training, if there was any."""

    @property
    def sparsity(self) -> float:
        """Share of the decoder layers' parameters that was removed."""
        return 1 - self.after.decoder_layers / self.before.decoder_layers

    def record(self) -> dict[str, Any]:
        """What was cut, as it is written to pruning.json."""
        layers: dict[str, dict[str, Any]] = {}
        for (layer, kind), kept in self.kept.items():
            units = self.widths_before[layer][WIDTH_OF[kind]]
            layers.setdefault(str(layer), {})[kind] = {"units": units, "kept": kept.tolist()}
        return {
            "format": 1,
            "target_parameters": self.target,
            "sparsity": self.sparsity,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "settings": self.settings.model_dump(mode="json"),
            "layers": layers,
            "previous": self.previous,
        }

    def save(self, directory: str | Path, portable: bool = False, overwrite: bool = False) -> Path:
        """Write a checkpoint that plain transformers loads. See `checkpoint.save_result`."""
        from .checkpoint import save_result
        from .claims import claimed

        with claimed(Path(directory)):
            return save_result(self, directory, portable=portable, overwrite=overwrite)
