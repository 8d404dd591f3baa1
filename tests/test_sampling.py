"""Windows come in exact proportions, none twice, in an order that only the seed changes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_pruner.data.domains import Account, PackedDomain
from adapt_pruner.data.mixture import read_mixture
from adapt_pruner.data.packing import PackedData, windows_needed
from adapt_pruner.data.sampling import WindowSampler, updated_weights
from adapt_pruner.errors import DataError

LENGTH = 4
WEIGHTS = st.lists(st.floats(0.01, 1), min_size=1, max_size=8).map(lambda w: np.array(w) / sum(w))


def packed(windows: list[int], weights=None, repeat: bool = False, marked: bool = False):
    """Domains whose window i is filled with 1000 · domain + i; with loss on every second token."""
    weights = np.ones(len(windows)) / len(windows) if weights is None else weights
    domains = []
    for i, (count, weight) in enumerate(zip(windows, weights, strict=True)):
        tokens = np.repeat(1000 * i + np.arange(count)[:, None], LENGTH, axis=1).astype(np.uint16)
        answers = np.arange(tokens.size).reshape(tokens.shape) % 2 == 1 if marked else None
        domains.append(PackedDomain(f"d{i}", float(weight), tokens, answers, Account()))
    return PackedData(domains, LENGTH, repeat, read_mixture("pydocs"), "f" * 16)


def drawn_in(batches: list[int], data: PackedData, seed: int = 0) -> list[int]:
    """First tokens of all windows, drawn in batches of these sizes."""
    sampler = WindowSampler(data, seed)
    return [token for n in batches for token in sampler.next(n).input_ids[:, 0].tolist()]


@given(WEIGHTS, st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_proportions_are_exact_at_every_moment(weights, total):
    data = packed([windows_needed(total, w, len(weights)) for w in weights], weights)
    domains = WindowSampler(data).next_indices(total)[:, 0]
    counts = np.cumsum(np.eye(len(weights))[domains], axis=0)
    due = np.arange(1, total + 1)[:, None] * weights
    bound = 1 - 1 / (2 * len(weights) - 2) if len(weights) > 1 else 0
    assert np.abs(counts - due).max() <= bound + 1e-6


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_no_window_comes_again_before_all_others_of_its_domain(windows, seed, data):
    total = data.draw(st.integers(1, 3 * sum(windows)))
    indices = WindowSampler(packed(windows, repeat=True), seed).next_indices(total)
    for domain, count in enumerate(windows):
        order = indices[indices[:, 0] == domain, 1]
        for start in range(0, len(order), count):
            one_round = order[start : start + count].tolist()
            assert len(set(one_round)) == len(one_round)
            assert set(one_round) <= set(range(count))


def test_rounds_and_seeds_have_different_orders():
    data = packed([50], repeat=True)
    tokens = drawn_in([100], data)
    assert sorted(tokens[:50]) == sorted(tokens[50:]) == list(range(50))
    assert tokens[:50] != tokens[50:]
    assert tokens != drawn_in([100], data, seed=1)
    assert tokens[:50] != sorted(tokens[:50])


@given(WEIGHTS, st.lists(st.integers(0, 9), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_batch_sizes_do_not_matter(weights, batches):
    data = packed([20] * len(weights), weights, repeat=True)
    assert drawn_in(batches, data) == drawn_in([sum(batches)], data)


@given(WEIGHTS, st.integers(0, 60), st.integers(0, 60), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_resumed_is_uninterrupted(weights, before, after, seed):
    data = packed([17] * len(weights), weights, repeat=True)
    changed = {f"d{i}": float(w) for i, w in enumerate(weights[::-1])}
    first = WindowSampler(data, seed)
    first.next(before)
    first.weights = changed
    first.next(before)
    state = json.loads(json.dumps(first.state_dict()))
    second = WindowSampler(data)
    second.load_state_dict(state)
    assert second.state_dict() == first.state_dict()
    assert second.position == first.position == 2 * before * LENGTH
    assert (second.next_indices(after) == first.next_indices(after)).all()


def test_changed_weights_hold_from_then_on():
    data = packed([500, 500], [0.5, 0.5])
    sampler = WindowSampler(data)
    sampler.next(101)
    before = sampler.drawn
    sampler.weights = {"d0": 9, "d1": 1}
    assert sampler.weights == {"d0": 0.9, "d1": 0.1}
    sampler.next(200)
    assert abs(sampler.drawn["d0"] - before["d0"] - 180) <= 1
    sampler.weights = {"d0": 0, "d1": 1}
    first = sampler.drawn["d0"]
    sampler.next(50)
    assert sampler.drawn["d0"] == first


@pytest.mark.parametrize(
    "weights",
    [{"d0": 1}, {"d0": 1, "d1": -1}, {"d0": 0, "d1": 0}, {"d0": math.nan, "d1": 1}, {"a": 1}],
)
def test_weights_that_are_none(weights):
    sampler = WindowSampler(packed([5, 5]))
    with pytest.raises(DataError, match=r"[Ww]eights"):
        sampler.weights = weights
    assert sampler.weights == {"d0": 0.5, "d1": 0.5}


def test_exhausted_domain_is_refused_and_nothing_is_drawn():
    sampler = WindowSampler(packed([3, 10]))
    sampler.next(4)
    before = sampler.state_dict()
    with pytest.raises(DataError, match=r"'d0' has given all of its 12 prepared tokens.*--repeat"):
        sampler.next(4)
    assert sampler.state_dict() == before
    assert len(sampler.next(2).input_ids) == 2


def test_exhausted_domain_begins_again_where_weights_change():
    data = packed([3, 10])
    mixture = data.mixture.model_copy(update={"policy": "dynamic"})
    sampler = WindowSampler(replace(data, mixture=mixture))
    sampler.next(10)
    assert sampler.drawn == {"d0": 5, "d1": 5}


def test_state_of_other_data_is_refused():
    state = {**WindowSampler(packed([5])).state_dict(), "fingerprint": "0" * 16}
    with pytest.raises(DataError, match="not those of the run to resume"):
        WindowSampler(packed([5])).load_state_dict(state)


def test_batch_and_the_shares_of_ranks():
    data = packed([8, 8], marked=True)
    batch = WindowSampler(data).next(6)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.domains.dtype == torch.int64
    assert batch.input_ids.shape == batch.labels.shape == (6, LENGTH)
    assert (batch.input_ids // 1000 == batch.domains[:, None]).all()
    assert (batch.labels[:, ::2] == -100).all()
    assert (batch.labels[:, 1::2] == batch.input_ids[:, 1::2]).all()
    ranks = [WindowSampler(data) for _ in range(2)]
    shares = [sampler.gather(sampler.next_indices(6)[i::2]) for i, sampler in enumerate(ranks)]
    for i, share in enumerate(shares):
        assert torch.equal(share.input_ids, batch.input_ids[i::2])
        assert torch.equal(share.labels, batch.labels[i::2])
        assert torch.equal(share.domains, batch.domains[i::2])


class TestDynamicWeights:
    def test_worked_by_hand(self):
        """Excess losses ln 3 and 0 triple the first weight: 0.5·3 against 0.5·1, so 3/4 and 1/4."""
        weights = {"a": 0.5, "b": 0.5}
        losses = {"a": 2 + math.log(3), "b": 1.0}
        new = updated_weights(weights, losses, {"a": 2.0, "b": 1.5}, floor=0)
        assert new == pytest.approx({"a": 0.75, "b": 0.25})

    def test_smoothing(self):
        """(1 - 0.1)·(1, 0) + 0.1/2."""
        reference = {"a": 1.0, "b": 1.0}
        new = updated_weights({"a": 1.0, "b": 0.0}, reference, reference, floor=0.1)
        assert new == pytest.approx({"a": 0.95, "b": 0.05})

    def test_losses_at_or_below_the_reference_change_nothing(self):
        weights = {"a": 0.7, "b": 0.2, "c": 0.1}
        losses = {"a": 1.0, "b": 0.5, "c": 2.0}
        new = updated_weights(weights, losses, {"a": 1.0, "b": 3.0, "c": 2.0})
        assert new == pytest.approx(weights, abs=1e-4)

    def test_great_losses_do_not_overflow(self):
        losses = {"a": 5000.0, "b": 4000.0}
        new = updated_weights({"a": 0.5, "b": 0.5}, losses, {"a": 1.0, "b": 1.0})
        assert new == pytest.approx({"a": 1 - 5e-5, "b": 5e-5})

    @pytest.mark.parametrize("losses", [{"a": 1.0}, {"a": 1.0, "b": math.nan}])
    def test_missing_loss(self, losses):
        known = {"a": 0.5, "b": 0.5}
        with pytest.raises(DataError, match="Domain 'b' needs a finite loss"):
            updated_weights(known, losses, {"a": 1.0, "b": 1.0})
        with pytest.raises(DataError, match="Domain 'b' needs a finite reference loss"):
            updated_weights(known, {"a": 1.0, "b": 1.0}, losses)
