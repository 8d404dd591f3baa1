"""A command that is killed anywhere leaves a whole output, the old one or the new one.

A few seeded points in a normal run; ADAPT_PRUNER_KILLS=100 tries a hundred of each command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from killed_commands import materials
from picomodels import build

POINTS = int(os.environ.get("ADAPT_PRUNER_KILLS", "2"))
NEEDS = {
    "prune": "torch",
    "accel": "torch",
    "compare": "torch",
    "search": "optuna",
    "export": "gguf",
}


def test_outputs_are_whole_after_kills(tokenizer, documents, tmp_path):
    commands = [command for command, package in NEEDS.items() if find_spec(package)]
    materials(tmp_path, build("llama", torch.float32), tokenizer, documents)
    script = Path(__file__).with_name("kill_points.py")
    arguments = [sys.executable, str(script), ",".join(commands), str(tmp_path)]
    done = subprocess.run(
        [*arguments, "--points", str(POINTS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = {one["command"]: one for one in map(json.loads, lines)}
    assert {command: one["bad"] for command, one in found.items()} == {c: [] for c in commands}
    assert all(one["kills"] == min(POINTS, one["events"]) for one in found.values())
