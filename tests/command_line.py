"""The command line on the tiny Llama."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

TINY = ("--windows", 8, "--window-length", 12, "--steps", 2)
"""Settings with which a picomodel is pruned in no time."""
DENSE, IN_LAYERS, OTHER = 110_336, 93_888, 16_448
"""Parameters of the tiny Llama: 3 layers, hidden 64, 8 query / 4 KV heads, 96 neurons, biases."""


def run(*args: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "adapt_pruner", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )


def read(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


def recipe_of(directory: Path) -> dict:
    return yaml.safe_load((directory / "recipe.yaml").read_text(encoding="utf-8"))


def size_of(directory: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(directory / "model.safetensors").values())


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def prune(cli, llama, text_file, tmp_path):
    """Prune the tiny Llama into `tmp_path / "out"`; returns that directory."""

    def command(*more: object, target=("--sparsity", 0.3), output: str = "out") -> Path:
        done = cli(
            "prune", llama, "-o", tmp_path / output, *target, *TINY, "--calibration", text_file,
            *more,
        )  # fmt: skip
        assert (done.status, done.err) == (0, ""), done.err
        return tmp_path / output

    return command
