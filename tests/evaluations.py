"""Tasks, data and a pruned model to measure."""

from __future__ import annotations

from pathlib import Path

import pytest

import task_items
from adapt_pruner.evaluation.store import VARIABLE


@pytest.fixture
def own_results(tmp_path, monkeypatch) -> Path:
    """No test reads or writes the user's own results."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return task_items.write_items(tmp_path_factory.mktemp("task-data"))
