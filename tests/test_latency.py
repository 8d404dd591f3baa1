"""What a table of times says, the exact choice by it, and tables that are broken."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_pruner.allocate.chains import Limits, Removal, build_chains
from adapt_pruner.allocate.ranking import remove_ranked
from adapt_pruner.cli.parameters import Duration
from adapt_pruner.errors import InvalidSettings, LoadingError
from adapt_pruner.latency import choose_multiple, read_table
from adapt_pruner.latency.cost import monotone
from adapt_pruner.latency.multiples import odd_widths
from adapt_pruner.model.edits import cut
from latency_tables import BY_HAND, DENSE, anatomy_by, llama, table
from picomodels import build


def scored(anatomy, values, default=100.0):
    return {
        axis.key: torch.full((axis.num_units,), float(values.get(axis.key, default)))
        for axis in anatomy.axes
    }


class TestCost:
    def test_the_dense_model_takes_what_was_measured(self):
        anatomy = anatomy_by()
        assert (anatomy.amount, anatomy.cost.outside) == (DENSE, 1000)

    @pytest.mark.parametrize(
        ("sizes", "saved"),
        [
            ({(0, "neurons"): 64}, 600),
            ({(0, "neurons"): 80}, 300),  # half-way
            ({(0, "neurons"): 1}, 600),  # no less than the smallest width that was measured
            ({(1, "kv-groups"): 3}, 150),
            ({(1, "kv-groups"): 1, (1, "query-heads"): 1}, 500),
            ({(1, "query-heads"): 1}, 350),
            ({(2, "mlp"): 0}, 1000),
            ({(2, "attention"): 0}, 600),
            ({(2, "attention"): 0, (2, "mlp"): 0}, 1700),  # the layer goes
            ({(2, "layers"): 0}, 1700),
            ({(2, "layers"): 0, (2, "neurons"): 64}, 1700),
        ],
    )
    def test_by_hand(self, sizes, saved):
        assert DENSE - anatomy_by().cost.total(sizes) == saved

    def test_sizes_to_try_are_counted_at_once(self):
        anatomy = anatomy_by()
        tried = {**anatomy.sizes, (0, "neurons"): torch.tensor([96, 80, 64, 63, 1])}
        found = anatomy.cost.touching([(0, "neurons")], tried)
        assert found.tolist() == [1700, 1400, 1100, 1100, 1100]

    def test_a_smaller_width_never_costs_more(self):
        noisy = table(mlp_ns=[[16, 500], [32, 300], [64, 800], [80, 700], [96, 1000]])
        total = anatomy_by(noisy).cost.total
        times = [total({(0, "neurons"): width}) for width in range(1, 97)]
        assert times == sorted(times)

    def test_widths_that_are_filled_up_cost_as_much_as_whole_blocks(self):
        blocks = table(mlp_ns=[[32, 400], [64, 700], [96, 1000]], width_block=32)
        total = anatomy_by(blocks).cost.total
        assert total({(0, "neurons"): 65}) == total({}) == DENSE
        assert total({(0, "neurons"): 64}) == total({(0, "neurons"): 33}) == DENSE - 300

    def test_a_model_that_was_cut_before_takes_less_by_the_same_table(self):
        model = llama()
        keep = torch.arange(96) < 64
        cut(model, {(0, "neurons"): keep, (1, "layers"): torch.tensor([False])})
        assert anatomy_by(model=model).amount == DENSE - 600 - 1700


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_monotone_values_ascend_and_keep_their_mean(values):
    found = monotone(values)
    assert all(a <= b * (1 + 1e-12) + 1e-9 for a, b in pairwise(found))
    assert sum(found) == pytest.approx(sum(values), abs=1e-6)


class TestChoice:
    def choose(self, values, target, of=None, **limits):
        anatomy = anatomy_by(of)
        removal = Removal(anatomy, build_chains(anatomy, scored(anatomy, values), Limits(**limits)))
        remove_ranked(removal, target)
        return {k: v for k, v in removal.sizes.items() if v != anatomy.sizes[k]}, removal.amount

    def test_by_importance_per_time(self):
        # The first layer's neurons are worth nothing, and 600 ns; then 12 ns are left of a group.
        cheap = {(0, "neurons"): 1e-6, (1, "kv-groups"): 1.0}
        assert self.choose(cheap, DENSE - 600) == ({(0, "neurons"): 64}, DENSE - 600)
        found = self.choose(cheap, DENSE - 700)
        assert found == ({(0, "neurons"): 66, (1, "kv-groups"): 3}, DENSE - 150 - 562)

    def test_widths_that_save_no_time_stay(self):
        # Neurons of no importance: below 64 they save nothing, so KV groups have to go.
        free = {(layer, "neurons"): 0.0 for layer in range(3)}
        changed, amount = self.choose(free, DENSE - 2_100)
        widths = {key: size for key, size in changed.items() if key[1] == "neurons"}
        assert widths == {(layer, "neurons"): 64 for layer in range(3)}
        assert amount <= DENSE - 2_100

    @given(
        st.lists(st.integers(0, 900), min_size=3, max_size=3),
        st.lists(st.integers(0, 900), min_size=2, max_size=2),
        st.floats(0, 1),
        st.integers(0, 2**31),
        st.booleans(),
    )
    @settings(max_examples=25, deadline=None)
    def test_the_target_is_met_by_the_table(self, mlp, heads, share, seed, with_layers):
        made = table(
            mlp_ns=[[0, 0], *([w, ns] for w, ns in zip((24, 48, 72), mlp, strict=True)), [96, 900]],
            attention_ns=[[0, 0, 0], *([g, 2, ns] for g, ns in zip((1, 2), heads, strict=True)),
                          [4, 2, 900]],
        )  # fmt: skip
        anatomy = anatomy_by(made)
        generator = torch.Generator().manual_seed(seed)
        scores = {axis.key: torch.rand(axis.num_units, generator=generator)
                  for axis in anatomy.axes}  # fmt: skip
        kinds = {"neurons", "kv-groups", *(["layers"] if with_layers else [])}
        removal = Removal(anatomy, build_chains(anatomy, scores, Limits(frozenset(kinds))))
        for chain in removal.chains:
            chain.removed = len(chain.sizes)
        smallest = removal.amount
        for chain in removal.chains:
            chain.removed = 0
        target = round(smallest + share * (anatomy.amount - smallest))
        remove_ranked(removal, target)
        assert removal.amount <= target
        assert removal.amount == anatomy.cost.total(removal.sizes)


class TestFile:
    def test_is_read_as_it_was_written(self, times):
        assert read_table(times) == table()
        assert times.read_text().startswith('{\n "format": 1,\n "machine"')

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"mlp_ns": [[96, 1], [32, 2]]}, "ascending widths"),
            ({"mlp_ns": [[0, 0]]}, "ascending widths"),
            ({"mlp_ns": [[96, -1]]}, "mlp_ns.0.1: Input should be greater"),
            ({"mlp_ns": [[0, 5], [96, 10]]}, "takes 0 ns for it"),
            ({"attention_ns": [[1, 1, 5], [4, 2, 9]]}, "every number of KV groups"),
            ({"attention_ns": [[0, 0, 0]]}, "every number of KV groups"),
            ({"outside_ns": "x"}, "outside_ns"),
            ({"stage": "both"}, "stage"),
            ({"format": 2}, "format"),
            ({"widths": []}, "widths: Extra"),
        ],
    )
    def test_a_broken_one_is_named(self, tmp_path, change, message):
        (tmp_path / "a.json").write_text(json.dumps({**BY_HAND, **change}))
        with pytest.raises(LoadingError, match=message) as found:
            read_table(tmp_path / "a.json")
        assert "bench MODEL --latency-table" in str(found.value)

    @pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"format": 1}'])
    def test_what_is_no_table(self, tmp_path, text):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(LoadingError, match=r"a\.json"):
            read_table(tmp_path / "a.json")

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (build("qwen2", torch.float32), "model_type llama, and this one has qwen2"),
            (build("llama", torch.float32, hidden_size=32), "hidden_size 64, and this one has 32"),
            (build("llama", torch.float32, intermediate_size=97), "intermediate_size 96"),
            (build("llama", torch.float32, num_hidden_layers=4), "layers 3, and this one has 4"),
            (build("llama", torch.float32, num_key_value_heads=2), "heads per KV group 2"),
        ],
    )
    def test_one_of_another_model_is_refused(self, model, message):
        with pytest.raises(InvalidSettings, match=message):
            anatomy_by(model=model).amount  # noqa: B018


class TestMultiple:
    def test_odd_widths_are_multiples_of_one_more_power_of_two(self):
        assert odd_widths(1536) == [1279, 1278, 1276, 1272, 1264, 1248, 1216, 1152]
        assert odd_widths(96) == [79, 78, 76, 72]
        assert odd_widths(3) == [1]

    @pytest.mark.parametrize(
        ("odd", "block", "multiple"),
        [
            ([[60, 401], [62, 399], [63, 420]], 1, 1),
            ([[60, 401], [62, 399], [63, 421]], 1, 2),
            ([[60, 401], [62, 500], [63, 401]], 1, 4),  # as every odd number of those is slow
            ([[56, 500], [60, 500], [63, 401]], 1, 16),
            ([[60, 401], [62, 399], [63, 401]], 32, 32),
        ],
    )
    def test_is_the_smallest_that_costs_no_more_than_it_must(self, odd, block, multiple):
        assert choose_multiple(table(odd_widths_ns=odd, width_block=block)) == multiple


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("12ms", 0.012), ("0.5 s", 0.5), ("800us", 8e-4), ("800µs", 8e-4), ("900000ns", 9e-4)],
)
def test_times_as_people_write_them(text, seconds):
    assert Duration().convert(text, None, None) == pytest.approx(seconds)
