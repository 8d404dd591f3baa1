"""A command that is killed anywhere leaves a whole output, the old one or the new one.

A few seeded points in a normal run; ADAPT_PRUNER_KILLS=100 tries a hundred of each command.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

POINTS = int(os.environ.get("ADAPT_PRUNER_KILLS", "2"))


@pytest.mark.parametrize("command", ["prune", "accel", "compare"])
def test_output_is_whole_after_a_kill(command, llama, text_file, tmp_path):
    shutil.copytree(llama, tmp_path / "llama")
    shutil.copy(text_file, tmp_path / "text.txt")
    script = Path(__file__).with_name("kill_points.py")
    arguments = [sys.executable, str(script), command, str(tmp_path), "--points", str(POINTS)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bad"] == []
    assert found["kills"] == POINTS
