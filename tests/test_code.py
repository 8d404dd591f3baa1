"""What a figure was computed by: changed code is another key, changed words are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapt_pruner.evaluation import code

SOURCE = '''"""Module."""
from .below import twice

def figure(x):
    """Say what it is."""
    return twice(x)  # why
'''


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    place = tmp_path / "toy_package"
    (place / "deep").mkdir(parents=True)
    for name in ("__init__", "deep/__init__"):
        (place / f"{name}.py").write_text("")
    (place / "top.py").write_text("from .deep import figures\nimport math\n")
    (place / "deep" / "figures.py").write_text(SOURCE)
    (place / "deep" / "below.py").write_text("def twice(x):\n    return 2 * x\n")
    (place / "other.py").write_text("A = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    return place


def now() -> str:
    code.of_modules.cache_clear()
    return code.of_modules(("toy_package.top",))


def test_all_that_is_imported_counts(package):
    found = code.modules(["toy_package.top"])
    assert sorted(found) == [
        "toy_package.deep.below", "toy_package.deep.figures", "toy_package.top",
    ]  # fmt: skip
    before = now()
    (package / "other.py").write_text("A = 2\n")
    assert now() == before
    (package / "deep" / "below.py").write_text("def twice(x):\n    return 2.1 * x\n")
    assert now() != before


def test_words_do_not_count(package):
    before = now()
    source = SOURCE.replace("Say what it is.", "Say it in other words.").replace("# why", "")
    (package / "deep" / "figures.py").write_text(f"# A comment.\n{source}")
    assert now() == before


@pytest.mark.parametrize(
    ("roots", "holds", "lacks"),
    [
        (code.PRUNING, {"score.collect", "model.edits", "data.reading", "compensate.refit"},
         {"evaluation.perplexity", "report.page"}),
        (code.TEXT, {"evaluation.perplexity", "data.reading", "model.layers"},
         {"score.collect", "evaluation.harness"}),
        (code.TASKS, {"evaluation.harness", "evaluation.task_data", "model.layers"},
         {"score.collect", "recovery.run"}),
    ],
)  # fmt: skip
def test_figures_of_this_package(roots, holds, lacks):
    pytest.importorskip("lm_eval")
    found = {name.removeprefix("adapt_pruner.") for name in code.modules(roots)}
    assert holds <= found
    assert not lacks & found
