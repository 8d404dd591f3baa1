"""A pruned run to report on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def pruned(llama, text_file, tmp_path_factory) -> Path:
    """Directory of a run on the tiny Llama, with quality measured. Not to be written to."""
    from adapt_pruner.methods import make_settings
    from adapt_pruner.run import Request, run_pruning

    directory = tmp_path_factory.mktemp("runs") / "tiny & <pruned>"
    settings = make_settings(
        steps=3,
        windows=8,
        window_length=12,
        calibration=str(text_file),
        device="cpu",
        tuning_steps=1,
    )
    run_pruning(Request(str(llama), settings, sparsity=0.4, evaluate=str(text_file)), directory)
    return directory


@pytest.fixture
def run(pruned, tmp_path) -> Path:
    """A copy of that directory, to change."""
    return Path(shutil.copytree(pruned, tmp_path / "run"))


def train(run: Path, losses: list[float], phases: list[tuple[int, int, float | None]]) -> None:
    """Write the training log: one step of 100 tokens per loss; (from token, size, perplexity)."""
    lines = [
        {"step": i, "phase": 1, "tokens": 100 * i, "loss": loss, "learning_rate": 1e-4,
         "tokens_per_second": 5.0}
        for i, loss in enumerate(losses, 1)
    ]  # fmt: skip
    (run / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "phases.json").write_text(
        json.dumps(
            [
                {"phase": i, "tokens_before": start, "parameters": size, "widths": [],
                 "evaluation": None if quality is None else {"perplexity": quality}}
                for i, (start, size, quality) in enumerate(phases, 1)
            ]
        )
    )  # fmt: skip
