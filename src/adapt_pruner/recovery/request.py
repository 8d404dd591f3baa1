"""What a user asks of a run of Adapt-Accel, and what a run reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..api import Listener
from ..data.mixture import read_mixture
from ..errors import InvalidSettings
from ..goal import CIRCUMSTANCES, TARGETS, Goal
from ..limits import Budget, Hours, LossValue, Rounds, Steps, checked_value
from ..methods import method_named
from ..result import PruningResult
from ..settings import PruneSettings
from .lora import require_peft
from .schedule import Phase, tokens_per_step
from .settings import RecoverySettings

TRAINING_DATA = "training data"
"""As `calibration`: windows of what the run trains on."""
DEFAULTS = {"calibration": TRAINING_DATA, "tuning_steps": 0}
"""Settings of pruning that have another default where training follows."""


@dataclass(frozen=True)
class AccelRequest(Goal):
    """What the user asks for: the run itself, and below how far to go and what to leave."""

    model: str
    data: str
    tokens: int
    settings: PruneSettings
    recovery: RecoverySettings
    teacher: str | None = None
    evaluate: str | None = None
    portable: bool = False
    trust_remote_code: bool = False

    overwrite: bool = False
    stop_after: int | None = None
    """Phases after which to stop; the same request without it continues."""
    max_hours: float | None = None
    """Of this call; the same request continues."""
    max_loss: float | None = None
    """Stop when the loss on the evaluation text is above it at the end of a phase, in nats."""
    save_steps: int = 500
    report_to: tuple[str, ...] = ()
    data_cache: Path | None = None

    def recipe(self) -> dict[str, Any]:
        """All that determines the result, so that the run can be repeated."""
        own = {name: getattr(self, name) for name in _RECIPE_NAMES}
        own |= {**self.said(), **self.circumstances}
        said = {
            name: value for name, value in own.items() if value is not None and value is not False
        }
        return {
            **said,
            **self.settings.model_dump(mode="json"),
            **self.recovery.model_dump(mode="json"),
        }

    def sources(self) -> list[str | None]:
        """Names of all that the run reads: directories, files or names on the hub.

        Raises:
            DataError: if the mixture cannot be read.
        """
        mixture = read_mixture(self.data)
        named = [self.model, self.teacher, self.data, self.evaluate, self.settings.calibration]
        return [*named, self.recovery.exclude, *(source.path for source in mixture.sources)]


_RECIPE_NAMES = (
    "model", "data", "tokens", *TARGETS, *CIRCUMSTANCES, "quantize", "teacher", "evaluate",
    "portable", "trust_remote_code",
)  # fmt: skip


@dataclass
class AccelOutcome:
    """How a run ended."""

    result: PruningResult | None
    """None if it stopped early; its state is on disk."""
    stopped: str = ""
    """Why, as a sentence."""


class AccelListener:
    """What happens during a run, for progress displays. All methods do nothing by default."""

    pruning: Listener = Listener()

    def on_prepare(self, what: str) -> None: ...
    def on_data(self, lines: list[str]) -> None: ...
    def on_phase(self, phase: Phase, phases: tuple[Phase, ...]) -> None: ...
    def on_step(self, record: dict[str, Any], total_tokens: int) -> None: ...
    def on_phase_end(self, record: dict[str, Any]) -> None: ...


_NUMBERS: dict[str, Any] = {
    "tokens": Budget,
    "save_steps": Steps,
    "stop_after": Rounds,
    "max_hours": Hours,
    "max_loss": LossValue,
}


def check_together(request: AccelRequest) -> None:
    """Raise InvalidSettings for values that cannot be asked for, alone or together."""
    recovery, settings = request.recovery, request.settings
    request.check_quantize()
    for name, kind in _NUMBERS.items():
        value = getattr(request, name)
        if value is not None or name in ("tokens", "save_steps"):
            checked_value(kind, name, value)
    if isinstance(request.report_to, str):
        raise InvalidSettings(
            f"report_to: a list of names, such as ['tensorboard']; got '{request.report_to}'."
        )
    if settings.dtype == "float16":
        raise InvalidSettings(
            "dtype: the range of float16 is too small for weights in training; take bfloat16, or "
            "float32 with --mixed-precision bf16."
        )
    if settings.device_map is not None:
        raise InvalidSettings(
            "device_map: training spreads over devices by `accelerate launch` (--sharding "
            f"fsdp2); got device_map {settings.device_map}."
        )
    method = method_named(settings.method)
    method.check_phases(settings, recovery.phases)
    if request.max_loss is not None and not request.evaluate:
        raise InvalidSettings("max_loss: needs a text to measure on; give --evaluate TEXT.")
    if request.teacher and not recovery.alpha:
        raise InvalidSettings(
            f"teacher: '{request.teacher}' would not be used with alpha 0; give --alpha 0.5, say."
        )
    if method.masks:
        _check_masks(settings.method, recovery)
    _check_teacher(recovery)
    if not recovery.lora_rank:
        return
    if recovery.sharding == "fsdp2":
        raise InvalidSettings("lora_rank: works with --sharding ddp; got fsdp2.")
    if recovery.moments == "carry":
        raise InvalidSettings(
            "moments: those of LoRA weights end with them, merged before each cut; take reset."
        )
    require_peft()


def _check_teacher(recovery: RecoverySettings) -> None:
    if recovery.teacher_tokens and not recovery.alpha:
        raise InvalidSettings(
            "teacher_tokens: with alpha 0 there is no teacher; give --alpha 1, say, or "
            "leave it out."
        )
    if recovery.teacher_tokens and recovery.teacher_tokens < tokens_per_step(recovery):
        raise InvalidSettings(
            f"teacher_tokens: a step takes {tokens_per_step(recovery):,}; got "
            f"{recovery.teacher_tokens:,}. Give more, or a smaller --batch-tokens."
        )


def _check_masks(method: str, recovery: RecoverySettings) -> None:
    """Raise InvalidSettings for what does not go together with masks that are trained."""
    for name in ("phases", "prune_per_phase"):
        if (value := getattr(recovery, name)) is not None:
            raise InvalidSettings(
                f"{name}: {method} has two phases of its own, of masks and of the model that is "
                f"left; got {value:g}. Leave it out."
            )
    if recovery.lora_rank:
        raise InvalidSettings(
            f"lora_rank: {method} trains all weights along with the masks; got "
            f"{recovery.lora_rank}. Leave it out."
        )
    if recovery.sharding == "fsdp2":
        raise InvalidSettings(f"sharding: {method} trains masks with --sharding ddp; got fsdp2.")
