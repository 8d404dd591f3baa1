"""A command that is killed anywhere leaves a whole output, the old one or the new one.

A few seeded points in a normal run; ADAPT_PRUNER_KILLS=100 tries a hundred of each command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kill_points import materials
from picomodels import build

POINTS = int(os.environ.get("ADAPT_PRUNER_KILLS", "2"))
NEEDS = {"search": "optuna", "export": "gguf"}


@pytest.mark.parametrize("command", ["prune", "accel", "compare", "search", "export"])
def test_output_is_whole_after_a_kill(command, tokenizer, documents, tmp_path):
    if command in NEEDS:
        pytest.importorskip(NEEDS[command])
    materials(tmp_path, build("llama", torch.float32), tokenizer, documents)
    script = Path(__file__).with_name("kill_points.py")
    arguments = [sys.executable, str(script), command, str(tmp_path), "--points", str(POINTS)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bad"] == []
    assert found["kills"] == min(POINTS, found["events"])
