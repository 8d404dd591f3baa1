"""A result to write, and a directory that is to be replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapt_pruner import PruningResult, prune
from adapt_pruner.claims import write_record
from picomodels import build


@pytest.fixture
def result(calibration) -> PruningResult:
    model = build("llama", torch.float32)
    return prune(model, sparsity=0.3, calibration=calibration, steps=1, tuning_steps=1)


@pytest.fixture
def existing(tmp_path) -> Path:
    """A directory that a run wrote, so that another may replace it when it has something better."""
    directory = tmp_path / "existing"
    (directory / "deep").mkdir(parents=True)
    (directory / "deep" / "weights").write_text("hours of work")
    (directory / "config.json").write_text("{}")
    write_record(directory)
    return directory


def is_untouched(existing: Path) -> bool:
    """Whether all is as the fixture left it, with nothing beside it."""
    files = [file.relative_to(existing.parent) for file in sorted(existing.parent.rglob("*"))]
    inside = [".adapt-pruner.json", "config.json", "deep", "deep/weights"]
    names = ["existing", *(f"existing/{name}" for name in inside)]
    return [str(file) for file in files] == names and (
        existing / "deep" / "weights"
    ).read_text() == "hours of work"
