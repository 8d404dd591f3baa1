"""The state of a run on disk, from which it continues after a kill as if nothing had happened.

    DIR/run.yaml                     what was asked for; a resume must ask for the same
    DIR/training.jsonl               one line per optimizer step
    DIR/phases.json                  one entry per finished phase
    DIR/checkpoints/step-00000123/   weights, moments, random states and counters after 123 steps

A checkpoint directory appears whole or not at all, and older ones go once the disk holds it. That
of the end of a phase is an ordinary model directory, so an unfinished run can be looked at, too.

A run that is to replace what DIR holds works in a hidden directory beside it, `.DIR.replacing`, and
takes its place when the result is whole. After a kill, the same command continues it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from ..claims import check_replaceable, claimed
from ..durable import flush, remove, take_place, tidy
from ..errors import InvalidSettings, LoadingError, WritingError, shown
from ..files import (
    atomic_directory,
    check_output,
    place_of,
    read_json,
    read_yaml,
    write_atomically,
    write_json,
    writing,
)
from ..limits import message_of
from ..run import store_as
from .moments import Moments, flatten, unflatten

REQUEST_FILE, LOG_FILE, PHASES_FILE = "run.yaml", "training.jsonl", "phases.json"
CHECKPOINTS, CORRECTED = "checkpoints", "corrected-teacher"
OWN_NAMES = (
    REQUEST_FILE, LOG_FILE, PHASES_FILE, CHECKPOINTS, "teacher", CORRECTED, ".result", "pictures",
    "report.html", "adapt-pruner", ".lock",
)  # fmt: skip
"""What a run has in its directory besides its result; the last but one is tensorboard's."""
RESUMABLE_WITH = {
    "device", "gradient_checkpointing", "max_loss_spike", "micro_batch_size",
    "per_device_train_batch_size", "portable", "repeat", "sharding", "trust_remote_code",
}  # fmt: skip
"""Settings that a resume may change: they say how and where a run is done, not what comes of it."""


@dataclass
class Progress:
    """Where a run stands: all that is not a tensor."""

    phase: int = 0
    """Phases begun; the last of them is unfinished while `step` is below its end."""
    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    sampler: dict[str, Any] | None = None
    history: dict[str, Any] = field(default_factory=dict)
    """What was done to the structure of the model so far, as `History.state_dict`."""
    pruning_steps: list[dict[str, Any]] = field(default_factory=list)
    """`StepRecord`s of all phases."""
    phases: list[dict[str, Any]] = field(default_factory=list)
    """What phases.json holds."""
    first: dict[str, Any] = field(default_factory=dict)
    """The model before the first cut: sizes, widths, measurements, an earlier pruning's record."""
    reference_losses: dict[str, float] = field(default_factory=dict)
    interval: dict[str, list[float]] = field(default_factory=dict)
    """Per domain since its weight was last set: sum of losses, predicted tokens."""


class RunDirectory:
    """The directory of one run.

    Args:
        directory: where the user wants the result.
        request: what was asked for.
        overwrite: whether what is there may be replaced.
    """

    def __init__(self, directory: Path, request: dict[str, Any], overwrite: bool = False):
        self.final = place_of(directory)
        self.request, self.overwrite = request, overwrite
        replacing = self.final.with_name(f".{self.final.name}.replacing")
        is_used = self.final.is_dir() and any(not _is_scrap(f) for f in self.final.iterdir())
        works_beside = (overwrite and is_used) or self._is_asked_for_in(replacing)
        self.directory = replacing if works_beside else self.final
        """Where the run works: that directory, or a hidden one beside it."""

    @property
    def log(self) -> Path:
        return self.directory / LOG_FILE

    @property
    def is_finished(self) -> bool:
        return (self.directory / "run.json").is_file()

    def _is_asked_for_in(self, directory: Path) -> bool:
        """Whether a run of this request has begun in `directory`."""
        try:
            before = read_yaml(directory / REQUEST_FILE, "record", InvalidSettings)
        except InvalidSettings:
            return False
        return isinstance(before, dict) and not self._changes(before)

    def _changes(self, before: dict[str, Any]) -> list[str]:
        return [
            f"{key}: {shown(before.get(key))} became {shown(self.request.get(key))}"
            for key in sorted({*map(str, before), *self.request} - RESUMABLE_WITH)
            if before.get(key) != self.request.get(key)
        ]

    def check(self, sources: Iterable[str | Path | None] = ()) -> None:
        """Check whether a run can start or continue here.

        Args:
            sources: names of what the run reads, which it must not replace.

        Raises:
            WritingError: if the directory holds something else, or cannot be written.
            InvalidSettings: if it holds a run of other settings; the message names them.
        """
        place, file = self.final, self.final / REQUEST_FILE
        check_output(place, overwrite=True)
        if self.overwrite:
            check_replaceable(place, sources, OWN_NAMES if file.is_file() else ())
        elif self.directory != place:
            return  # it was begun by the same request
        elif not file.is_file():
            if place.exists() and any(not _is_scrap(entry) for entry in place.iterdir()):
                raise WritingError(
                    f"'{place}' exists, is not empty and holds no run of this command. Name "
                    "another directory."
                )
        else:
            before = read_yaml(file, "record", InvalidSettings)
            if not isinstance(before, dict):
                raise InvalidSettings(
                    f"'{file}' is damaged: it does not say what was asked for. Pass --overwrite to "
                    "begin anew."
                )
            if changed := self._changes(before):
                raise InvalidSettings(
                    f"'{place}' holds a run of other settings ({'; '.join(changed[:8])}). Use the "
                    "same to go on with it, name another directory, or pass --overwrite."
                )

    def begin(self, stack: ExitStack) -> None:
        """Make the directory that of this run; what is to be replaced stays until the end.

        Until `stack` is closed, no other process can do so.

        Raises:
            WritingError: if another run is at work here, or the disk refuses.
        """
        place = self.directory
        stack.enter_context(claimed(self.final))
        try:
            if place != self.final and not self._is_asked_for_in(place):
                remove(place)  # an unfinished replacement of other settings
            place.mkdir(parents=True, exist_ok=True)
            self._discard_partials()
            write_atomically(place / REQUEST_FILE, yaml.safe_dump(self.request, sort_keys=False))
        except OSError as error:
            if isinstance(error, WritingError):
                raise
            raise WritingError(f"'{place}' cannot be written to: {error.strerror}.") from error

    def settle(self) -> None:
        """Remove what only a resume needs, and give a whole result its place."""
        for name in (CHECKPOINTS, "teacher", CORRECTED):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        self._discard_partials()
        if self.directory != self.final:
            with writing(self.final, f"The whole result is in '{self.directory}'."):
                old = take_place(self.directory, self.final)
            self.directory = self.final
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)

    def kept(self) -> str:
        """What a run that ends now leaves, and what the user can do, as a sentence."""
        if self.checkpoints():
            return f"Run the same command again to go on from the last checkpoint in '{self.final}'"
        return "There is no checkpoint yet: the same command begins anew"

    def is_written(self, what: Path) -> AbstractContextManager[None]:
        """Turn whatever the disk refuses into a sentence, and what to do."""
        return writing(what, f"Free some space. {self.kept()}.")

    def save(
        self,
        progress: Progress,
        model: Any,
        weights: dict[str, Tensor],
        moments: Moments,
        tokenizer: Any,
        random_states: dict[str, Tensor],
    ) -> None:
        """Write a checkpoint; older ones are removed when the disk holds it."""
        place = self.directory / CHECKPOINTS / f"step-{progress.step:08}"
        if self.log.exists():
            with self.is_written(self.log):
                flush(self.log)  # a checkpoint is not ahead of its log
        with self.is_written(place), atomic_directory(place, overwrite=True) as partial:
            model.config.save_pretrained(partial)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(partial)
            save_file(_contiguous(weights), partial / "model.safetensors", {"format": "pt"})
            save_file(_contiguous(flatten(moments)), partial / "moments.safetensors")
            save_file(random_states, partial / "random.safetensors")
            tokenizer.save_pretrained(partial)
            write_json(partial / "progress.json", asdict(progress))
        for older in self.checkpoints():
            if older.name < place.name:
                shutil.rmtree(older, ignore_errors=True)
        with self.is_written(self.directory / PHASES_FILE):
            write_atomically(
                self.directory / PHASES_FILE, json.dumps(progress.phases, indent=1) + "\n"
            )

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted((self.directory / CHECKPOINTS).glob("step-*"))

    def resume(self, write: bool) -> tuple[Progress, Path] | None:
        """The newest checkpoint, if there is one. With `write`, the log is cut back to it, and what
        a killed run left half-written is removed."""
        if write:
            for partial in (self.directory / CHECKPOINTS).glob(".step-*"):
                shutil.rmtree(partial, ignore_errors=True)
        found = self.checkpoints()
        progress = _progress_in(found[-1]) if found else Progress()
        if write and self.log.exists():
            lines = self.log.read_text(encoding="utf-8").splitlines()[: progress.step]
            write_atomically(self.log, "".join(f"{line}\n" for line in lines))
        return (progress, found[-1]) if found else None

    def append_log(self, line: str) -> None:
        with self.is_written(self.log), self.log.open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def _discard_partials(self) -> None:
        """Remove results that a killed process was writing or moving."""
        for partial in [*self.directory.glob("..result.*"), self.directory / ".result"]:
            shutil.rmtree(partial, ignore_errors=True)
        tidy(self.directory)

    def read_weights(self, checkpoint: Path, model: Any) -> None:
        """Fill `model` with the weights of a checkpoint, one tensor after the other."""
        parameters = dict(model.named_parameters())
        for name, tensor in _tensors(checkpoint / "model.safetensors"):
            parameters[name].data.copy_(tensor)

    def read_moments(self, checkpoint: Path, device: torch.device) -> Moments:
        """The moments of a checkpoint, on `device`; numbers of steps stay on the CPU."""
        return unflatten(
            (key, tensor if key.endswith("|step") else tensor.to(device))
            for key, tensor in _tensors(checkpoint / "moments.safetensors")
        )

    def read_random_states(self, checkpoint: Path) -> dict[str, Tensor]:
        return dict(_tensors(checkpoint / "random.safetensors"))


def _progress_in(checkpoint: Path) -> Progress:
    file = checkpoint / "progress.json"
    try:
        return TypeAdapter(Progress).validate_python(read_json(file))
    except ValidationError as error:
        raise LoadingError(
            f"'{file}' is damaged ({message_of(error.errors()[0])}). Restore it, or begin anew "
            "with --overwrite."
        ) from error


def _is_scrap(entry: Path) -> bool:
    """Whether a file is what a run killed at its very start leaves."""
    return entry.name.startswith((f".{REQUEST_FILE}.", ".lock"))


def rebuild_model(checkpoint: Path, empty: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of the checkpoint's widths, of the class of `empty`. Its weights are to be filled."""
    config = type(empty.config).from_pretrained(checkpoint)
    config._name_or_path = empty.config._name_or_path
    with torch.device(device):
        model = type(empty)(config)
    store_as(model, dtype)
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return model.eval()


def _tensors(file: Path):
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
            yield key, tensors.get_tensor(key)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
