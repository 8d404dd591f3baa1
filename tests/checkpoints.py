"""Checkpoints of the tiny Llama."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adapt_pruner import PruningResult, prune
from adapt_pruner.report import pictures
from picomodels import PICO, build
from reload_checkpoints import outputs

READER = Path(__file__).with_name("reload_checkpoints.py")


def pruned(model_type: str, calibration, dtype=torch.float32, **overrides) -> PruningResult:
    """A model whose layers lost different numbers of KV groups and neurons."""
    settings = {"allocation": "adaptive", "steps": 4, "amplitude": 0.1, "sparsity": 0.38,
                "tuning_steps": 1}  # fmt: skip
    return prune(build(model_type, dtype), calibration=calibration, **{**settings, **overrides})


def read(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


@dataclass
class Reading:
    """What a process of its own got out of checkpoints, and what the models in memory gave."""

    expected: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    found: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    messages: str = ""

    def run(self, directory: Path, imported: str, trust: str) -> Reading:
        """Read every checkpoint in `directory` in a new process."""
        result = directory / "result.safetensors"
        names = [str(directory / name) for name in self.expected]
        cache = str(directory / "home")  # remote code is copied there
        environment = {**os.environ, "HF_HOME": cache, "PYTHONWARNINGS": "default"}
        done = subprocess.run(
            [sys.executable, str(READER), imported, trust, str(result), *names],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.messages = done.stdout + done.stderr
        for key, value in load_file(result).items():
            name, output = key.rsplit(".", 1)
            self.found.setdefault(name, {})[output] = value
        return self

    def check(self, name: str) -> None:
        for output, expected in self.expected[name].items():
            assert torch.equal(self.found[name][output], expected), output


@pytest.fixture(scope="session")
def readings(calibration, tmp_path_factory) -> dict[str, Any]:
    """Models of all architectures, read back as plain, portable and uniform checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw_all", lambda directory, result: {})
        return write_and_read(calibration, tmp_path_factory.mktemp("checkpoints"))


def write_and_read(calibration, home: Path) -> dict[str, Any]:
    plain, portable, uniform = Reading(), Reading(), Reading()
    for name in PICO:
        result = pruned(name, calibration)
        result.save(home / "plain" / name)
        plain.expected[name] = outputs(result.model)
        result.save(home / "portable" / name, portable=True)
        portable.expected[name] = plain.expected[name]
        result = pruned(name, calibration, layout="uniform")
        result.save(home / "uniform" / name, portable=True)
        uniform.expected[name] = outputs(result.model)
    return {
        "plain": plain.run(home / "plain", "with", "plain"),
        "portable": portable.run(home / "portable", "without", "trust"),
        "uniform": uniform.run(home / "uniform", "without", "plain"),
        "home": home,
    }


@pytest.fixture(scope="module")
def llama_result(calibration, tokenizer) -> PruningResult:
    """A pruned Llama with its tokenizer. Not to be changed."""
    result = pruned("llama", calibration)
    result.tokenizer = tokenizer
    return result


@pytest.fixture(scope="module")
def llama_checkpoint(llama_result, tmp_path_factory) -> Path:
    return llama_result.save(tmp_path_factory.mktemp("llama") / "smaller")
