"""Turn the state of a finished run into the checkpoint that users load."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..checkpoint import save_result
from ..report import write_page
from ..report.training_pictures import draw_training
from ..result import PruningResult
from .request import AccelRequest
from .state import RunDirectory


def write_result(result: PruningResult, request: AccelRequest, place: RunDirectory) -> None:
    """Write model and account into the run's directory; then what only a resume needs goes.

    config.json and at last run.json arrive after all else, so that neither a tool nor a resume
    takes a half-written result for a whole one.
    """
    directory = place.directory
    whole = directory / ".result"
    name = directory.resolve().name
    save_result(result, whole, request.portable, True, request.recipe(), name)
    draw_training(directory, whole / "pictures")
    _move_all(whole, directory)
    write_page(directory)  # again: the training log is here
    place.discard_leftovers()


def draw_progress(place: RunDirectory) -> None:
    """Pictures of a run that is under way."""
    draw_training(place.directory, place.directory / "pictures")


def _move_all(source: Path, directory: Path) -> None:
    last = ["config.json", "run.json"]
    for entry in sorted(source.iterdir(), key=lambda e: (e.name in last, e.name)):
        place = directory / entry.name
        if place.is_dir():
            shutil.rmtree(place)
        _rename(entry, place)
    source.rmdir()


def _rename(old: Path, new: Path) -> None:
    os.replace(old, new)
