"""The state of a run on disk, from which it goes on after a kill as if nothing had happened.

    DIR/run.yaml                     what was asked for; a resume must ask for the same
    DIR/training.jsonl               one line per optimizer step
    DIR/phases.json                  one entry per finished phase
    DIR/checkpoints/step-00000123/   weights, moments, random states and counters after 123 steps

A checkpoint directory appears whole or not at all, and older ones go once it is there. That of
the end of a phase is an ordinary model directory, so an unfinished run can be looked at, too.
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InvalidSettings, WritingError
from ..files import atomic_directory, check_output, read_yaml, write_atomically, write_json
from ..model.loading import read_json
from ..run import store_as
from .moments import Moments, flatten, unflatten

REQUEST_FILE, LOG_FILE, PHASES_FILE = "run.yaml", "training.jsonl", "phases.json"
CHECKPOINTS = "checkpoints"
OWN_FILES = (f".{REQUEST_FILE}.", ".lock")
"""How files begin that a run killed at its very start leaves."""
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
    """The directory of one run."""

    def __init__(self, directory: Path):
        self.directory = directory

    @property
    def log(self) -> Path:
        return self.directory / LOG_FILE

    @property
    def is_finished(self) -> bool:
        return (self.directory / "run.json").is_file()

    def check(self, request: dict[str, Any], overwrite: bool) -> None:
        """Look whether a run can begin or go on here.

        Raises:
            WritingError: if the directory holds something else, or cannot be written.
            InvalidSettings: if it holds a run that was asked for in other words: which.
        """
        place, file = self.directory, self.directory / REQUEST_FILE
        check_output(place, overwrite=True)
        if not file.is_file():
            if place.exists() and any(not f.name.startswith(OWN_FILES) for f in place.iterdir()):
                raise WritingError(
                    f"'{place}' exists, is not empty and holds no run of this command. Name "
                    "another directory."
                )
        elif not overwrite:
            before = read_yaml(file, "record", InvalidSettings)
            if not isinstance(before, dict):
                raise InvalidSettings(
                    f"'{file}' is damaged: it does not say what was asked for. Pass --overwrite to "
                    "begin anew."
                )
            changed = [
                f"{key}: {before.get(key)!r} became {request.get(key)!r}"
                for key in sorted({*before, *request} - RESUMABLE_WITH)
                if before.get(key) != request.get(key)
            ]
            if changed:
                raise InvalidSettings(
                    f"'{place}' holds a run of other settings ({'; '.join(changed)}). Use the same "
                    "to go on with it, name another directory, or pass --overwrite."
                )

    def begin(self, request: dict[str, Any], overwrite: bool, stack: ExitStack) -> None:
        """Make the directory that of this run; an earlier one goes only with `overwrite`.

        Until `stack` is closed, no other process can do so.

        Raises:
            WritingError: if another run is at work here, or the disk refuses.
        """
        place = self.directory
        lock = FileLock(place / ".lock")
        try:
            place.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
            stack.callback(lock.release)
            stack.callback(Path(lock.lock_file).unlink, missing_ok=True)
            if overwrite:
                for entry in place.iterdir():
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                    elif entry.name != ".lock":
                        entry.unlink()
            self._discard_partials()
            write_atomically(place / REQUEST_FILE, yaml.safe_dump(request, sort_keys=False))
        except Timeout:
            raise WritingError(
                f"Another run is at work in '{place}'. Wait for it, or name another directory."
            ) from None
        except OSError as error:
            raise WritingError(f"'{place}' cannot be written to: {error.strerror}.") from error

    def save(
        self,
        progress: Progress,
        model: Any,
        weights: dict[str, Tensor],
        moments: Moments,
        tokenizer: Any,
    ) -> None:
        """Write a checkpoint; older ones are removed when it is there."""
        place = self.directory / CHECKPOINTS / f"step-{progress.step:08}"
        with atomic_directory(place, overwrite=True) as partial:
            model.config.save_pretrained(partial)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(partial)
            save_file(_contiguous(weights), partial / "model.safetensors", {"format": "pt"})
            save_file(_contiguous(flatten(moments)), partial / "moments.safetensors")
            save_file(_random_states(), partial / "random.safetensors")
            tokenizer.save_pretrained(partial)
            write_json(partial / "progress.json", asdict(progress))
        for older in self.checkpoints():
            if older.name < place.name:
                shutil.rmtree(older, ignore_errors=True)
        write_atomically(self.directory / PHASES_FILE, json.dumps(progress.phases, indent=1) + "\n")

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first. What a killed run left half-written is removed."""
        parent = self.directory / CHECKPOINTS
        for partial in parent.glob(".step-*"):
            shutil.rmtree(partial, ignore_errors=True)
        return sorted(parent.glob("step-*"))

    def resume(self, write: bool) -> tuple[Progress, Path] | None:
        """The newest checkpoint, if there is one; with `write`, the log is cut back to it."""
        found = self.checkpoints()
        progress = Progress(**read_json(found[-1] / "progress.json")) if found else Progress()
        if write and self.log.exists():
            lines = self.log.read_text(encoding="utf-8").splitlines()[: progress.step]
            write_atomically(self.log, "".join(f"{line}\n" for line in lines))
        return (progress, found[-1]) if found else None

    def append_log(self, line: str) -> None:
        try:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(line + "\n")
        except OSError as error:
            raise WritingError(
                f"'{self.log}' could not be written: {error.strerror}. The last checkpoint is "
                "kept; free some space and run the same command again."
            ) from error

    def discard_leftovers(self) -> None:
        """Remove what only a resume needs."""
        for name in (CHECKPOINTS, "teacher"):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        self._discard_partials()

    def _discard_partials(self) -> None:
        """Remove results that a killed process was writing."""
        for partial in self.directory.glob("..result.*"):
            shutil.rmtree(partial, ignore_errors=True)

    def read_tensors(self, checkpoint: Path, model: Any) -> Moments:
        """Read the weights of `model`, which is mutated, and return the moments."""
        parameters = dict(model.named_parameters())
        for name, tensor in _tensors(checkpoint / "model.safetensors"):
            parameters[name].data.copy_(tensor)
        return unflatten(_tensors(checkpoint / "moments.safetensors"))


def rebuild_model(checkpoint: Path, source: Any) -> Any:
    """A model of the checkpoint's widths, with the class, dtype and device of `source`."""
    config = type(source.config).from_pretrained(checkpoint)
    config._name_or_path = source.config._name_or_path
    with torch.device(source.device):
        model = type(source)(config)
    store_as(model, source.dtype)
    model.generation_config = source.generation_config
    return model.eval()


def restore_random_states(checkpoint: Path) -> None:
    states = dict(_tensors(checkpoint / "random.safetensors"))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _tensors(file: Path):
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
            yield key, tensors.get_tensor(key)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
