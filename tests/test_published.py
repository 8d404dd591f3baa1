"""`paper` is Adapt-Pruner as published: hand-worked values, and the rule written independently."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapt_pruner import prune
from adapt_pruner.allocate.chains import Limits, Removal, build_chains
from adapt_pruner.allocate.schedules import AdaptiveSchedule
from adapt_pruner.errors import InvalidSettings
from adapt_pruner.methods.adapt_pruner import with_official_heads
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.score.distance import normalise
from picomodels import build

LLAMA = find_anatomy(build("llama"))  # 4 KV heads of size 8 with 2 query heads each, 96 neurons


def left_after(sparsity, multiple=1):
    """KV groups and neurons that a first step to `sparsity` leaves every layer."""
    scores = {axis.key: torch.arange(float(axis.num_units)) for axis in LLAMA.axes}
    limits = Limits(multiple=multiple)
    removal = Removal(LLAMA, build_chains(LLAMA, scores, limits))
    schedule = AdaptiveSchedule(LLAMA, steps=1, amplitude=0.0)
    schedule._apply(removal, [sparsity] * 3)
    sizes = removal.sizes
    assert len({sizes[i, "kv-groups"] for i in range(3)}) == 1
    return sizes[0, "kv-groups"], sizes[0, "neurons"]


@pytest.mark.parametrize(
    ("sparsity", "groups", "neurons"),
    [
        (0.02, 4, 94),  # 31 of 32 rows stay: no whole head of 8 goes
        (0.2, 4, 76),  # 25 rows
        (0.24, 3, 72),  # 24 rows (of 24.32), three heads
        (0.46, 3, 51),  # 17 rows
        (0.5, 2, 48),
        (0.76, 1, 23),
        (0.96, 1, 3),
    ],
)
def test_a_head_goes_when_a_whole_one_fits(sparsity, groups, neurons):
    assert left_after(sparsity) == (groups, neurons)


@given(st.floats(0, 0.99))
def test_the_rule_written_independently(sparsity):
    kept = int(32 * (1 - sparsity) + 1e-9)
    expected = next(heads for heads in range(1, 5) if heads * 8 >= kept)
    assert left_after(sparsity)[0] == expected


@pytest.mark.parametrize(("sparsity", "left"), [(0.1, 96), (0.32, 96), (0.34, 64), (0.67, 32)])
def test_a_block_goes_when_a_whole_one_fits(sparsity, left):
    assert left_after(sparsity, multiple=32)[1] == left


def test_importance_is_normalised_over_the_layers_that_may_be_cut():
    assert normalise([5.0, 1.0, 2.0, 3.0], without={0}) == [0.0, -1.0, 0.0, 1.0]
    assert normalise([1.0, 2.0, 3.0]) == [-1.0, 0.0, 1.0]
    assert normalise([9.0, 4.0], without={0, 1}) == [0.0, 0.0]


@pytest.mark.parametrize("model_type", ["llama", "phi3", "olmo2"])
def test_official_scores_fold_heads_as_the_published_code(model_type):
    """view(n_rep, n_kv).sum(0): KV group k gets query heads k and k + 4 of 8."""
    anatomy = find_anatomy(build(model_type))
    groups, heads = (anatomy.of_kinds({kind})[0] for kind in ("kv-groups", "query-heads"))
    official = with_official_heads(groups)
    for slot in heads.slots:
        values = torch.randn(slot.tensor.shape, generator=torch.Generator().manual_seed(0))
        per_head = slot.per_unit(values)
        (own,) = [s for s in groups.slots if s.tensor is slot.tensor]
        (folded,) = [s for s in official.slots if s.tensor is slot.tensor]
        rest = own.per_unit(values) - per_head.view(4, 2).sum(1)  # keys and values where fused
        expected = per_head.view(2, 4).sum(0) + rest
        torch.testing.assert_close(folded.per_unit(values), expected, rtol=1e-4, atol=1e-4)


def test_official_scores_are_sums_over_weights(calibration):
    with pytest.raises(InvalidSettings, match="sums over weights, such as taylor"):
        prune(build("llama"), sparsity=0.2, calibration=calibration, kv_scores="official")
    result = prune(
        build("llama"), sparsity=0.4, calibration=calibration, preset="paper", kv_scores="official"
    )
    assert result.after.total <= result.target
