"""Minitron's teacher correction: the teacher is trained on the data before it teaches."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
import torch
import yaml

from accel_runs import assert_equal, finish, in_child, kill_at, logged, weights, with_training
from adapt_pruner import load_model
from adapt_pruner.errors import InvalidSettings
from adapt_pruner.recovery import accel as accelerating
from adapt_pruner.recovery import training
from adapt_pruner.recovery.accel import run_accel


@pytest.fixture
def corrected(request_):
    """One phase of 4 steps, after 3 of the teacher's."""
    return with_training(
        replace(request_, tokens=4 * 64),
        phases=1,
        alpha=1.0,
        temperature=1.0,
        teacher_tokens=3 * 64,
    )


def test_the_teacher_is_what_training_alone_makes_of_the_model(corrected, tmp_path, monkeypatch):
    """By hand: one run without a cut, and another that it teaches."""
    alone = with_training(replace(corrected, tokens=3 * 64, sparsity=0.0), phases=1)
    finish(alone, tmp_path / "teacher")
    by_hand = with_training(corrected, phases=1, alpha=1.0, temperature=1.0)
    finish(replace(by_hand, teacher=str(tmp_path / "teacher")), tmp_path / "by-hand")
    taught, original = [], accelerating.make_teacher

    def make_teacher(request, *others):
        taught.append(weights(tmp_path / "run" / "corrected-teacher"))
        return original(request, *others)

    monkeypatch.setattr(accelerating, "make_teacher", make_teacher)
    finish(corrected, tmp_path / "run")
    expected = weights(tmp_path / "teacher")
    assert all(torch.equal(taught[0][name], tensor) for name, tensor in expected.items())
    assert_equal(tmp_path / "run", tmp_path / "by-hand")
    source = load_model(corrected.model).state_dict()
    assert not all(torch.equal(source[name], tensor) for name, tensor in expected.items())
    assert not (tmp_path / "run" / "corrected-teacher").exists()
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["teacher_tokens"] == 192
    assert "teacher" not in recipe


@pytest.mark.parametrize("step", [2, 5])
def test_killed_while_or_after_the_teacher_is_corrected(corrected, tmp_path, step):
    corrected = replace(corrected, save_steps=1)
    finish(corrected, tmp_path / "whole")

    def die():
        kill_at(training.PhaseTraining, "step", step, before_it=True)
        run_accel(corrected, tmp_path / "killed")

    assert in_child(die) == signal.SIGKILL
    assert (tmp_path / "killed" / "corrected-teacher").exists()
    finish(corrected, tmp_path / "killed")
    assert_equal(tmp_path / "killed", tmp_path / "whole")
    assert len(logged(tmp_path / "killed")) == 4
    assert "finished" in run_accel(corrected, tmp_path / "killed").stopped


def test_there_is_nobody_to_correct_without_a_teacher(corrected, tmp_path):
    with pytest.raises(InvalidSettings, match="with alpha 0 there is no teacher"):
        run_accel(with_training(corrected, alpha=0.0, teacher_tokens=64), tmp_path / "run")
