"""Nothing wrong passes in silence, ends in an unexpected error, hangs or fills the memory.

Of the wrong values inside files a normal run tries a fifth; ADAPT_PRUNER_ALL=1 tries all of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from adapt_pruner.methods import make_settings
from adapt_pruner.report import pictures
from adapt_pruner.run import Request, run_pruning
from wrong_values import Call, arms, is_number, judge, settings_models, wrong_files, wrong_settings

SECONDS_PER_CALL = 10.0


@pytest.fixture(scope="module")
def run_directory(llama, text_file, tmp_path_factory) -> Path:
    """The directory of a real run."""
    directory = tmp_path_factory.mktemp("wrong") / "run"
    settings = make_settings(
        calibration=str(text_file), steps=1, tuning_steps=1, windows=4, window_length=12
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw_all", lambda directory, result: {})
        run_pruning(Request(str(llama), settings, sparsity=0.2), directory)
    return directory


def judged(calls: Iterable[Call]) -> tuple[int, list[str]]:
    """How many calls there were, and what was bad."""
    count, bad = 0, []
    for call in calls:
        began = time.perf_counter()
        verdict = judge(call)
        count += 1
        if verdict.outcome == "bad":
            bad.append(f"{call.name}: {verdict.why}")
        if time.perf_counter() - began > SECONDS_PER_CALL:
            bad.append(f"{call.name}: took {time.perf_counter() - began:.0f} s")
    return count, bad


def test_every_number_of_every_setting_has_limits():
    without = []
    for model in settings_models():
        for field, schema in model.model_json_schema()["properties"].items():
            for part in filter(is_number, arms(schema)):
                low = part.keys() & {"minimum", "exclusiveMinimum"}
                high = part.keys() & {"maximum", "exclusiveMaximum"}
                if not low or not high:
                    without.append(f"{model.__name__}.{field}")
    assert not without


def test_wrong_settings():
    count, bad = judged(wrong_settings())
    assert count > 1_000
    assert not bad, "\n".join(bad)


def test_wrong_files(llama, run_directory, tmp_path):
    every = 1 if os.environ.get("ADAPT_PRUNER_ALL") else 5
    count, bad = judged(wrong_files(tmp_path, llama, run_directory, every))
    assert count > 1_000
    assert not bad, "\n".join(bad[:60])
