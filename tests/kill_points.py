"""Kill a command at seeded points of its work on files, and look at what is left.

    python tests/kill_points.py prune WORKPLACE --points 100 --seed 0

Python tells an audit hook of every file that is opened, renamed, made or removed. The command runs
once to count these events below the workplace, then once for each point drawn, and kills itself
(SIGKILL: nothing is tidied up) at that event. After each kill the output must be whole, the old one
or the new one; then the same command runs to its end, and nothing half-written may be left.

Processes are forks of one that has imported everything, which takes most of the time. Prints a line
of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import torch
from safetensors import safe_open

from adapt_pruner.claims import RECORD_FILE, foreign_files
from adapt_pruner.cli import main
from adapt_pruner.files import read_json
from adapt_pruner.recovery import finish
from adapt_pruner.report import pictures

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
COMMANDS = ("prune", "accel", "compare")


@dataclass
class Workplace:
    """A directory with a model, a text and what a command is to replace."""

    root: Path
    command: str

    @property
    def output(self) -> Path:
        return self.root / "work" / "out"

    def fresh(self) -> None:
        """The state before the command."""
        shutil.rmtree(self.root / "work", ignore_errors=True)
        (self.root / "work").mkdir()
        shutil.rmtree(self.root / "cache", ignore_errors=True)
        if (self.root / "old").is_dir():
            shutil.copytree(self.root / "old", self.output)

    def arguments(self) -> list[str]:
        model, text = self.root / "llama", self.root / "text.txt"
        cutting = [
            "--calibration", text, "--windows", 4, "--window-length", 12, "--steps", 2, "-q",
        ]  # fmt: skip
        if self.command == "prune":
            more = ["--sparsity", 0.4, "--overwrite"]
        elif self.command == "accel":
            more = [
                "--sparsity", 0.4, "--overwrite", "--data", text, "--tokens", 512, "--phases", 2,
                "--sequence-length", 16, "--batch-tokens", 64, "--repeat", "--alpha", 0,
                "--save-steps", 3,
            ]  # fmt: skip
        else:
            more = [
                "--evaluate", text, "--window", 16, "--methods", "magnitude,random", "--seeds", 1,
                "--sparsities", "0.3", "--save-models", "--cache-dir", self.root / "cache",
            ]  # fmt: skip
        return [str(part) for part in [self.command, model, "-o", self.output, *cutting, *more]]

    def is_whole(self) -> str:
        """What is wrong with the output, or an empty string."""
        if self.command == "compare":
            return self._comparison()
        return model_is_whole(self.output) or self._is_old_or_new()

    def _is_old_or_new(self) -> str:
        sparsity = read_json(self.output / "run.json")["sparsity"]
        return "" if round(sparsity, 1) in (0.1, 0.4) else f"sparsity {sparsity}"

    def _comparison(self) -> str:
        file = self.output / "comparison.json"
        if file.exists() and read_json(file)["format"] != 1:
            return "comparison.json is damaged"
        models = self.output / "models"
        for model in models.iterdir() if models.is_dir() else ():
            if not model.name.startswith(".") and (wrong := model_is_whole(model)):
                return wrong
        return ""

    def leftovers(self) -> list[str]:
        """Hidden files and directories that no finished run leaves."""
        left = [p for p in (self.root / "work").rglob(".*") if p.name != RECORD_FILE]
        return [str(path.relative_to(self.root)) for path in left]


def model_is_whole(directory: Path) -> str:
    """What is wrong with a model's directory, or an empty string."""
    if not directory.is_dir():
        return f"there is no {directory.name}"
    listed = read_json(directory / RECORD_FILE)["files"] if directory.is_dir() else {}
    if missing := [name for name in listed if not (directory / name).exists()]:
        return f"{directory.name} lacks {missing[0]}"
    own = ("run.yaml", "training.jsonl", "phases.json")
    if changed := foreign_files(directory, own):
        return f"{directory.name} has another {changed[0]}"
    with safe_open(directory / "model.safetensors", "pt") as tensors:
        return "" if tensors.keys() else f"{directory.name} has no weights"


def forked(work: Callable[[], int]) -> int:
    """Run in a child. Returns its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 70
    try:
        status = work()
    finally:
        os._exit(status)


def run_command(place: Workplace, count_to: Path | None = None, die_at: int = 0) -> int:
    """Run the command in this process, which is a fork, and count its events or die at one."""
    root, seen = str(place.root), [0]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in EVENTS and arguments and str(arguments[0]).startswith(root):
            seen[0] += 1
            if seen[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    with (place.root / "output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.addaudithook(hook)
    try:
        main(place.arguments())
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    if count_to is not None:
        die_at = -1
        count_to.write_text(str(seen[0]))
    return status


def kill_points(place: Workplace, points: int, seed: int) -> dict[str, object]:
    """Run it `points` times. Returns the number of events, of kills, and what was bad."""
    place.fresh()
    counted = place.root / "count.txt"
    status = forked(lambda: run_command(place, counted))
    if status:
        return {"bad": [f"unharmed run: {status}: {(place.root / 'output.txt').read_text()}"]}
    events = int(counted.read_text())
    drawn = sorted(random.Random(seed).sample(range(1, events + 1), min(points, events)))
    bad, kills = [], 0
    for point in drawn:
        place.fresh()
        status = forked(lambda n=point: run_command(place, die_at=n))
        kills += status == -signal.SIGKILL
        try:
            wrong = place.is_whole()
            again = forked(lambda: run_command(place))
            if again:
                wrong += f" again: {again}: {(place.root / 'output.txt').read_text()}"
            wrong = wrong or place.is_whole() or " ".join(place.leftovers())
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            bad.append(f"{place.command}, event {point}: {wrong}"[:400])
    return {"command": place.command, "events": events, "kills": kills, "bad": bad}


def prepare(root: Path) -> None:
    """Make the directory that is to be replaced, by a run of another sparsity."""
    place = Workplace(root, "prune")
    (root / "work").mkdir(exist_ok=True)
    if not (root / "old").exists():
        arguments = [*place.arguments(), "--sparsity", "0.1"]
        status = forked(lambda: _quietly(arguments, root / "output.txt"))
        assert status == 0, (root / "output.txt").read_text()
        os.replace(place.output, root / "old")


def _quietly(arguments: list[str], file: Path) -> int:
    with file.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def run() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("root", type=Path, help="holds a model `llama` and a text `text.txt`")
    parser.add_argument("--points", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ["ADAPT_PRUNER_CACHE"] = str(given.root / "cache")
    torch.set_num_threads(1)
    pictures.draw_all = lambda directory, result: {}  # they take half of the time
    finish.draw_training = lambda run, pictures: {}
    place = Workplace(given.root.resolve(), given.command)
    if given.command != "compare":
        prepare(place.root)
    print(json.dumps(kill_points(place, given.points, given.seed)))


if __name__ == "__main__":
    run()
