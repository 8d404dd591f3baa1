"""Any target is met by ranking and by the adaptive rule (arXiv:2502.03460, equation 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_pruner.allocate.chains import Limits
from adapt_pruner.allocate.schedules import AdaptiveSchedule
from toy_anatomy import (
    ToyAnatomy,
    ToyAxis,
    attention,
    chains_of,
    left_without,
    mlp,
    removal_of,
    remove,
    removed,
    unit_cost,
    widths_left,
)


def removable(removal):
    return sum(int(chain.sizes.sum()) * unit_cost(chain) for chain in removal.chains)


# --- any shape --------------------------------------------------------------------------------


@dataclass
class Case:
    axes: list[ToyAxis]
    limits: Limits
    seed: int
    needed_share: float

    def scores(self, axes, step=0):
        """Few distinct values, so that there are ties."""
        generator = torch.Generator().manual_seed(self.seed + step)
        return {g.key: torch.randint(0, 12, (g.num_units,), generator=generator) / 4 for g in axes}


@st.composite
def cases(draw):
    uniform = draw(st.booleans())
    num_layers = draw(st.integers(1, 4))
    neuron_cost = draw(st.integers(1, 9))
    kv_cost = neuron_cost + draw(st.integers(0, 60))  # never cheaper than a neuron
    neurons, kv_groups = st.integers(1, 30), st.integers(1, 5)
    if uniform:
        neurons, kv_groups = st.just(draw(neurons)), st.just(draw(kv_groups))
    axes = []
    for layer in range(num_layers):
        if uniform or draw(st.booleans()):
            axes.append(attention(layer, draw(kv_groups), kv_cost))
        axes.append(mlp(layer, draw(neurons), neuron_cost))
    kinds = draw(st.sampled_from([{"neurons"}, {"kv-groups"}, {"neurons", "kv-groups"}]))
    protected = set() if uniform else draw(st.sets(st.integers(0, num_layers - 1)))
    limits = Limits(frozenset(kinds), frozenset(protected), draw(st.integers(1, 8)), uniform)
    return Case(axes, limits, draw(st.integers(0, 2**31)), draw(st.floats(0, 1)))


def nearest_possible(removal, needed):
    """The smallest number of parameters, at least `needed`, that any choice of blocks removes."""
    sums = {0}
    for chain in removal.chains:
        taken = [0, *(torch.cumsum(chain.sizes, dim=0) * unit_cost(chain)).tolist()]
        sums = {a + b for a in sums for b in taken}
    return min(total for total in sums if total >= needed)


def promised(removal, limits):
    """What the target may be missed by less than: one neuron (one multiple of them) or, where only
    attention is cut, one KV group; in a uniform layout from every layer."""
    costs = {"neurons": [], "kv-groups": []}
    for chain in removal.chains:
        costs[chain.members[0].kind].append(unit_cost(chain))
    return min([limits.multiple * cost for cost in costs["neurons"]] or costs["kv-groups"])


def assert_sound(case, removal, scores, needed):
    """What holds for any allocation: the target is met, no limit is passed."""
    count = removed(removal)
    assert count >= needed
    if count - needed >= promised(removal, case.limits):  # then nothing nearer is possible
        assert count == nearest_possible(removal, needed)
    masks = removal.keep_masks(scores)
    by_key = {axis.key: axis for axis in case.axes}
    assert count == sum(int((~m).sum()) * by_key[key].unit_cost for key, m in masks.items())
    for (layer, kind), mask_U in masks.items():
        assert kind in case.limits.kinds
        assert layer not in case.limits.protected_layers
        multiple = case.limits.multiple if kind == "neurons" else 1
        assert mask_U.sum() >= multiple
        assert mask_U.sum() % multiple == 0
        score_U = scores[layer, kind]
        assert score_U[~mask_U].max() <= score_U[mask_U].min()
    if case.limits.uniform:
        for kind in case.limits.kinds:
            left = {int(mask_U.sum()) for (_, other), mask_U in masks.items() if other == kind}
            assert len(left) <= 1
            members = sum(other == kind for _, other in masks)
            assert members in (0, len({axis.layer for axis in case.axes}))


@given(cases())
@settings(max_examples=300, deadline=None)
def test_one_ranking_meets_any_target_within_what_is_promised(case):
    scores = case.scores(case.axes)
    removal = removal_of(case.axes, scores, case.limits)
    needed = math.ceil(case.needed_share * removable(removal))
    if needed:
        remove(removal, needed)
        assert_sound(case, removal, scores, needed)


@given(cases(), st.integers(1, 6), st.sampled_from([0.0, 0.02, 0.2, 1.0]))
@settings(max_examples=150, deadline=None)
def test_the_adaptive_rule_meets_any_target_within_what_is_promised(case, steps, amplitude):
    axes, removed_before = case.axes, 0
    everything = removable(removal_of(axes, case.scores(axes), case.limits))
    target = math.ceil(case.needed_share * everything)
    schedule = AdaptiveSchedule(ToyAnatomy(axes), steps, amplitude)
    done, step = target == 0, 0
    while not done:
        step += 1
        scores = case.scores(axes, step)
        removal = removal_of(axes, scores, case.limits)
        generator = torch.Generator().manual_seed(case.seed + step)
        importance = (2 * torch.rand(len(schedule.sparsity), generator=generator) - 1).tolist()
        needed = target - removed_before
        done = schedule.advance(
            removal, left_without(removal, needed), importance, case.limits.uniform
        )
        assert step <= 10 * steps
        case.axes = axes
        if done:
            assert_sound(case, removal, scores, needed)
        else:
            assert removed(removal) < needed
        removed_before += removed(removal)
        left = {key: int(mask_U.sum()) for key, mask_U in removal.keep_masks(scores).items()}
        axes = [ToyAxis(g.layer, g.kind, left.get(g.key, g.num_units), g.unit_cost) for g in axes]


# --- the paper's rule -------------------------------------------------------------------------


def neurons_per_layer(*widths):
    axes = [mlp(layer, width) for layer, width in enumerate(widths)]
    return axes, [(axis, [1.0] * axis.num_units) for axis in axes]


def test_sparsity_grows_by_equation_6_relative_to_the_original_widths():
    axes, scored = neurons_per_layer(10, 10, 10)
    schedule = AdaptiveSchedule(ToyAnatomy(axes), steps=4, amplitude=0.1)
    removal, _ = chains_of(*scored)
    assert not schedule.advance(removal, left_without(removal, 27), [1.0, 0.0, -0.5], uniform=False)
    # 1/4 - 0.1 * importance
    assert schedule.sparsity == pytest.approx([0.15, 0.25, 0.3])
    assert widths_left(removal) == [8, 7, 7]  # 8.5, 7.5, 7 rounded down
    _, scored = neurons_per_layer(8, 7, 7)
    removal, _ = chains_of(*scored)
    assert not schedule.advance(removal, left_without(removal, 19), [-1.0, 1.0, 0.0], uniform=False)
    assert schedule.sparsity == pytest.approx([0.5, 0.4, 0.55])
    assert widths_left(removal) == [5, 6, 4]  # of 10 neurons each, not of 8, 7, 7


def test_sparsity_is_clipped_at_0_and_at_099():
    axes, scored = neurons_per_layer(200, 200)
    schedule = AdaptiveSchedule(ToyAnatomy(axes), steps=2, amplitude=0.8)
    removal, _ = chains_of(*scored)
    assert not schedule.advance(removal, left_without(removal, 300), [1.0, -1.0], uniform=False)
    assert schedule.sparsity == [0.0, 0.99]  # 0.5 - 0.8 and 0.5 + 0.8
    assert widths_left(removal) == [200, 2]


def test_attention_and_mlp_of_a_layer_share_its_sparsity():
    axes = [attention(0, 8), mlp(0, 100), attention(1, 8), mlp(1, 100)]
    schedule = AdaptiveSchedule(ToyAnatomy(axes), steps=2, amplitude=0.25)
    removal, _ = chains_of(*[(axis, [1.0] * axis.num_units) for axis in axes])
    assert not schedule.advance(removal, left_without(removal, 10_000), [1.0, -1.0], uniform=False)
    assert widths_left(removal) == [6, 75, 2, 25]


def test_a_uniform_layout_takes_the_mean_sparsity():
    axes, scored = neurons_per_layer(100, 100)
    schedule = AdaptiveSchedule(ToyAnatomy(axes), steps=4, amplitude=1.0)
    removal, _ = chains_of(*scored, uniform=True)
    assert not schedule.advance(removal, left_without(removal, 199), [1.0, -1.0], uniform=True)
    # Clipped to 0 and 0.99 (0.25 - 1 and 0.25 + 1), 0.495 on average.
    assert schedule.sparsity == pytest.approx([0.495, 0.495])
    assert widths_left(removal) == [50]


@pytest.mark.parametrize(
    ("needed", "left"),
    [
        (100, [60, 40]),  # the whole step: 0.5 -/+ 0.1
        (50, [80, 70]),  # half of it: 0.2 and 0.3
        (20, [92, 88]),  # a fifth: 0.08 and 0.12
    ],
)
def test_the_last_step_is_shortened_to_meet_the_target(needed, left):
    axes, scored = neurons_per_layer(100, 100)
    schedule = AdaptiveSchedule(ToyAnatomy(axes), steps=2, amplitude=0.1)
    removal, _ = chains_of(*scored)
    assert schedule.advance(removal, left_without(removal, needed), [1.0, -1.0], uniform=False)
    assert widths_left(removal) == left


def test_a_shortened_step_gives_back_its_most_important_units():
    axes = [mlp(0, 100), mlp(1, 100)]
    schedule = AdaptiveSchedule(ToyAnatomy(axes), steps=2, amplitude=0.1)
    removal, _ = chains_of((axes[0], [1.0] * 100), (axes[1], [2.0] * 100))
    # Both layers reach 74 neurons at the same moment, 52 fewer; one of layer 1 comes back.
    assert schedule.advance(removal, left_without(removal, 51), [0.0, 0.0], uniform=False)
    assert widths_left(removal) == [74, 75]


def test_targets_beyond_the_rule_are_met_by_ranking():
    axes, scored = neurons_per_layer(200, 200)
    schedule = AdaptiveSchedule(ToyAnatomy(axes), steps=1, amplitude=0.0)
    removal, _ = chains_of(*scored)
    assert schedule.advance(
        removal, left_without(removal, 397), [0.0, 0.0], uniform=False
    )  # 0.99 leaves 2 + 2
    assert sum(widths_left(removal)) == 3


def test_a_rule_that_can_change_nothing_more_gives_way_to_ranking():
    # Layer 0 never grows (1/5 - 0.2 * 1), layer 1 by 0.4 a step until 0.99. The fourth step would
    # repeat the third, and so would all that follow it.
    axes, _ = neurons_per_layer(100, 100)
    schedule = AdaptiveSchedule(ToyAnatomy(axes), steps=5, amplitude=0.2)
    done, widths = [], [100, 100]
    for _ in range(4):
        _, scored = neurons_per_layer(*widths)
        removal, _ = chains_of(*scored)
        done.append(
            schedule.advance(
                removal, left_without(removal, sum(widths) - 50), [1.0, -1.0], uniform=False
            )
        )
        widths = widths_left(removal)
    assert done == [False, False, False, True]
    assert widths == [49, 1]
