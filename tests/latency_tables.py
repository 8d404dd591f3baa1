"""A table of times by hand, for the tiny Llama of `picomodels`."""

from __future__ import annotations

import pytest
import torch

from adapt_pruner import CalibrationData
from adapt_pruner.latency import Latency, LatencyTable, write_table
from adapt_pruner.model.anatomy import find_anatomy
from picomodels import build, random_tokens

CALIBRATION = CalibrationData(random_tokens(20, 30), window_length=12, num_windows=4)
BY_HAND = {
    "machine": "a phone",
    "engine": "torch",
    "dtype": "float32",
    "stage": "decode",
    "context": 32,
    "shapes": {
        "model_type": "llama", "hidden_size": 64, "head_dim": 8, "vocabulary": 128, "layers": 3,
    },
    "outside_ns": 1000,
    "layer_ns": 100,
    "mlp_ns": [[0, 0], [32, 400], [64, 400], [96, 1000]],
    "attention_ns": [[0, 0, 0], [1, 1, 100], [1, 2, 150], [4, 1, 250], [4, 2, 600]],
}  # fmt: skip
DENSE = 1000 + 3 * (100 + 1000 + 600)


def table(**values) -> LatencyTable:
    return LatencyTable.model_validate({**BY_HAND, **values})


def llama():
    return build("llama", torch.float32)


def anatomy_by(of=None, model=None):
    return find_anatomy(model or llama(), Latency(of or table()))


@pytest.fixture
def times(tmp_path):
    """The file of the table."""
    write_table(table(), tmp_path / "table.json")
    return tmp_path / "table.json"
