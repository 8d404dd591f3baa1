"""Targets in time: what a table of times says, the exact choice by it, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_pruner import CalibrationData, prune
from adapt_pruner.allocate.chains import Limits, Removal, build_chains
from adapt_pruner.allocate.ranking import remove_ranked
from adapt_pruner.cli.parameters import Duration
from adapt_pruner.errors import AdaptPrunerError, InvalidSettings, InvalidTarget, LoadingError
from adapt_pruner.goal import Goal
from adapt_pruner.latency import (
    Latency,
    LatencyTable,
    choose_multiple,
    engines,
    measuring,
    read_table,
    write_table,
)
from adapt_pruner.latency.cost import monotone
from adapt_pruner.latency.engines import LlamaCppEngine, TorchEngine
from adapt_pruner.latency.measuring import circumstances_of, measure, measured_speedup
from adapt_pruner.methods import make_settings
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.model.edits import cut
from adapt_pruner.settings import LatencySettings
from command_line import TINY, read, recipe_of
from gguf_models import BARE, VOCABULARY, byte_tokenizer
from picomodels import build, random_tokens

CALIBRATION = CalibrationData(random_tokens(20, 30), window_length=12, num_windows=4)
BY_HAND = {
    "machine": "a phone",
    "engine": "torch",
    "dtype": "float32",
    "stage": "decode",
    "context": 32,
    "shapes": {
        "model_type": "llama", "hidden_size": 64, "head_dim": 8, "vocabulary": 128, "layers": 3,
    },
    "outside_ns": 1000,
    "layer_ns": 100,
    "mlp_ns": [[0, 0], [32, 400], [64, 400], [96, 1000]],
    "attention_ns": [[0, 0, 0], [1, 1, 100], [1, 2, 150], [4, 1, 250], [4, 2, 600]],
}  # fmt: skip
DENSE = 1000 + 3 * (100 + 1000 + 600)


def table(**values) -> LatencyTable:
    return LatencyTable.model_validate({**BY_HAND, **values})


def llama():
    return build("llama", torch.float32)


def anatomy_by(of=None, model=None):
    return find_anatomy(model or llama(), Latency(of or table()))


@pytest.fixture
def file(tmp_path):
    write_table(table(), tmp_path / "table.json")
    return tmp_path / "table.json"


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


class TestPrune:
    @pytest.mark.parametrize(
        "values",
        [
            {},
            {"steps": 3, "importance": "activation-fisher"},
            {"method": "magnitude"},
            {"layout": "uniform"},
            {"method": "depth"},
            {"method": "flap", "compensation": "none"},
            {"method": "llm-pruner", "protect_first": 0, "protect_last": 0},
            {"cut": ("neurons", "kv-groups", "query-heads", "layers", "sublayers")},
        ],
    )
    def test_every_method_meets_a_speedup(self, file, values):
        result = prune(llama(), speedup=1.25, latency_table=file, calibration=CALIBRATION, **values)
        assert result.target == 4880
        assert find_anatomy(result.model, Latency(table())).amount == result.reached <= 4880

    def test_a_time_is_a_target(self, file):
        result = prune(llama(), latency=5e-6, latency_table=file, calibration=CALIBRATION)
        assert (result.target, result.reached <= 5000) == (5000, True)
        said = result.target_record()["target"]
        assert said == {"limits": "ns per token in decode", "most": 5000, "reached": result.reached}
        assert result.resource.goal(5000)["latency"] == "0.005000ms"

    @pytest.mark.parametrize(
        ("values", "kind", "message"),
        [
            ({"speedup": 10}, InvalidTarget, r"610 .* \(10.00 times .*2,950 .*\(2.07 times as f"),
            ({"speedup": 0.5}, InvalidTarget, "such as 1.5; got 0.5"),
            ({"speedup": float("nan")}, InvalidTarget, "got nan"),
            ({"latency": 0.0}, InvalidTarget, "such as 12ms; got 0 s"),
            ({"latency": 1.0}, InvalidTarget, "above the model's 6,100"),
            ({"speedup": 1.2, "params": 10**5}, InvalidTarget, "Give the target once"),
            (
                {"speedup": 1.2, "stage": "prefill"},
                InvalidSettings,
                "stage: the table .* of decode",
            ),
            ({"speedup": 1.2, "context": 64}, InvalidSettings, "context: .* is of 32; got 64"),
            ({"speedup": 1.2, "engine": "torhc"}, InvalidSettings, "engine"),
            ({"sparsity": 0.2}, InvalidSettings, "latency_table: says of what time"),
            ({"speedup": 1.2, "cut": ("neurons", "hidden")}, InvalidTarget, "one hidden size"),
            ({"speedup": 1.2, "method": "slicegpt"}, InvalidTarget, "slicegpt cannot be aimed"),
            ({"speedup": 1.2, "multiple": "auto"}, InvalidSettings, "auto needs the odd_widths_ns"),
        ],
    )
    def test_what_cannot_be_is_refused(self, file, values, kind, message):
        with pytest.raises(kind, match=message):
            prune(llama(), latency_table=file, calibration=CALIBRATION, **values)

    def test_sublayers_need_their_times(self, tmp_path):
        made = table(mlp_ns=[[32, 400], [96, 1000]])
        write_table(made, tmp_path / "table.json")
        with pytest.raises(InvalidTarget, match="Leave sublayers out"):
            prune(llama(), speedup=1.2, latency_table=tmp_path / "table.json", cut=("sublayers",),
                  calibration=CALIBRATION)  # fmt: skip

    def test_layers_of_other_kinds_are_refused(self):
        with pytest.raises(InvalidTarget, match="not made of attention and MLP alone"):
            anatomy_by(model=build("lfm2", torch.float32)).amount  # noqa: B018

    def test_several_processes_need_a_file(self):
        with pytest.raises(InvalidSettings, match="must have one table"):
            Goal(speedup=1.5).resource(model=llama())


class TestFile:
    def test_is_read_as_it_was_written(self, file):
        assert read_table(file) == table()
        assert file.read_text().startswith('{\n "format": 1,\n "machine"')

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

    def test_is_what_is_pruned_to(self, tmp_path):
        write_table(table(odd_widths_ns=[[72, 900], [76, 500], [79, 500]]), tmp_path / "a.json")
        result = prune(llama(), speedup=1.2, latency_table=tmp_path / "a.json", multiple="auto",
                       calibration=CALIBRATION)  # fmt: skip
        assert result.settings.multiple == 16
        assert all(of["intermediate_size"] % 16 == 0 for of in result.widths_after)


class TestMeasuring:
    """That it runs, and makes sense; times are those of a busy machine."""

    @pytest.fixture(autouse=True)
    def _short(self, monkeypatch):
        monkeypatch.setattr(measuring, "FEWEST_ROUNDS", 1)
        monkeypatch.setattr(measuring, "MOST_ROUNDS", 1)
        monkeypatch.setattr(engines, "SHORTEST", 0.0)
        monkeypatch.setattr(measuring, "_measured", {})

    def check(self, made, anatomy):
        assert made.mlp_ns[-1][0] == 96
        assert made.attention_ns[-1][:2] == (4, 2)
        assert made.shapes.layers == 3
        cost = Latency(made).of(anatomy)
        assert cost.total({}) > cost.outside >= 0

    @pytest.mark.parametrize("stage", ["decode", "prefill"])
    def test_in_torch(self, stage, tmp_path, monkeypatch):
        monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path))
        model = build("llama", torch.float32)
        engine = TorchEngine(LatencySettings(stage=stage, context=16), torch.float32, "cpu")
        made = measuring.table_for(model, engine)
        self.check(made, find_anatomy(model))
        assert made.has_absence
        (stored,) = (tmp_path / "latency").glob("*.json")
        assert read_table(stored) == made
        measuring._measured.clear()
        monkeypatch.setattr(measuring, "measure", None)  # what is stored is not measured again
        assert measuring.table_for(model, engine) == made

    def test_a_model_of_unequal_layers(self):
        model = build("llama", torch.float32)
        cut(model, {(0, "neurons"): torch.arange(96) < 40, (1, "attention"): torch.tensor([False])})
        engine = TorchEngine(LatencySettings(context=16), torch.float32, "cpu")
        made = measure(find_anatomy(model), engine)
        self.check(made, find_anatomy(model))
        found = measured_speedup(build("llama", torch.float32), model, Latency(made), engine, 1)
        assert min(found.speedup, found.promised_speedup, found.ms) > 0

    def test_in_llama_cpp(self):
        pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
        model = build("llama", torch.float32, vocab_size=VOCABULARY, **BARE)
        how = LatencySettings(context=16, engine="llama.cpp", batch_size=2)
        engine = LlamaCppEngine(how, "Q8_0", byte_tokenizer())
        made = measure(find_anatomy(model), engine)
        self.check(made, find_anatomy(model))
        assert (made.dtype, made.width_block, made.engine) == ("Q8_0", 32, "llama.cpp")

    def test_the_result_is_measured_where_the_table_is_from(self, llama, text_file, cli, tmp_path):
        engine = TorchEngine(LatencySettings(context=16), torch.float32, "cpu")
        write_table(table(**circumstances_of(engine)), tmp_path / "here.json")
        done = cli(
            "prune", llama, "-o", tmp_path / "out", "--speedup", 1.2, "--latency-table",
            tmp_path / "here.json", *TINY, "--calibration", text_file,
        )  # fmt: skip
        assert (done.status, done.err) == (0, "")
        assert "times as fast, measured" in done.out
        timing = read(tmp_path / "out" / "run.json")["target"]["timing"]
        assert timing["speedup"] > 0
        assert 1.2 <= timing["promised_speedup"] < 1.25
        assert "promised 1.2" in (tmp_path / "out" / "README.md").read_text("utf-8")


OF_DEMO = {
    **BY_HAND,
    "shapes": {"model_type": "llama", "hidden_size": 96, "head_dim": 16, "vocabulary": 1024,
               "layers": 8},
    "mlp_ns": [[32, 40_000], [128, 50_000], [256, 90_000]],
    "attention_ns": [[1, 2, 20_000], [3, 2, 60_000]],
}  # fmt: skip


class TestCommand:
    @pytest.fixture
    def of_demo(self, tmp_path):
        (tmp_path / "phone.json").write_text(json.dumps(OF_DEMO))
        return tmp_path / "phone.json"

    def test_end_to_end_on_the_embedded_model(self, cli, of_demo, tmp_path):
        first = tmp_path / "first"
        done = cli("prune", "demo", "-o", first, "--speedup", "1.3", "--latency-table", of_demo,
                   "--method", "magnitude", "--windows", 4)  # fmt: skip
        assert (done.status, done.err) == (0, "")
        dense = 1000 + 8 * (100 + 90_000 + 60_000)
        target = int(dense / 1.3)
        assert f"target {target:,} ns per token in decode" in done.out
        assert "measured" not in done.out  # the table is of a phone
        said = read(first / "run.json")["target"]
        assert said["most"] == target
        assert said["reached"] <= target
        recipe = recipe_of(first)
        assert (recipe["speedup"], recipe["latency_table"]) == (1.3, str(of_demo))
        done = cli("prune", "--recipe", first / "recipe.yaml", "-o", tmp_path / "again")
        assert (done.status, done.err) == (0, "")
        files = (p / "model.safetensors" for p in (first, tmp_path / "again"))
        assert len({file.read_bytes() for file in files}) == 1

    def test_times_in_recipes(self, cli, of_demo, tmp_path):
        recipe = {"model": "demo", "latency": "1ms", "latency_table": str(of_demo),
                  "stage": "decode", "method": "magnitude", "windows": 4}  # fmt: skip
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(recipe))
        done = cli("prune", "--recipe", tmp_path / "a.yaml", "-o", tmp_path / "out")
        assert (done.status, done.err) == (0, "")
        assert "target 1,000,000 ns per token in decode (1.20 times as fast)" in done.out
        assert recipe_of(tmp_path / "out")["latency"] == "1.000000ms"

    def test_the_plan_counts_in_time(self, cli, of_demo):
        done = cli("prune", "demo", "--speedup", "1.2,1.4", "--latency-table", of_demo, "--dry-run")
        assert (done.status, done.err) == (0, "")
        assert "of 1,201,800 ns per token in decode → at most 1,001,500" in done.out
        assert "858,428" in done.out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--speedup", "9"), "possible: with everything cut that may be, the model has "),
            (("--speedup", "fast"), "'fast' is not a valid float"),
            (("--latency", "12"), "expected a time with its unit, such as 12ms"),
            (("--speedup", "1.2", "--engine", "llamacpp"), "Did you mean 'llama.cpp'"),
            (("--speedup", "1.2", "--multiple", "autp"), "'autp' is not a valid integer"),
            (("--sparsity", "0.2", "--stage", "decode"), "says of what time"),
        ],
    )
    def test_refusals(self, cli, of_demo, tmp_path, options, message):
        done = cli("prune", "demo", "-o", tmp_path / "no", "--latency-table", of_demo, *options)
        assert done.status != 0
        assert message in done.err
        assert not (tmp_path / "no").exists()

    def test_bench_writes_a_table(self, cli, llama, tmp_path, monkeypatch):
        monkeypatch.setattr(measuring, "measure", lambda *args: table())
        file = tmp_path / "table.json"
        done = cli("bench", llama, "--latency-table", file, "--context", 32)
        assert (done.status, done.err) == (0, "")
        assert "a phone" in done.out
        assert read_table(file) == table()
        for options, message in (
            (("--stage", "decode"), "--stage is about a table of times"),
            (("--latency-table", file, "--quantize", "Q8_0"), "add --engine llama.cpp"),
            (("--latency-table", file, "--context", 60), "context: the model reads at most 64"),
        ):
            done = cli("bench", llama, *options)
            assert message in done.err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("12ms", 0.012), ("0.5 s", 0.5), ("800us", 8e-4), ("800µs", 8e-4), ("900000ns", 9e-4)],
)
def test_times_as_people_write_them(text, seconds):
    assert Duration().convert(text, None, None) == pytest.approx(seconds)


def test_a_run_of_training_takes_its_times_from_a_file(request_, file, tmp_path):
    from adapt_pruner.recovery.materials import limited_by

    values = {**vars(request_), "sparsity": None, "speedup": 1.2, "latency_table": None}
    with pytest.raises(AdaptPrunerError, match="a training, or several processes"):
        limited_by(type(request_)(**values))
    resource = limited_by(type(request_)(**{**values, "latency_table": str(file)}))
    assert resource.name == "ns per token in decode"
    assert make_settings(multiple=8).multiple == 8
