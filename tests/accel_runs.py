"""Runs of Adapt-Accel on the tiny Llama, as several tests make them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapt_pruner.methods import make_settings
from adapt_pruner.recovery.accel import run_accel
from adapt_pruner.recovery.request import AccelRequest
from adapt_pruner.recovery.settings import make_recovery_settings

TRAINING = {
    "phases": 3, "sequence_length": 16, "batch_tokens": 64, "learning_rate": 3e-3, "repeat": True,
    "moments": "carry", "alpha": 0.0, "final_share": 0.0,
}  # fmt: skip


@pytest.fixture
def shared_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def request_(shared_cache, llama, text_file) -> AccelRequest:
    """Three phases of 2, 4 and 6 steps of 4 windows on the tiny Llama."""
    settings = make_settings(calibration=str(text_file), windows=4, window_length=12, steps=3)
    recovery = make_recovery_settings(**TRAINING)
    return AccelRequest(
        str(llama), str(text_file), 12 * 64, settings, recovery, sparsity=0.4, save_steps=3
    )


def with_training(request: AccelRequest, **changes: Any) -> AccelRequest:
    options = {**TRAINING, **changes}
    if options.get("lora_rank"):
        options["moments"] = "reset"
    return replace(request, recovery=make_recovery_settings(**options))


def finish(request: AccelRequest, place: Path) -> Any:
    outcome = run_accel(request, place)
    assert outcome.result is not None, outcome.stopped
    return outcome.result


def weights(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "model.safetensors")


def assert_equal(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def closed_phases(place: Path) -> list[dict[str, Any]]:
    phases = json.loads((place / "phases.json").read_text())
    return [{k: v for k, v in phase.items() if k != "seconds"} for phase in phases]


def logged(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "training.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def uninterrupted(llama, text_file, tmp_path_factory) -> Path:
    """The directory of a run that nobody disturbed."""
    place = tmp_path_factory.mktemp("uninterrupted") / "run"
    os.environ["ADAPT_PRUNER_CACHE"] = str(place.parent / "cache")
    settings = make_settings(calibration=str(text_file), windows=4, window_length=12, steps=3)
    recovery = make_recovery_settings(**TRAINING)
    run_accel(
        AccelRequest(
            str(llama), str(text_file), 768, settings, recovery, sparsity=0.4, save_steps=3
        ),
        place,
    )
    return place


def in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a fork; the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def kill_at(place: Any, name: str, call: int, before_it: bool) -> None:
    """Make this process die at the given call of a function, before or after what it does."""
    original, count = getattr(place, name), [0]

    def deadly(*args, **kwargs):
        count[0] += 1
        if count[0] == call and before_it:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(place, name, deadly)
