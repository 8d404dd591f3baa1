"""Commands that are killed: what each reads, writes and replaces, and when its output is whole."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open

from adapt_pruner.claims import RECORD_FILE, foreign_files
from adapt_pruner.files import read_json
from gguf_models import byte_tokenizer
from picomodels import build


def materials(root: Path, model: Any, tokenizer: Any, documents: list[str]) -> None:
    """The models and texts that commands read."""
    model.save_pretrained(root / "llama")
    tokenizer.save_pretrained(root / "llama")
    build("llama", torch.float32, vocab_size=320).save_pretrained(root / "bytes")
    byte_tokenizer().save_pretrained(root / "bytes")
    (root / "text.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    other = " ".join(reversed(" ".join(documents[:4]).split()))  # shares no run of words
    (root / "other.txt").write_text(other, encoding="utf-8")


@dataclass
class Workplace:
    """A directory with a model, a text and what a command is to replace."""

    root: Path

    name: ClassVar[str] = "out"
    model: ClassVar[str] = "llama"
    makes_old: ClassVar[bool] = True
    """Whether the command replaces an output of its own."""

    @property
    def output(self) -> Path:
        return self.root / "work" / self.name

    @property
    def old(self) -> Path:
        """What the command is to replace."""
        return self.root / f"old-{self.command}"

    @property
    def command(self) -> str:
        return type(self).__name__.lower()

    @property
    def text(self) -> Path:
        return self.root / "text.txt"

    def fresh(self) -> None:
        """The state before the command."""
        shutil.rmtree(self.root / "work", ignore_errors=True)
        (self.root / "work").mkdir()
        shutil.rmtree(self.root / "cache", ignore_errors=True)
        if self.old.is_dir():
            shutil.copytree(self.old, self.root / "work", dirs_exist_ok=True)

    def arguments(self, is_old: bool = False) -> list[str]:
        """The command, or the one that makes what it replaces."""
        model = [self.command, self.root / self.model, "-o", self.output, "-q"]
        return [str(part) for part in [*model, *self.options(is_old)]]

    def options(self, is_old: bool) -> list[object]:
        raise NotImplementedError

    def before_forks(self) -> None:
        """Import what each of them would import, and leave out pictures."""

    def is_whole(self) -> str:
        """What is wrong with the output, or an empty string."""
        return model_is_whole(self.output) or self._is_old_or_new()

    def _is_old_or_new(self) -> str:
        sparsity = read_json(self.output / "run.json")["sparsity"]
        return "" if round(sparsity, 1) in (0.1, 0.4) else f"sparsity {sparsity}"

    def cutting(self) -> list[object]:
        return ["--calibration", self.text, "--windows", 4, "--window-length", 12, "--steps", 2,
                "--tuning-steps", 1]  # fmt: skip

    def leftovers(self) -> list[str]:
        """Hidden files and directories that no finished run leaves."""
        left = [p for p in (self.root / "work").rglob(".*") if p.name != RECORD_FILE]
        return [str(path.relative_to(self.root)) for path in left]


class Prune(Workplace):
    def options(self, is_old: bool) -> list[object]:
        return [*self.cutting(), "--sparsity", 0.1 if is_old else 0.4, "--overwrite"]


class Accel(Workplace):
    def options(self, is_old: bool) -> list[object]:
        return [
            *self.cutting(), "--sparsity", 0.1 if is_old else 0.4, "--overwrite",
            "--data", self.text, "--tokens", 512, "--phases", 2, "--sequence-length", 16,
            "--batch-tokens", 64, "--repeat", "--alpha", 0, "--save-steps", 3,
        ]  # fmt: skip


class Compare(Workplace):
    makes_old = False

    def options(self, is_old: bool) -> list[object]:
        return [
            *self.cutting(), "--evaluate", self.text, "--window", 16, "--methods",
            "magnitude,random", "--seeds", 1, "--sparsities", 0.3, "--save-models",
            "--cache-dir", self.root / "cache",
        ]  # fmt: skip

    def is_whole(self) -> str:
        file = self.output / "comparison.json"
        if file.exists() and read_json(file)["format"] != 1:
            return "comparison.json is damaged"
        models = self.output / "models"
        for model in models.iterdir() if models.is_dir() else ():
            if not model.name.startswith(".") and (wrong := model_is_whole(model)):
                return wrong
        return ""


class Search(Workplace):
    """Goes on with a study of two trials."""

    def before_forks(self) -> None:
        import optuna  # noqa: F401

        from adapt_pruner.searching import outcome, samplers  # noqa: F401

        outcome.draw_trials = lambda *drawing: None

    def options(self, is_old: bool) -> list[object]:
        return [
            "--sparsity", 0.3, "--calibration", self.text, "--validation", self.root / "other.txt",
            "--trials", 2 if is_old else 3, "--pool", 8, "--windows", 4, "--window-length", 12,
            "--groups", 2, "--draws", 2, "--validation-window", 16, "--validation-windows", 8,
        ]  # fmt: skip

    def is_whole(self) -> str:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        if wrong := model_is_whole(self.output, "study"):
            return wrong
        journal = JournalFileBackend(str(self.output / "study" / "journal.log"))
        (study,) = JournalStorage(journal).get_all_studies()
        ended = [trial for trial in JournalStorage(journal).get_all_trials(study._study_id)
                 if trial.state.is_finished()]  # fmt: skip
        told = len(read_json(self.output / "study.json")["trials"])
        if told not in (2, 3, 4):  # four, where a kill left a trial without an end
            return f"study.json tells of {told} trials"
        return "" if len(ended) >= 2 else f"the journal has {len(ended)} trials"


class Export(Workplace):
    name = "out.gguf"
    model = "bytes"  # with a tokenizer that GGUF knows

    def before_forks(self) -> None:
        from adapt_pruner.export import gguf_file  # noqa: F401

    def options(self, is_old: bool) -> list[object]:
        return ["--overwrite", "--quantize", "F32" if is_old else "F16"]

    def is_whole(self) -> str:
        from gguf import GGUFReader

        if not self.output.exists():
            return "there is no file"
        reader = GGUFReader(self.output)
        kinds = {int(tensor.tensor_type) for tensor in reader.tensors}
        return "" if kinds in ({0}, {0, 1}) else f"tensors of types {kinds}"


COMMANDS = {kind.__name__.lower(): kind for kind in (Prune, Accel, Compare, Search, Export)}


def model_is_whole(directory: Path, *also_ours: str) -> str:
    """What is wrong with a model's directory, or an empty string."""
    if not directory.is_dir():
        return f"there is no {directory.name}"
    listed = read_json(directory / RECORD_FILE)["files"] if directory.is_dir() else {}
    if missing := [name for name in listed if not (directory / name).exists()]:
        return f"{directory.name} lacks {missing[0]}"
    own = ("run.yaml", "training.jsonl", "phases.json", *also_ours)
    if changed := foreign_files(directory, own):
        return f"{directory.name} has another {changed[0]}"
    with safe_open(directory / "model.safetensors", "pt") as tensors:
        return "" if tensors.keys() else f"{directory.name} has no weights"
