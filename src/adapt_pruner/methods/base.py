"""What a pruning method is: a row of the table, and what it is given and gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..allocate.chains import Limits
from ..data import CalibrationData
from ..errors import InvalidSettings, InvalidTarget
from ..model.anatomy import Anatomy, find_anatomy
from ..model.axes import CUTS, KV_GROUPS, NEURONS
from ..model.edits import Edit
from ..model.memory import give_back
from ..model.resources import PARAMETERS, Resource
from ..precision import compute_dtype_of
from ..processes import Decision, copy_from_first, decided_by_first
from ..score.collect import Pass
from ..score.observers import Observer
from ..settings import PruneSettings


@dataclass
class Work:
    """What a method is given to do, and how it changes the model."""

    model: nn.Module
    calibration: CalibrationData
    targets: Sequence[int]
    """Amounts of the resource that the whole model may have, the largest first; each is met by a
    step of its own."""
    settings: Any
    """Of the method's own class."""
    on_progress: Callable[[float], None] = lambda share: None
    """Called during a step with the share of its calibration windows done."""
    on_edit: Callable[[Edit, Anatomy], None] = lambda edit, before: None
    """Called before an edit changes the model."""
    resource: Resource = PARAMETERS
    """What the targets limit."""
    masks: Any = None
    """Trained `Masks`, for a method that cuts by them; None: it trains its own."""
    group: Any = None
    """Processes that prune the same model and share the calibration windows; None: this one."""

    def __post_init__(self) -> None:
        self.compute_dtype = compute_dtype_of(self.settings.compute_dtype, self.model)

    @property
    def how(self) -> Pass:
        return pass_of(self.settings, self.compute_dtype, self.group)

    def anatomy(self) -> Anatomy:
        """That of the model as it is."""
        return find_anatomy(self.model, self.resource)

    def progress_of(self, num_windows: int) -> Callable[[int], None]:
        """Reports a number of windows done, out of `num_windows`."""
        return lambda done: self.on_progress(done / num_windows)

    def decide(self, decision: Decision) -> Decision:
        """What the first process found. Call it with everything that depends on computed figures,
        such as which units stay and whether the target is met, before it is used."""
        return decided_by_first(decision, self.group)

    def apply(self, edit: Edit) -> Anatomy:
        """Change the model. Returns its new anatomy; weights are those of the first process."""
        self.on_edit(edit, self.anatomy())
        edit.apply(self.model)
        copy_from_first(self.model.parameters(), self.group)
        give_back()
        return self.anatomy()


def pass_of(settings: PruneSettings, compute_dtype: torch.dtype | None, group: Any = None) -> Pass:
    """How the settings of a method say that passes are run."""
    return Pass(settings.micro_batch_size, settings.gradient_checkpointing, compute_dtype, group)


@dataclass
class PruningStep:
    """What one round of scoring and cutting did."""

    step: int
    """Counted from 1."""
    anatomy: Anatomy
    """The model as it is after the step."""
    layer_importance: list[float] = field(default_factory=list)
    """Per decoder layer before the cut, mean 0 and max |.| 1; empty where it was not measured."""
    layer_distance: list[float] = field(default_factory=list)
    loss: float = 0.0
    """Calibration loss before the cut, nats per token; 0 if the scores needed no loss."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the parts of the step."""
    target: int | None = None
    """The target that the model meets now, if it does."""


@dataclass(frozen=True)
class Outline:
    """What a run of a method is going to do, for plans."""

    sizes: list[int]
    """What is left after each step of what the target limits, such as parameters."""
    observers: list[Observer] = field(default_factory=list)
    """Of every step."""
    tuned_tokens: int = 0
    """That the model is run over forward and backward besides the steps."""
    trains_weights: bool = False
    """Whether all weights have gradients and an optimizer's moments meanwhile."""


def _no_size(settings: PruneSettings, anatomy: Anatomy) -> int | None:
    return None


def _one_step(settings: PruneSettings, anatomy: Anatomy, target: int) -> Outline:
    return Outline([target] if target < anatomy.amount else [])


@dataclass(frozen=True)
class Method:
    """One row of the table of methods."""

    run: Callable[[Work], Iterator[PruningStep]]
    settings: type[PruneSettings]
    """With the published values as defaults; command line, recipes and sweeps follow from it."""
    summary: str
    """One sentence."""
    paper: str = ""
    """Where it was published."""
    cuts: frozenset[str] = frozenset({"neurons", "kv-groups"})
    """What it can cut, as in `--cut`."""
    needs: str = "gradients"
    """What it does with the model: nothing, forward, gradients or training."""
    presets: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Named settings; the first is the default."""
    outline: Callable[[Any, Anatomy, int], Outline] = _one_step
    size: Callable[[Any, Anatomy], int | None] = _no_size
    """Parameters of the whole model that the settings alone lead to, without a target; None: they
    do not."""
    meets_several_targets: bool = False
    """Whether one run can stop at several sizes on its way; else each has a run of its own."""


def check_counts_parameters(anatomy: Anatomy, method: str, way_out: str) -> None:
    """Raise InvalidTarget if a method that can only count parameters is to limit another thing."""
    if anatomy.resource is not PARAMETERS:
        raise InvalidTarget(
            f"{method} cannot be aimed at {anatomy.resource.name}. Give --sparsity or --params, or "
            f"{way_out}."
        )


def limits_of(settings: PruneSettings, anatomy: Anatomy, can_cut: frozenset[str]) -> Limits:
    """Turn the settings that say what may be cut into limits for this model.

    Raises:
        InvalidSettings: if a protected layer does not exist, or settings exclude each other.
    """
    count = len(anatomy.layers)
    for layer in settings.protect_layers:
        if not -count <= layer < count:
            raise InvalidSettings(
                f"protect_layers: the model has layers 0 to {count - 1}; got {layer}."
            )
    if settings.protect_layers and settings.layout == "uniform":
        raise InvalidSettings(
            "A uniform layout cuts every layer alike, so protect_layers must be empty; got "
            f"{list(settings.protect_layers)}."
        )
    kinds = _kinds_to_cut(settings, anatomy, can_cut)
    widths = [axis.num_units for axis in anatomy.axes if axis.kind == NEURONS]
    if NEURONS in kinds and widths and 1 < settings.multiple >= max(widths):
        raise InvalidSettings(
            f"multiple: the widest MLP has {max(widths):,} neurons, so that none could be cut in "
            f"multiples of {settings.multiple:,}. Lower it, or leave neurons out of --cut."
        )
    return Limits(
        kinds=kinds,
        protected_layers=frozenset(layer % count for layer in settings.protect_layers),
        multiple=settings.multiple,
        uniform=settings.layout == "uniform",
    )


def _kinds_to_cut(
    settings: PruneSettings, anatomy: Anatomy, can_cut: frozenset[str]
) -> frozenset[str]:
    there = {axis.kind for axis in anatomy.axes}
    kinds: set[str] = set()
    for name in settings.cut:
        if name not in can_cut:
            raise InvalidSettings(
                f"cut: {settings.method} cuts {', '.join(sorted(can_cut))}; got {name}."
            )
        if settings.layout == "uniform" and name == "sublayers":
            raise InvalidSettings(
                "A uniform layout has the same sublayers in every layer, so sublayers cannot be "
                "cut; got cut with sublayers. Use --layout per-layer, or cut whole layers."
            )
        found = CUTS[name] & there
        # KV groups and neurons are the default: GPT-NeoX, which has neurons alone, follows it.
        if not found and not (name == KV_GROUPS and NEURONS in settings.cut):
            possible = ", ".join(name for name, kinds in CUTS.items() if kinds & there)
            raise InvalidSettings(
                f"cut: this model has no {name} that can be cut; it has {possible}."
            )
        kinds |= found
    return frozenset(kinds)
