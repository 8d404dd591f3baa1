"""Turn the state of a finished run into the checkpoint that users load."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..api import PruningResult
from ..checkpoint import save_result
from ..run import store_as

if TYPE_CHECKING:
    from .accel import _Run


def finish(run: _Run) -> PruningResult:
    """Write the model and its account into the run's directory; then the checkpoints go.

    The model's config.json and at last run.json arrive after all else, so that neither a tool nor
    a resume takes a half-written result for a whole one.
    """
    result = run.result()
    if run.settings.dtype == "auto" and run.stored_dtype is not None:
        store_as(run.model, run.stored_dtype)
    if run.is_main:
        directory = run.place.directory
        whole = directory / ".result"
        save_result(
            result, whole, run.request.portable, overwrite=True, recipe=run.request.recipe(),
            name=directory.resolve().name,
        )  # fmt: skip
        _move_all(whole, directory)
        if not run.request.keep_checkpoint:
            run.place.discard_checkpoints()
            shutil.rmtree(directory / "teacher", ignore_errors=True)
    run.accelerator.wait_for_everyone()
    return result


def _move_all(source: Path, directory: Path) -> None:
    last = ["config.json", "run.json"]
    for entry in sorted(source.iterdir(), key=lambda e: (e.name in last, e.name)):
        place = directory / entry.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(entry, place)
    source.rmdir()
