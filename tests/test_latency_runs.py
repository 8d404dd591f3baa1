"""Targets in time: runs to them, what is refused, and times measured for real."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from adapt_pruner import latency, prune
from adapt_pruner.errors import AdaptPrunerError, InvalidSettings, InvalidTarget
from adapt_pruner.goal import Goal
from adapt_pruner.latency import Latency, LatencyTable, engines, measuring, read_table, write_table
from adapt_pruner.latency.engines import LlamaCppEngine, TorchEngine
from adapt_pruner.latency.measuring import circumstances_of, measure_times, measured_speedup
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.model.edits import cut
from adapt_pruner.recovery.materials import limited_by
from adapt_pruner.report import pictures
from adapt_pruner.settings import LatencySettings
from command_line import TINY, read, recipe_of
from gguf_models import BARE, VOCABULARY, byte_tokenizer
from latency_tables import BY_HAND, CALIBRATION, anatomy_by, llama, table
from picomodels import build


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than everything else."""
    monkeypatch.setattr(pictures, "draw_all", lambda directory, result: {})


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
    def test_every_method_meets_a_speedup(self, times, values):
        result = prune(
            llama(), speedup=1.25, latency_table=times, calibration=CALIBRATION, **values
        )
        assert result.target == 4880
        assert find_anatomy(result.model, Latency(table())).amount == result.reached <= 4880

    def test_a_time_is_a_target(self, times):
        result = prune(llama(), latency=5e-6, latency_table=times, calibration=CALIBRATION)
        assert (result.target, result.reached <= 5000) == (5000, True)
        said = result.target_record()["target"]
        assert said == {"limits": "ns per token in decode", "most": 5000, "reached": result.reached}
        again = result.resource.goal(5000)
        assert (again["latency"], again["latency_table"]) == ("0.005ms", str(times))

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
            ({"sparsity": 0.2}, InvalidSettings, "latency_table: belongs to --speedup"),
            ({"bytes": 10**6}, InvalidSettings, "latency_table: belongs to --speedup"),
            ({"speedup": 1.2, "cut": ("neurons", "hidden")}, InvalidTarget, "one hidden size"),
            ({"speedup": 1.2, "method": "slicegpt"}, InvalidTarget, "take another method"),
            ({"speedup": 1.2, "multiple": "auto"}, InvalidSettings, "auto needs the odd_widths_ns"),
        ],
    )
    def test_what_cannot_be_is_refused(self, times, values, kind, message):
        with pytest.raises(kind, match=message):
            prune(llama(), latency_table=times, calibration=CALIBRATION, **values)

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

    def test_widths_become_multiples_that_the_machine_likes(self, tmp_path):
        write_table(table(odd_widths_ns=[[72, 900], [76, 500], [79, 500]]), tmp_path / "a.json")
        result = prune(llama(), speedup=1.2, latency_table=tmp_path / "a.json", multiple="auto",
                       calibration=CALIBRATION)  # fmt: skip
        assert result.settings.multiple == 16
        assert all(of["intermediate_size"] % 16 == 0 for of in result.widths_after)
        other = prune(llama(), sparsity=0.2, latency_table=tmp_path / "a.json", multiple="auto",
                      calibration=CALIBRATION)  # fmt: skip
        assert (other.settings.multiple, other.sparsity >= 0.2) == (16, True)

    def test_a_failed_measurement_costs_no_result(self, times, monkeypatch):
        def fails(*args):
            raise RuntimeError("no memory")

        goal = Goal(speedup=1.2, latency_table=times)
        result = prune(llama(), speedup=1.2, latency_table=times, calibration=CALIBRATION)
        monkeypatch.setattr(LatencyTable, "is_of", lambda table, engine: True)
        monkeypatch.setattr(latency, "measured_speedup", fails)
        goal.time_result(llama(), result, None)
        assert (result.timing, result.untimed) == (None, "no memory")


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
        monkeypatch.setattr(
            measuring, "measure_times", None
        )  # what is stored is not measured again
        assert measuring.table_for(model, engine) == made

    def test_a_model_of_unequal_layers(self):
        model = build("llama", torch.float32)
        cut(model, {(0, "neurons"): torch.arange(96) < 40, (1, "attention"): torch.tensor([False])})
        engine = TorchEngine(LatencySettings(context=16), torch.float32, "cpu")
        made = measure_times(find_anatomy(model), engine)
        self.check(made, find_anatomy(model))
        found = measured_speedup(build("llama", torch.float32), model, Latency(made), engine, 1)
        assert min(found.speedup, found.promised_speedup, found.ms) > 0

    def test_in_llama_cpp(self):
        pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
        model = build("llama", torch.float32, vocab_size=VOCABULARY, **BARE)
        how = LatencySettings(context=16, engine="llama.cpp", batch_size=2)
        engine = LlamaCppEngine(how, "Q8_0", byte_tokenizer())
        made = measure_times(find_anatomy(model), engine)
        self.check(made, find_anatomy(model))
        assert (made.dtype, made.width_block, made.engine) == ("Q8_0", 32, "llama.cpp")

    @pytest.mark.usefixtures("no_pictures")
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


@pytest.mark.usefixtures("no_pictures")
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
        assert "The result was not timed: the table is of another machine." in done.out
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
        assert recipe_of(tmp_path / "out")["latency"] == "1ms"
        done = cli("prune", "--recipe", tmp_path / "a.yaml", "--sparsity", 0.2, "--dry-run")
        assert (done.status, done.err) == (0, "")

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
            (("--speedup", "1.2", "--multiple", "autp"), "expected a number or auto; got 'autp'"),
            (("--sparsity", "0.2", "--stage", "decode"), "belongs to --speedup"),
        ],
    )
    def test_refusals(self, cli, of_demo, tmp_path, options, message):
        done = cli("prune", "demo", "-o", tmp_path / "no", "--latency-table", of_demo, *options)
        assert done.status != 0
        assert message in done.err
        assert not (tmp_path / "no").exists()

    def test_bench_writes_a_table(self, cli, llama, tmp_path, monkeypatch):
        monkeypatch.setattr(measuring, "measure_times", lambda *args: table())
        file = tmp_path / "table.json"
        done = cli("bench", llama, "--latency-table", file, "--context", 32)
        assert (done.status, done.err) == (0, "")
        assert "a phone" in done.out
        assert read_table(file) == table()
        for options, message in (
            (("--stage", "decode"), "--stage is about a table of times"),
            (("--latency-table", file, "--quantize", "Q8_0"), "add --engine llama.cpp"),
            (("--latency-table", file, "--context", 60), "context: the model reads at most 64"),
            (("--latency-table", file, "--new-tokens", 8), "--new-tokens is not about a table"),
        ):
            done = cli("bench", llama, *options)
            assert message in done.err


def test_a_run_of_training_takes_its_times_from_a_file(request_, times):
    values = {**vars(request_), "sparsity": None, "speedup": 1.2, "latency_table": None}
    with pytest.raises(AdaptPrunerError, match="a training, or several processes"):
        limited_by(type(request_)(**values))
    resource = limited_by(type(request_)(**{**values, "latency_table": str(times)}))
    assert resource.name == "ns per token in decode"
