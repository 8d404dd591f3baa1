"""Turn the state of a finished run into the checkpoint that users load."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..checkpoint import save_result
from ..durable import flush, flush_tree
from ..report import write_page
from ..report.training_pictures import draw_training
from ..result import PruningResult
from .request import AccelRequest
from .state import RunDirectory


def write_result(result: PruningResult, request: AccelRequest, place: RunDirectory) -> None:
    """Write model and account into the run's directory; then what only a resume needs goes.

    config.json is written after all other files, and run.json last, so that neither a tool nor a
    resume takes a half-written result for a whole one. Until then, what the result replaces is
    still there.

    Raises:
        WritingError: for whatever the disk refuses.
    """
    directory, name = place.directory, place.final.name
    whole = directory / ".result"
    with place.is_written(place.final):
        save_result(result, whole, request.portable, True, request.recipe(), name)
        draw_training(directory, whole / "pictures")
        flush_tree(whole)
        _move_all(whole, directory)
        write_page(directory, name)  # again: the training log is here
    place.settle()


def draw_progress(place: RunDirectory) -> None:
    """Pictures of a run that is under way."""
    with place.is_written(place.directory / "pictures"):
        draw_training(place.directory, place.directory / "pictures")


def _move_all(source: Path, directory: Path) -> None:
    last = ["config.json", "run.json"]
    for entry in sorted(source.iterdir(), key=lambda e: (e.name in last, e.name)):
        place = directory / entry.name
        if place.is_dir():
            shutil.rmtree(place)
        if entry.name in last:
            flush(directory)
        _rename(entry, place)
    flush(directory)
    source.rmdir()


def _rename(old: Path, new: Path) -> None:
    os.replace(old, new)
