"""What is searched for, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..limits import Length, Name, Rounds, Runs, Windows
from ..settings import PruneSettings

ADA_PRUNER = "ada-pruner"
"""What is searched when no method is named."""


class SearchSettings(BaseModel):
    """How `adapt-pruner search` looks for the best settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trials: Annotated[
        Rounds,
        Field(description="Trials that the study is to have; those that it has already count."),
    ] = 50
    sampler: Annotated[
        Literal["tpe", "random", "grid"],
        Field(description="What proposes trials: Bayesian optimisation, chance, or a grid."),
    ] = "tpe"
    over: Annotated[
        Literal["both", "samples", "importance", "none"],
        Field(
            description="What ada-pruner searches by itself: the choice of samples, the weights of "
            "the importance, both, or nothing but what the recipe's `space` names."
        ),
    ] = "both"
    objective: Annotated[
        Literal["perplexity", "kl"],
        Field(
            description="What is minimised on the validation text: perplexity, or the divergence "
            "from the dense model's predictions, in nats per token."
        ),
    ] = "perplexity"
    validation_window: Annotated[
        Length, Field(description="Tokens per window of the validation text.")
    ] = 256
    validation_windows: Annotated[
        Windows, Field(description="Windows of the validation text at most.")
    ] = 128
    early_stop: Annotated[
        bool,
        Field(
            description="Stop a trial that is worse than the median of earlier ones on the first "
            "eighth, quarter or half of the validation text."
        ),
    ] = True
    describe: Annotated[
        Literal["hidden", "loss"],
        Field(
            description="What samples are grouped by: clusters of their mean hidden state, or "
            "bands of the dense model's loss."
        ),
    ] = "hidden"
    groups: Annotated[Runs, Field(description="Groups of samples, each with a weight.")] = 6
    draws: Annotated[
        Runs, Field(description="Orders in which samples can be drawn from their groups.")
    ] = 16
    storage: Annotated[
        Name | None,
        Field(
            description="URL of a database for the study, such as sqlite:///study.db, which "
            "several machines can work on; default: a journal in the output directory."
        ),
    ] = None


@dataclass(frozen=True)
class SearchRequest:
    """What the user asks for."""

    model: str
    settings: PruneSettings
    """What all trials share."""
    validation: str
    """Text to measure trials on, as `settings.calibration`; it must not overlap with that."""
    search: SearchSettings = field(default_factory=SearchSettings)
    sparsity: float | None = None
    params: int | None = None
    space: Mapping[str, Any] = field(default_factory=dict)
    """Further settings with their ranges: see `space.parse_space`."""
    overwrite: bool = False
    """Forget a study that is there."""
    trust_remote_code: bool = False


class SearchListener:
    """What happens during a search, for displays. All methods do nothing by default."""

    def on_start(self, done: int, trials: int) -> None: ...
    def on_pool(self, share: float) -> None:
        """The share of the pool's samples that are scored."""

    def on_trial(self, number: int, value: float | None, best: float | None) -> None:
        """A trial has ended; without a value if it was stopped early or failed."""
