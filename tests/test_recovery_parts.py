"""Schedule, moments and objective of recovery training, each against hand-worked values."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_pruner import prune
from adapt_pruner.api import Listener
from adapt_pruner.errors import InvalidSettings, NonFiniteError
from adapt_pruner.model.architectures import ARCHITECTURES
from adapt_pruner.recovery import objective
from adapt_pruner.recovery.moments import flatten, read_moments, unflatten, write_moments
from adapt_pruner.recovery.objective import (
    Teaching,
    forward_kl,
    loss_sums,
    store_teaching,
    targets_of,
)
from adapt_pruner.recovery.schedule import count_phases, learning_rates, make_phases
from adapt_pruner.recovery.settings import make_recovery_settings
from adapt_pruner.recovery.sharding import with_weights, without_weights
from adapt_pruner.recovery.training import SpikeGuard
from picomodels import build, random_tokens

# Schedule.


def test_phases_by_hand():
    # 3 phases of eq. 11: 1/6, 2/6 and 3/6 of 12 steps; sizes fall by a third of 300 each.
    made = make_recovery_settings(phases=3, final_share=0, sequence_length=10, batch_tokens=25)
    phases = make_phases(made, 1000, 700, tokens=12 * 20 + 7)
    assert [phase.parameters for phase in phases] == [900, 800, 700]
    assert [phase.steps for phase in phases] == [2, 4, 6]
    assert [phase.first_step for phase in phases] == [0, 2, 6]


@pytest.mark.parametrize(
    ("growth", "share", "steps"),
    [
        ("linear", 0.75, [5, 10, 45]),  # the rest, a quarter of 60, in the ratio 1 to 2
        ("linear", 0.4, [10, 20, 30]),  # eq. 11 gives the last phase more
        ("constant", 0.5, [15, 15, 30]),
    ],
)
def test_the_last_phase_gets_its_share(growth, share, steps):
    made = make_recovery_settings(
        phases=3, growth=growth, final_share=share, sequence_length=4, batch_tokens=4
    )
    assert [phase.steps for phase in make_phases(made, 1000, 700, tokens=240)] == steps


@pytest.mark.parametrize(
    ("before", "after", "paper"),
    [(1777.1, 1005.5, 11), (376.1, 143.1, 20)],
    ids=["DeepSeek 1.5B to 1B", "MobileLLM 350M to 125M"],
)
def test_number_of_phases_is_near_the_papers(before, after, paper):
    assert abs(count_phases(make_recovery_settings(), before, after) - paper) <= 1


@given(
    count=st.integers(1, 30),
    extra=st.integers(0, 500),
    growth=st.sampled_from(["linear", "constant", "cosine"]),
    before=st.integers(1000, 10**9),
    share=st.floats(0.05, 1),
    final=st.sampled_from([0.0, 0.5, 0.75, 0.99]),
)
@settings(max_examples=60, deadline=None)
def test_phases_use_every_step_and_end_at_the_target(count, extra, growth, before, share, final):
    target, total = int(before * share), count + extra
    made = make_recovery_settings(
        phases=count, growth=growth, final_share=final, sequence_length=4, batch_tokens=4
    )
    phases = make_phases(made, before, target, tokens=4 * total)
    assert sum(phase.steps for phase in phases) == total
    assert min(phase.steps for phase in phases) >= 1
    assert phases[-1].parameters == target
    sizes = [before, *(phase.parameters for phase in phases)]
    assert sizes == sorted(sizes, reverse=True)
    exact = {
        "linear": lambda j: j * (j + 1) / (count * (count + 1)),
        "constant": lambda j: j / count,
    }
    if final == 0 and growth in exact and extra > 10 * count:
        for phase in phases:  # at most one step per phase was moved to give each its first
            assert abs(phase.end_step - exact[growth](phase.number) * total) <= count / 2 + 1


def test_too_few_tokens_say_how_many_are_needed():
    made = make_recovery_settings(phases=5, sequence_length=8, batch_tokens=16)
    with pytest.raises(InvalidSettings, match="4 steps of 16; 5 phases"):
        make_phases(made, 100, 50, tokens=64)


def test_wsd_by_hand():
    made = make_recovery_settings(learning_rate=1.0, warmup_ratio=0.2, decay_ratio=0.2)
    rates = [learning_rates(made, 20)(step) for step in range(20)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 13 + [0.75, 0.5, 0.25])


@pytest.mark.parametrize("scheduler", ["wsd", "cosine", "constant"])
def test_learning_rate_has_no_jump_and_ends_near_the_lowest(scheduler):
    made = make_recovery_settings(
        learning_rate=1e-3, min_learning_rate=1e-4, lr_scheduler=scheduler
    )
    rate = learning_rates(made, 400)
    rates = [rate(step) for step in range(400)]
    assert max(rates) == pytest.approx(1e-3)
    assert min(rates) > 0
    assert max(abs(a - b) for a, b in pairwise(rates)) < 1.2e-4
    if scheduler != "constant":
        assert rates[-1] == pytest.approx(1e-4, rel=0.3)


# Moments.


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_moments_are_cut_as_the_weights_are(model_type, calibration):
    """Moments that equal the weights must equal the cut weights after a cut without refit."""
    model = build(model_type)
    moments = {
        name: {"exp_avg": p.detach().clone(), "exp_avg_sq": -p.detach(), "step": torch.tensor(3.0)}
        for name, p in model.named_parameters()
    }
    followed = []

    class Follower(Listener):
        def on_edit(self, edit, before):
            followed.append(edit.follow(model, moments))

    prune(
        model, sparsity=0.4, calibration=calibration, importance="random", compensation="none",
        tuning_steps=0, steps=2, listener=Follower(),
    )  # fmt: skip
    assert followed == [True, True]
    assert moments.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(moments[name]["exp_avg"], parameter.detach(), rtol=0, atol=0)
        torch.testing.assert_close(moments[name]["exp_avg_sq"], -parameter.detach())
        assert moments[name]["step"] == 3


def test_moments_survive_a_new_optimizer_and_a_file():
    model = build("llama")
    first = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=random_tokens(), labels=random_tokens()).loss.backward()
    first.step()
    moments = unflatten(flatten(read_moments(model, first)).items())
    second = torch.optim.AdamW(model.parameters(), lr=1e-3)
    write_moments(model, second, moments)
    for parameter in model.parameters():
        for key, value in first.state[parameter].items():
            assert torch.equal(value, second.state[parameter][key])


# Objective.


def batch(length: int = 6, vocabulary: int = 11, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, length, vocabulary, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (2, length), generator=generator)
    labels[0, :3] = -100
    return logits, labels


def test_cross_entropy_is_that_of_transformers():
    model, tokens = build("llama", torch.float32), random_tokens()
    labels = tokens.clone()
    labels[1, 4:7] = -100
    output = model(input_ids=tokens, labels=labels)
    total, windows = loss_sums(output.logits, labels)
    count = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(total / count, output.loss)
    torch.testing.assert_close(windows.sum(), total)


def test_divergence_by_hand():
    student = torch.tensor([[math.log(0.5), math.log(0.25), math.log(0.25)]])
    teacher = torch.tensor([[math.log(0.25), math.log(0.5), math.log(0.25)]])
    # 0.25 ln(0.25 / 0.5) + 0.5 ln(0.5 / 0.25) = 0.25 ln 2
    found = forward_kl(student, Teaching(teacher), temperature=1.0)
    assert found.item() == pytest.approx(0.25 * math.log(2))


def test_a_student_like_its_teacher_has_no_divergence():
    logits, _ = batch()
    found = forward_kl(logits.flatten(0, 1), Teaching(logits.flatten(0, 1) + 3.0), 2.0)
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_stored_logits_give_the_full_divergence_when_all_are_kept(temperature):
    student, teacher = batch(seed=1)[0].flatten(0, 1), batch(seed=2)[0].flatten(0, 1)
    full = forward_kl(student, Teaching(teacher), temperature)
    stored = [
        forward_kl(student, store_teaching(teacher, k, temperature), temperature)
        for k in (11, 6, 2)
    ]
    torch.testing.assert_close(stored[0], full.float(), atol=1e-4, rtol=1e-4, check_dtype=False)
    assert (stored[1] <= full + 1e-5).all()  # merging outcomes never adds divergence
    assert (stored[2] <= stored[1] + 1e-5).all()
    assert stored[2].mean() > 0.2 * full.mean()


def test_objective_mixes_both_at_labelled_positions_alone():
    logits, labels = batch(seed=3)
    teacher, _ = batch(seed=4)
    total, windows = loss_sums(logits, labels, Teaching(teacher.flatten(0, 1)), 0.3, 2.0)
    expected = 0.0
    for b in range(2):
        for t in range(5):
            label = labels[b, t + 1]
            if label != -100:
                p = F.softmax(teacher[b, t] / 2, dim=-1)
                q = F.log_softmax(logits[b, t] / 2, dim=-1)
                kl = (p * (p.log() - q)).sum()
                expected += 0.7 * F.cross_entropy(logits[b, t], label) + 0.3 * 4 * kl
    assert total.item() == pytest.approx(float(expected), rel=1e-5)
    assert len(windows) == 2


@pytest.mark.parametrize("top_k", [None, 4])
def test_objective_in_chunks_has_the_gradient_of_the_whole(top_k, monkeypatch):
    logits, labels = (value.repeat(4, 1, *[1] * (value.dim() - 2)) for value in batch(seed=7))
    logits = (logits + torch.randn(logits.shape)).float().requires_grad_()
    teacher = torch.randn(48, 11)
    teaching = store_teaching(teacher, top_k, 2.0) if top_k else Teaching(teacher)
    targets = targets_of(labels).flatten()
    ce = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
    kl = forward_kl(logits.flatten(0, 1), teaching, 2.0)[targets != -100].sum()
    expected = 0.3 * ce + 0.7 * 4 * kl
    (gradient,) = torch.autograd.grad(expected * 0.01, logits)
    monkeypatch.setattr(objective, "_CHUNK", 5 * 11)  # 48 positions, five at a time
    total, windows = loss_sums(logits, labels, teaching, 0.7, 2.0)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(windows.sum(), ce)
    torch.testing.assert_close(torch.autograd.grad(total * 0.01, logits)[0], gradient)


def test_tokens_that_a_teacher_does_not_know_have_no_probability():
    student, teacher = batch(seed=1)[0].flatten(0, 1), batch(seed=2)[0].flatten(0, 1)[:, :8]
    padded = torch.cat([teacher, teacher.new_full((len(teacher), 3), -1e4)], dim=1)
    found = forward_kl(student, Teaching(teacher), 2.0)
    torch.testing.assert_close(found, forward_kl(student, Teaching(padded), 2.0))


def test_gradient_of_stored_divergence_against_finite_differences():
    student = batch(seed=5)[0].flatten(0, 1)[:2].clone().requires_grad_()
    teaching = store_teaching(batch(seed=6)[0].flatten(0, 1)[:2], 4, 2.0)
    teaching = Teaching(teaching.logits_NK.double(), teaching.index_NK, teaching.log_total_N)
    assert torch.autograd.gradcheck(
        lambda x: forward_kl(x, teaching, 2.0), (student,), atol=1e-5, eps=1e-5
    )


# Sharding.


@pytest.mark.parametrize("tied", [False, True])
def test_model_made_again_from_its_weights_is_the_same(tied):
    model = build("llama", torch.bfloat16, tie_word_embeddings=tied)
    model.generation_config.top_k = 7
    empty = without_weights(model)
    assert all(parameter.is_meta for parameter in empty.parameters())
    again = with_weights(empty, {n: p.detach().clone() for n, p in model.named_parameters()})
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert again.generation_config.top_k == 7
    tokens = random_tokens()
    assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_spike_guard():
    guard = SpikeGuard(1.0, warmup=3)
    for loss in (5.0, 3.0, 3.1, 3.0, 3.2):
        guard.check(loss)
    with pytest.raises(NonFiniteError, match=r"rose to 6\.000"):
        guard.check(6.0)
    SpikeGuard(None).check(1e9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_tokens": 100, "sequence_length": 200}, "at least one window of 200"),
        ({"learning_rate": 1e-5, "min_learning_rate": 1e-4}, "must not be above"),
        ({"warmup_ratio": 0.7, "decay_ratio": 0.6}, "together at most 1"),
        ({"phasez": 3}, "no setting 'phasez'. Did you mean 'phases'"),
        ({"alpha": 1.5}, "alpha.*1.5"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(InvalidSettings, match=message):
        make_recovery_settings(**values)
