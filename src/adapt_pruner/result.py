"""What a pruning run gives back: the model, and the account of how it came about."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .model.anatomy import Anatomy
from .model.axes import AxisKey
from .model.budget import parameters_by_part
from .model.edits import Cut, Edit
from .model.resources import PARAMETERS, Resource
from .settings import PruneSettings

PRUNING_FILE = "pruning.json"


@dataclass(frozen=True)
class Size:
    """Parameters of a model, tied ones counted once."""

    total: int
    decoder_layers: int
    layers: list[int] = field(default_factory=list)
    """Of each decoder layer; empty in records of earlier versions."""
    parts: dict[str, int] = field(default_factory=dict)
    """Of attention, MLPs, embeddings and so on; they add up to the total."""

    @classmethod
    def of(cls, anatomy: Anatomy) -> Size:
        return cls(
            anatomy.total_parameters,
            anatomy.layer_parameters,
            anatomy.parameters_of_layers,
            parameters_by_part(anatomy),
        )

    @property
    def other(self) -> int:
        """Embeddings, final norm and head."""
        return self.total - self.decoder_layers


@dataclass
class StepRecord:
    """One step in figures, as it goes into run.json."""

    step: int
    parameters: int
    loss: float
    layer_importance: list[float]
    """Of the original decoder layers, 0 for those that are gone; empty if it was not measured."""
    layer_distance: list[float]
    widths: list[dict[str, int]]
    seconds: dict[str, float]

    @classmethod
    def of(cls, step: Any, layers: list[int], count: int) -> StepRecord:
        """Of a `PruningStep`, before which the `layers` were left of the original `count`."""

        def aligned(values: list[float]) -> list[float]:
            there = dict(zip(layers, values, strict=True))
            return [there.get(i, 0.0) for i in range(count)]

        return cls(
            step=step.step,
            parameters=step.anatomy.total_parameters,
            loss=step.loss,
            layer_importance=aligned(step.layer_importance) if step.layer_importance else [],
            layer_distance=aligned(step.layer_distance) if step.layer_distance else [],
            widths=step.anatomy.widths,
            seconds=step.seconds,
        )


@dataclass
class PruningResult:
    """A pruned model and the account of how it came about."""

    model: Any
    tokenizer: Any
    settings: PruneSettings
    target: int
    """The most that the whole model may have: parameters, unless `resource` is another."""
    reached: int
    """What it has of it."""
    before: Size
    after: Size
    widths_before: list[dict[str, int]]
    widths_after: list[dict[str, int]]
    """As `widths_before`, layer for layer; 0 for those that are gone."""
    layers: list[int]
    """Numbers, in the model before pruning, of the decoder layers that are left."""
    edits: list[Edit]
    """What was done to its structure, in order, from the model before pruning on."""
    resource: Resource = PARAMETERS
    """What the target limits."""
    steps: list[StepRecord] = field(default_factory=list)
    seconds: float = 0.0
    measurements: dict[str, dict[str, float]] = field(default_factory=dict)
    """What was measured before and after, such as {"perplexity": {"before": 7., "after": 9.}}."""
    protocol: dict[str, Any] = field(default_factory=dict)
    """On what text it was measured, and how: `run.protocol`."""
    previous: dict[str, Any] | None = None
    """The record of an earlier pruning of the same model, if it had one."""
    timing: dict[str, Any] | None = None
    """What came of a target in time when it was measured: `latency.Measured`."""
    untimed: str = ""
    """Why that was not measured."""
    training: dict[str, Any] | None = None
    """The account of recovery training, if there was any."""

    @property
    def sparsity(self) -> float:
        """Share of the decoder layers' parameters that was removed."""
        return 1 - self.after.decoder_layers / self.before.decoder_layers

    @property
    def kept(self) -> dict[AxisKey, Tensor]:
        """Per axis that was cut, the units that stayed, as indices into those before pruning."""
        cuts = [edit for edit in self.edits if isinstance(edit, Cut)]
        return {
            key: keep_U.nonzero().flatten() for cut in cuts[:1] for key, keep_U in cut.keep.items()
        }

    def target_record(self) -> dict[str, Any]:
        """The target, as records hold it; one that is no number of parameters with what it limits
        and how it was met."""
        if self.resource is PARAMETERS:
            return {"target_parameters": self.target}
        met = {"limits": self.resource.name, "most": self.target, "reached": self.reached}
        return {"target": {**met, **({"timing": self.timing} if self.timing else {})}}

    def record(self) -> dict[str, Any]:
        """What was done, as it is written to pruning.json."""
        return {
            "format": 2,
            **self.target_record(),
            "sparsity": self.sparsity,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "settings": self.settings.model_dump(mode="json"),
            "edits": [edit.record() for edit in self.edits],
            "previous": self.previous,
        }

    def save(self, directory: str | Path, portable: bool = False, overwrite: bool = False) -> Path:
        """Write a checkpoint that plain transformers loads. See `checkpoint.save_result`."""
        from .checkpoint import save_result
        from .claims import claimed

        with claimed(Path(directory)):
            return save_result(self, directory, portable=portable, overwrite=overwrite)
