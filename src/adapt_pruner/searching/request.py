"""What is searched for, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ..limits import Length, Name, NumTokens, Rounds, Runs, ShareBelowOne, Windows
from ..settings import PruneSettings

ADA_PRUNER = "ada-pruner"
"""What is searched when no method is named."""


QUALITIES = ("perplexity", "kl")
Objective = Literal["perplexity", "kl", "parameters", "bytes", "latency"]


def _split(said: Any) -> Any:
    return tuple(said.replace(",", " ").split()) if isinstance(said, str) else said


def _quality_first(names: tuple[str, ...]) -> tuple[str, ...]:
    first, rest = {*names[:1]}, names[1:]
    if not first & {*QUALITIES} or {*rest} & {*QUALITIES} or len({*rest}) < len(rest):
        raise ValueError(
            "must be perplexity or kl, and after it parameters, bytes or latency, each once at most"
        )
    return names


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
    layer_spread: Annotated[
        ShareBelowOne,
        Field(
            description="Let ada-pruner search what each layer gives up, too: 0.5 tries from half "
            "the share of the others to one and a half."
        ),
    ] = 0.0
    objective: Annotated[
        tuple[Objective, ...],
        BeforeValidator(_split),
        AfterValidator(_quality_first),
        Field(
            description="What is minimised on the validation text: perplexity, or kl, the "
            "divergence from the dense model's predictions in nats per token. After it, with "
            "commas, what the model is to cost: parameters, bytes of weights, latency as a share "
            "of the dense model's."
        ),
    ] = ("perplexity",)
    choose: Annotated[
        Literal["nearest", "quality"],
        Field(
            description="Of several objectives, which model of the Pareto front is written: the "
            "one nearest to the best of all (each scaled over the front), or the best in quality."
        ),
    ] = "nearest"
    quantize: Annotated[
        Name | None,
        Field(
            description="Where bytes count: those of a GGUF file of this type, such as Q4_K_M; "
            "default: the weights as the checkpoint holds them."
        ),
    ] = None
    prompt_tokens: Annotated[NumTokens, Field(description="Tokens read, where latency counts.")] = (
        256
    )
    new_tokens: Annotated[NumTokens, Field(description="Tokens written after them.")] = 32
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
            "eighth, quarter or half of the validation text. Not with several objectives."
        ),
    ] = True
    describe: Annotated[
        Literal["hidden", "loss", "source"],
        Field(
            description="What samples are grouped by: clusters of their mean hidden state, bands "
            "of the dense model's loss, or sources (the column `source`, or else the file)."
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

    @property
    def quality(self) -> str:
        return self.objective[0]

    @property
    def costs(self) -> tuple[str, ...]:
        """The other objectives."""
        return self.objective[1:]


@dataclass(frozen=True)
class SearchRequest:
    """What the user asks for."""

    model: str
    settings: PruneSettings
    """What all trials share."""
    validation: str
    """Text to measure trials on, as `settings.calibration`; it must not overlap with that."""
    heldout: str | None = None
    """Text that the model found is measured on, and no trial."""
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
