"""Which blocks of units go, in hand-worked numbers and for arbitrary shapes of models."""

from __future__ import annotations

from itertools import pairwise

import pytest

from adapt_pruner.allocate.chains import Limits
from adapt_pruner.allocate.ranking import tighten
from adapt_pruner.allocate.schedules import sizes_after_steps
from adapt_pruner.allocate.target import check_reachable, resolve_target
from adapt_pruner.errors import InvalidTarget
from adapt_pruner.model.anatomy import find_anatomy
from picomodels import NUM_LAYERS, build
from toy_anatomy import (
    ToyAnatomy,
    attention,
    chains_of,
    left_without,
    mlp,
    remove,
    removed,
    widths_left,
)

# --- chains -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "multiple", "sizes"),
    [
        (4, 1, [1, 1, 1]),  # one unit stays
        (1, 1, []),
        (12, 4, [4, 4]),
        (14, 4, [2, 4, 4]),  # first down to 12, then by 4
        (5, 4, [1]),
        (4, 4, []),
        (3, 4, []),  # narrower than the multiple: stays as it is
    ],
)
def test_blocks_lead_from_multiple_to_multiple(width, multiple, sizes):
    removal, _ = chains_of((mlp(0, width), [1.0] * width), multiple=multiple)
    assert removal.chains[0].sizes.tolist() == sizes


def test_the_multiple_is_for_neurons_only():
    removal, _ = chains_of((attention(0, 4), [1, 2, 3, 4]), multiple=8)
    assert removal.chains[0].sizes.tolist() == [1, 1, 1]


def test_density_is_importance_per_parameter_of_the_units_that_leave_together():
    removal, _ = chains_of((mlp(0, 6, cost=5), [6, 1, 4, 2, 9, 7]), multiple=2)
    # In the order in which they leave: 1, 2 | 4, 6 | (7, 9 stay); 10 parameters per block.
    assert removal.chains[0].density.tolist() == [3 / 10, 10 / 10]


def test_density_never_falls_along_a_chain():
    # Differences of running sums of equal scores differ by rounding; no block may overtake another.
    removal, _ = chains_of((mlp(0, 62), [1e-12] + [0.1] * 61))
    assert all(a <= b for a, b in pairwise(removal.chains[0].density.tolist()))


def test_a_uniform_chain_takes_one_block_from_every_layer():
    removal, scores = chains_of(
        (mlp(0, 3, cost=2), [5, 1, 3]), (mlp(1, 3, cost=4), [10, 20, 0]), uniform=True
    )
    (chain,) = removal.chains
    assert chain.keys == [(0, "neurons"), (1, "neurons")]
    assert removal.cost(chain, 0) == 6
    # The least of both leave first: 1 and 0, then 3 and 10.
    assert chain.density.tolist() == pytest.approx([1 / 6, 13 / 6])
    chain.removed = 1
    masks = removal.keep_masks(scores)
    assert masks[0, "neurons"].tolist() == [True, False, True]
    assert masks[1, "neurons"].tolist() == [True, True, False]


def test_a_uniform_layout_needs_equal_layers_to_start_from():
    with pytest.raises(InvalidTarget, match=r"equal neurons .* \[2, 3\].*--layout per-layer"):
        chains_of((mlp(0, 3), [1, 2, 3]), (mlp(1, 2), [1, 2]), uniform=True)


def test_what_may_not_be_cut_has_no_chain():
    axes = [(mlp(0, 2), [1, 2]), (attention(0, 2), [1, 2]), (mlp(1, 2), [1, 2])]
    assert [chain.keys for chain in chains_of(*axes)[0].chains] == [[axis.key] for axis, _ in axes]
    removal, _ = chains_of(*axes, kinds=frozenset({"neurons"}), protected_layers=frozenset({1}))
    assert [chain.keys for chain in removal.chains] == [[(0, "neurons")]]


@pytest.mark.parametrize(("width", "left"), [(14, 14), (13, 14), (12, 12), (5, 8), (4, 4), (0, 4)])
def test_only_blocks_that_fit_whole_into_what_goes_are_removed(width, left):
    removal, _ = chains_of((mlp(0, 14), [1.0] * 14), multiple=4)
    removal.chains[0].remove_whole(width)
    assert widths_left(removal) == [left]


# --- one ranking ------------------------------------------------------------------------------


def test_the_least_importance_per_parameter_goes_first():
    # Per parameter: neurons .1 .2 .3 .4 | .05 .25 .5; KV groups .15 1.
    removal, scores = chains_of(
        (mlp(0, 4, cost=10), [4, 2, 3, 1]),
        (mlp(1, 3, cost=10), [0.5, 5, 2.5]),
        (attention(0, 2, cost=20), [20, 3]),
    )
    remove(removal, 50)  # .05 .1 .15 .2: 10 + 10 + 20 + 10
    assert removed(removal) == 50
    masks = {key: mask.tolist() for key, mask in removal.keep_masks(scores).items()}
    assert masks == {
        (0, "neurons"): [True, False, True, False],
        (1, "neurons"): [False, True, True],
        (0, "kv-groups"): [True, False],
    }


def test_groups_that_lose_nothing_have_no_mask():
    removal, scores = chains_of((mlp(0, 3), [1, 2, 3]), (mlp(1, 3), [10, 20, 30]))
    remove(removal, 2)
    assert list(removal.keep_masks(scores)) == [(0, "neurons")]


def test_what_is_removed_too_much_is_given_back_most_important_first():
    # Ranked: .1 .2 .3 (neurons, 1 each), .35 (KV group, 10). Needed 10: all four, 3 too many. So
    # the three neurons come back.
    removal, _ = chains_of((mlp(0, 4), [0.1, 0.2, 0.3, 9]), (attention(0, 2, cost=10), [3.5, 99]))
    remove(removal, 10)
    assert widths_left(removal) == [4, 1]
    # Needed 12: 1 too many, and .3 is the most important that fits.
    removal, _ = chains_of((mlp(0, 4), [0.1, 0.2, 0.3, 9]), (attention(0, 2, cost=10), [3.5, 99]))
    remove(removal, 12)
    assert widths_left(removal) == [2, 1]


def test_a_coarse_block_is_exchanged_for_finer_ones_that_meet_the_target():
    # The KV group (10) ranks lowest. Needed 4: it is 6 too many, so four neurons go in its place.
    removal, _ = chains_of(
        (mlp(0, 8), [1, 2, 3, 4, 5, 6, 7, 8]), (attention(0, 2, cost=10), [1, 99])
    )
    remove(removal, 4)
    assert widths_left(removal) == [4, 2]


def test_the_most_important_coarse_block_is_exchanged_for_the_least_important_finer_ones():
    # Needed 14: the KV groups of density .1 and .2 go, 6 too many. That of .2 comes back, and for
    # it go the neurons of 1, 2, 3 and 4.
    removal, _ = chains_of(
        (attention(0, 2, cost=10), [1, 99]),
        (attention(1, 2, cost=10), [2, 99]),
        (mlp(0, 9), [1, 4, 5, 6, 7, 8, 9, 9, 9]),
        (mlp(1, 9), [2, 3, 5, 6, 7, 8, 9, 9, 9]),
    )
    remove(removal, 14)
    assert widths_left(removal) == [1, 2, 7, 7]


def test_a_coarse_block_stays_removed_where_finer_ones_do_not_suffice():
    removal, _ = chains_of((mlp(0, 3), [1, 2, 3]), (attention(0, 2, cost=10), [1, 99]))
    remove(removal, 4)  # only two neurons could go
    assert widths_left(removal) == [3, 1]


def test_an_exchange_that_would_remove_more_is_not_made():
    # Ranked: a neuron (down to 12, a multiple of 4) and the KV group, 1 + 3. Needed 2: the neuron
    # comes back. To exchange the KV group for 1 + 4 neurons would make 1 too many into 3.
    removal, _ = chains_of(
        (attention(0, 2, cost=3), [3, 99]), (mlp(0, 13), [0] + [2] * 4 + [4] * 8), multiple=4
    )
    remove(removal, 2)
    assert widths_left(removal) == [1, 13]


@pytest.mark.parametrize("needed", [0, -1, -100])
def test_nothing_goes_when_nothing_is_needed(needed):
    removal, scores = chains_of((mlp(0, 3), [1, 2, 3]), (attention(0, 2), [1, 2]))
    remove(removal, needed)
    tighten(removal, left_without(removal, needed))
    assert removal.keep_masks(scores) == {}


def test_more_than_everything_cannot_be_removed():
    removal, _ = chains_of((mlp(0, 3), [1, 2, 3]))
    remove(removal, 2)
    assert widths_left(removal) == [1]
    removal, _ = chains_of((mlp(0, 3), [1, 2, 3]))
    with pytest.raises(InvalidTarget, match="At least 1 parameters stay"):
        remove(removal, 3)


def test_equal_scores_leave_in_the_order_of_the_units():
    removal, scores = chains_of((mlp(0, 5), [1, 1, 0, 1, 1]))
    remove(removal, 3)
    assert removal.keep_masks(scores)[0, "neurons"].tolist() == [False, False, False, True, True]


# --- targets ----------------------------------------------------------------------------------

ANATOMY = ToyAnatomy([mlp(0, 10, cost=40), attention(0, 4, cost=100)], 1000, 800)


@pytest.mark.parametrize(
    ("sparsity", "target"),
    [(0, 1000), (0.2, 840), (0.25, 800), (0.001, 999), (0.00125, 999), (0.5, 600), (0.7, 440)],
)
def test_sparsity_is_a_share_of_the_decoder_layers(sparsity, target):
    assert resolve_target(ANATOMY, sparsity, None) == target


@pytest.mark.parametrize("params", [1000, 999, 1])
def test_params_are_of_the_whole_model(params):
    assert resolve_target(ANATOMY, None, params) == params


@pytest.mark.parametrize(
    ("sparsity", "params", "message"),
    [
        (20, None, r"got 20\. Did you mean 0\.2\?"),
        (1.0, None, r"\[0, 1\); got 1\."),
        (-0.1, None, r"got -0\.1\.$"),
        (200, None, r"got 200\.$"),
        (float("nan"), None, r"got nan\.$"),
        (None, 1001, r"1,001 parameters is above the model's 1,000\. Name a smaller one"),
        (None, None, "--sparsity 0.2, or --params 350M"),
        (0.2, 500, "Give the target once"),
    ],
)
def test_malformed_targets_say_what_to_do(sparsity, params, message):
    with pytest.raises(InvalidTarget, match=message):
        resolve_target(ANATOMY, sparsity, params)


@pytest.mark.parametrize(
    ("other", "target", "steps", "sizes"),
    [
        (0, 100, 2, [200, 100]),  # 400 -> 200 -> 100
        (50, 150, 2, [250, 150]),  # what is never cut stays
        (0, 50, 3, [200, 100, 50]),
        (0, 399, 1, [399]),
    ],
)
def test_steps_leave_equal_shares_of_400_parameters(other, target, steps, sizes):
    toy = ToyAnatomy(ANATOMY.axes, 400 + other, 400)
    assert sizes_after_steps(toy, target, steps) == sizes


def test_a_target_below_what_is_possible_is_refused():
    # At least one neuron and one KV group stay: 9 * 40 + 3 * 100 = 660 can go.
    toy = ToyAnatomy(ANATOMY.axes, 1000, 800)
    check_reachable(toy, 340, Limits())
    with pytest.raises(
        InvalidTarget, match=r"339 .* has 340 parameters \(sparsity 0\.8250\), of which 200 "
    ):
        check_reachable(toy, 339, Limits())
    check_reachable(toy, 640, Limits(kinds=frozenset({"neurons"})))
    with pytest.raises(InvalidTarget, match="below what is possible"):
        check_reachable(toy, 639, Limits(kinds=frozenset({"neurons"})))
    check_reachable(toy, 680, Limits(kinds=frozenset({"neurons"}), multiple=2))
    with pytest.raises(InvalidTarget, match="allow more to be cut"):
        check_reachable(toy, 999, Limits(protected_layers=frozenset({0})))


def test_costs_of_a_real_model():
    anatomy = find_anatomy(build("llama"))
    costs = {axis.key: axis.unit_cost for axis in anatomy.of_kinds({"kv-groups", "neurons"})}
    # A neuron: gate and up rows of 64 with a bias each, a down column of 64. A KV group: 16 + 8 + 8
    # rows of 64 with a bias each, 16 columns of 64.
    assert costs == {
        key: {"neurons": 3 * 64 + 2, "kv-groups": 48 * 64 + 32}[key[1]] for key in costs
    }
    # Layers: all units, the biases of the two output projections, two norms.
    assert anatomy.layer_parameters == NUM_LAYERS * (96 * 194 + 4 * 3104 + 4 * 64)
    assert anatomy.other_parameters == 2 * 128 * 64 + 64  # embedding, head, last norm
