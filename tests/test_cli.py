"""The command line, end to end."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from adapt_pruner import __version__
from adapt_pruner.cli import console
from adapt_pruner.data.calibration import read_documents
from adapt_pruner.methods.adapt_pruner import PRESETS, AdaptPrunerSettings
from command_line import DENSE, IN_LAYERS, TINY, read, recipe_of, run, same_weights, size_of
from picomodels import INTERMEDIATE_SIZE


@pytest.mark.parametrize(("said", "then"), [(None, "true"), ("false", "false")])
def test_tokenising_takes_all_threads_unless_told_otherwise(said, then, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", said or "")
    if said is None:
        monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    with warnings.catch_warnings():
        console.hush_libraries()
    assert os.environ["TOKENIZERS_PARALLELISM"] == then


class TestProgram:
    def test_module_and_script_are_one_program(self):
        module = run("--version")
        script = subprocess.run(
            [Path(sys.executable).with_name("adapt-pruner"), "--version"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert module.stdout == script.stdout == f"adapt-pruner, version {__version__}\n"

    def test_importing_the_program_imports_no_library(self):
        code = "import sys; from adapt_pruner.cli import main; main(['--version']); "
        code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[1] == "False False"

    def test_help_of_prune_describes_every_setting_with_its_default(self, cli):
        done = cli("prune", "--help")
        assert (done.status, done.err) == (0, "")
        text = " ".join(done.out.split())
        for name, field in AdaptPrunerSettings.model_fields.items():
            assert f"--{name.replace('_', '-')}" in text
            assert field.description
            assert field.description.split()[0] in text
        for default in ("(256)]", "(automatic)]", "(refit)]", "(0.02)]"):
            assert f"[default: {default}" in text

    def test_no_arguments_show_the_help(self, cli):
        done = cli()
        assert done.status == 2
        assert done.err.startswith("Usage: adapt-pruner")
        assert "adapt-pruner: error" not in done.err


class TestSize:
    @pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.55])
    def test_sparsity_is_of_the_decoder_layers(self, prune, sparsity):
        directory = prune(target=("--sparsity", sparsity))
        target = DENSE - math.ceil(sparsity * IN_LAYERS)
        neuron = 3 * 64 + 2  # gate and up rows with biases, down column
        assert target - neuron < size_of(directory) <= target

    @pytest.mark.parametrize(
        ("said", "target"),
        [("80K", 80_000), ("0.08M", 80_000), ("80_001", 80_001), ("9e4", 90_000)],
    )
    def test_params_is_of_the_whole_model(self, prune, said, target):
        directory = prune(target=("--params", said))
        assert target - 194 < size_of(directory) <= target
        assert read(directory / "run.json")["target_parameters"] == target

    def test_nothing_to_remove(self, prune, llama):
        assert same_weights(prune(target=("--sparsity", 0)), llama)

    def test_multiple(self, prune):
        config = read(prune("--multiple", 32) / "config.json")
        layers = config["per_layer_config"].values()
        widths = [layer.get("intermediate_size", config["intermediate_size"]) for layer in layers]
        assert all(width % 32 == 0 for width in widths)
        assert min(widths) < INTERMEDIATE_SIZE

    def test_protected_layers_stay_whole(self, prune, llama):
        flags = ("--protect-layers", "0,-1", "--compensation", "none", "--tuning-steps", 0)
        directory = prune(*flags, target=("--sparsity", 0.2))
        before, after = (load_file(d / "model.safetensors") for d in (llama, directory))
        for name, tensor in after.items():
            whole = "layers.1." not in name or "norm" in name or "o_proj.bias" in name
            whole = whole or "down_proj.bias" in name
            assert torch.equal(tensor, before[name]) == whole, name

    def test_mlp_alone(self, prune):
        layers = read(prune("--cut", "neurons") / "config.json")["per_layer_config"].values()
        assert {name for layer in layers for name in layer} == {"intermediate_size"}

    def test_uniform_layout(self, prune):
        directory = prune("--layout", "uniform", "--cut", "neurons")
        config = read(directory / "config.json")
        assert "per_layer_config" not in config
        assert config["intermediate_size"] < INTERMEDIATE_SIZE
        assert size_of(directory) <= DENSE - 0.3 * IN_LAYERS


class TestCalibration:
    """Text in whatever form it comes."""

    @pytest.fixture(autouse=True)
    def no_waiting(self, monkeypatch):
        """datasets sleeps five seconds after reading parquet, because of a bug in Arrow."""
        monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)

    def rows(self, documents, column: str) -> list[dict]:
        return [{"id": i, column: text} for i, text in enumerate(documents)]

    def write_jsonl(self, documents, file: Path, column="text") -> Path:
        lines = map(json.dumps, self.rows(documents, column))
        file.write_text("\n".join(lines), encoding="utf-8")
        return file

    def write_parquet(self, documents, file: Path, column="text") -> Path:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(self.rows(documents, column)), file)
        return file

    @pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
    @pytest.mark.parametrize("column", ["text", "body"])
    def test_tables(self, prune, documents, tmp_path, kind, column):
        write = self.write_parquet if kind == "parquet" else self.write_jsonl
        file = write(documents, tmp_path / f"data.{kind}", column)
        more = () if column == "text" else ("--text-column", column)
        recipe = recipe_of(prune("--calibration", file, *more))
        assert recipe["calibration"] == str(file)
        assert recipe["text_column"] == column

    def test_directory_of_several_forms(self, cli, llama, documents, tmp_path):
        data = tmp_path / "data"
        (data / "deeper").mkdir(parents=True)
        self.write_jsonl(documents[:10], data / "a.jsonl")
        self.write_parquet(documents[10:20], data / "deeper" / "b.parquet")
        (data / "c.txt").write_text("\n<|endoftext|>\n".join(documents[20:]), encoding="utf-8")
        (data / "empty.jsonl").touch()
        (data / "notes.md").write_text("not text for calibration")
        assert sorted(read_documents(str(data))) == sorted(documents)
        done = cli(
            "prune", llama, "-o", tmp_path / "out", "--sparsity", 0.3, *TINY, "--calibration", data
        )
        assert done.status == 0, done.err

    def test_text_that_is_read_matters(self, prune, tmp_path, text_file):
        other = tmp_path / "other.txt"
        other.write_text(text_file.read_text(encoding="utf-8").upper(), encoding="utf-8")
        assert not same_weights(prune(), prune("--calibration", other, output="other"))

    def test_number_of_documents_is_limited(self, prune, text_file, tmp_path):
        same = tmp_path / "same.txt"
        same.write_text(next(read_documents(str(text_file))), encoding="utf-8")
        one = prune("--max-documents", 1, output="one")
        assert same_weights(one, prune("--calibration", same, output="same"))


class TestRecipe:
    def test_recipe_of_a_run_repeats_it(self, prune, cli, tmp_path):
        first = prune("--seed", 5, "--importance", "taylor", "--protect-layers", "0")
        second = tmp_path / "again"
        done = cli("prune", "--recipe", first / "recipe.yaml", "-o", second)
        assert done.status == 0, done.err
        assert same_weights(first, second)
        assert recipe_of(first) == recipe_of(second)
        for file in ("config.json", "pruning.json"):
            assert read(first / file) == read(second / file)

    def test_flags_override_it(self, prune, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("params: 90K\nseed: 4\nsteps: 3\nimportance: taylor\n")
        plain = recipe_of(prune("--recipe", recipe, target=(), output="plain"))
        assert (plain["params"], plain["seed"], plain["importance"]) == (90_000, 4, "taylor")
        assert plain["steps"] == 2  # from the flags that the fixture gives
        flags = ("--recipe", recipe, "--seed", 6)
        other = recipe_of(prune(*flags, target=("--sparsity", 0.25), output="other"))
        assert (other["sparsity"], other["seed"], other["importance"]) == (0.25, 6, "taylor")
        assert "params" not in other

    def test_model_preset_and_portability_may_stand_in_it(self, cli, llama, text_file, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model: {llama}\nsparsity: 0.3\npreset: paper\nportable: true\nsteps: 5\n"
            f"cut: [neurons]\nwindows: 4\nwindow_length: 12\ncalibration: {text_file}\n"
        )
        done = cli("prune", "--recipe", recipe, "-o", tmp_path / "out")
        assert done.status == 0, done.err
        written = recipe_of(tmp_path / "out")
        assert (written["allocation"], written["steps"]) == ("adaptive", 5)
        assert (tmp_path / "out" / "modeling_pruned.py").is_file()

    def test_preset(self, prune):
        recipe = recipe_of(prune("--preset", "paper"))
        for name, value in PRESETS["paper"].items():
            if f"--{name.replace('_', '-')}" not in TINY:
                assert recipe[name] == value, name

    def test_preset_as_a_flag_wins_over_the_recipe(self, prune, tmp_path):
        recipe = prune(output="first") / "recipe.yaml"  # which names every setting
        paper = recipe_of(prune("--recipe", recipe, "--preset", "paper", output="paper"))
        assert paper["allocation"] == "adaptive"
        recipe = tmp_path / "paper" / "recipe.yaml"
        best = recipe_of(prune("--recipe", recipe, "--preset", "best", output="best"))
        assert best == recipe_of(tmp_path / "first")
