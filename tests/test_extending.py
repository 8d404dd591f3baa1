"""The code of docs/extending.md runs as it stands there; so does the example of docs/scores.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.11

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(?:python|toml)\n(# (\S+)\n)?(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks_of(page: str) -> dict[str, str]:
    """The page's blocks of code by the file name in their first line."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return {name: code for _, name, code in BLOCK.findall(text)}


@pytest.fixture
def installed(tmp_path):
    """The page's package as an installer would leave it, and a directory to work in."""
    site, work = tmp_path / "site", tmp_path / "work"
    info = site / "my_pruning-0.1.dist-info"
    info.mkdir(parents=True)
    work.mkdir()
    files = blocks_of("extending.md")
    project = tomllib.loads(files.pop("pyproject.toml"))
    (work / "try_it.py").write_text(files.pop("try_it.py"))
    assert sorted(files) == [f"{m}.py" for m in sorted(project["tool"]["setuptools"]["py-modules"])]
    for name, code in files.items():
        (site / name).write_text(code)
    name, version = project["project"]["name"], project["project"]["version"]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = project["project"]["entry-points"].items()
    sections = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in rows.items())])
        for group, rows in groups
    ]
    (info / "entry_points.txt").write_text("\n".join(sections))
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return work, {**os.environ, "PYTHONPATH": paths}


def test_the_page_adds_a_score_a_method_and_an_architecture(installed):
    work, environment = installed
    call = [sys.executable, "-W", "error::UserWarning", "try_it.py"]
    done = subprocess.run(call, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pruned twice:")


def test_the_example_of_the_residual_share_is_right():
    for code in blocks_of("scores.md").values():
        exec(code, {})
