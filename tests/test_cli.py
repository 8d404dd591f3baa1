"""The command line, end to end."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from adapt_pruner import __version__, find_anatomy, perplexity
from adapt_pruner.cli import console
from adapt_pruner.data.calibration import read_documents
from adapt_pruner.methods.adapt_pruner import PRESETS, AdaptPrunerSettings
from adapt_pruner.model.loading import load_model, load_tokenizer
from conftest import STORIES260K
from picomodels import INTERMEDIATE_SIZE, build, logits_of, random_tokens

TINY = ("--windows", 8, "--window-length", 12, "--steps", 2)
"""Settings with which a picomodel is pruned in no time."""
DENSE, IN_LAYERS, OTHER = 110_336, 93_888, 16_448
"""Parameters of the tiny Llama: 3 layers, hidden 64, 8 query / 4 KV heads, 96 neurons, biases."""


def run(*args: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "adapt_pruner", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )


def read(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


def recipe_of(directory: Path) -> dict:
    return yaml.safe_load((directory / "recipe.yaml").read_text(encoding="utf-8"))


def size_of(directory: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(directory / "model.safetensors").values())


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(("said", "then"), [(None, "true"), ("false", "false")])
def test_tokenising_takes_all_threads_unless_told_otherwise(said, then, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", said or "")
    if said is None:
        monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    with warnings.catch_warnings():
        console.hush_libraries()
    assert os.environ["TOKENIZERS_PARALLELISM"] == then


@pytest.fixture
def prune(cli, llama, text_file, tmp_path):
    """Prune the tiny Llama into `tmp_path / "out"`; returns that directory."""

    def command(*more: object, target=("--sparsity", 0.3), output: str = "out") -> Path:
        done = cli(
            "prune", llama, "-o", tmp_path / output, *target, *TINY, "--calibration", text_file,
            *more,
        )  # fmt: skip
        assert (done.status, done.err) == (0, ""), done.err
        return tmp_path / output

    return command


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
        flags = ("--protect-layers", "0,-1", "--compensation", "none")
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


class TestOutput:
    def test_result_is_shown(self, cli, llama, text_file, tmp_path):
        name = tmp_path / ("a [bold]long[/] name, " * 5)
        done = cli("prune", llama, "-o", name, "--sparsity", 0.3, *TINY, "--calibration", text_file)
        assert (done.status, done.err) == (0, "")
        lines = done.out.splitlines()
        assert lines[-1] == f"written to {name}"
        assert f"{DENSE:,}" in done.out
        assert f"{size_of(name):,}" in done.out
        target = DENSE - math.ceil(0.3 * IN_LAYERS)
        assert (
            f"target {target:,} parameters, met with {target - size_of(name):,} to spare"
            in (lines[-2])
        )

    def test_quiet(self, cli, llama, text_file, tmp_path):
        done = cli(
            "prune", llama, "-o", tmp_path / "out", "--sparsity", 0.3, *TINY, "-q",
            "--calibration", text_file, "--evaluate", text_file,
        )  # fmt: skip
        assert (done.status, done.out, done.err) == (0, "", "")
        assert (tmp_path / "out" / "config.json").is_file()

    @pytest.mark.parametrize("flags", [(), ("--quiet",)])
    def test_terminal_gets_a_progress_bar(
        self, cli, llama, text_file, tmp_path, monkeypatch, flags
    ):
        terminal = Console(stderr=True, force_terminal=True, force_interactive=True)
        monkeypatch.setattr("adapt_pruner.cli.console.err", terminal)
        done = cli(
            "prune", llama, "-o", tmp_path / "out", "--sparsity", 0.3, *TINY,
            "--calibration", text_file, *flags,
        )  # fmt: skip
        assert done.status == 0
        assert ("→ 82.17K parameters" in done.err) == (not flags)
        assert (done.err == "") == bool(flags)

    def test_overwrite(self, prune, cli, llama, text_file, tmp_path):
        first = prune("--portable")
        before = size_of(first)
        prune("--overwrite", target=("--sparsity", 0.5))
        assert size_of(first) < before
        assert not list(first.glob("*.py"))
        assert [file.name for file in tmp_path.iterdir()] == ["out"]

    def test_portable(self, prune):
        directory = prune("--portable")
        code = (directory / "modeling_pruned.py").read_text()
        assert "class LlamaForCausalLM(_modeling.LlamaForCausalLM)" in code
        named = read(directory / "config.json")["auto_map"]["AutoModelForCausalLM"]
        assert named == "modeling_pruned.LlamaForCausalLM"
        assert recipe_of(directory)["portable"] is True

    def test_debug_shows_the_traceback_wherever_it_stands(self, cli, tmp_path):
        with pytest.raises(OSError, match="no model directory"):
            cli("prune", "./nowhere", "-o", tmp_path / "out", "--sparsity", 0.2, "--debug")


class TestEvaluate:
    @pytest.mark.parametrize("documents_in", ["text", "table"])
    def test_before_and_after(self, prune, llama, documents, tmp_path, documents_in):
        if documents_in == "text":
            file, more = tmp_path / "valid.txt", ()
            file.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
        else:
            file, more = tmp_path / "valid.jsonl", ("--text-column", "page")
            file.write_text("\n".join(json.dumps({"page": text}) for text in documents))
        directory = prune("--evaluate", file, *more)
        measured = read(directory / "run.json")["measurements"]["perplexity"]
        for path, when in ((llama, "before"), (directory, "after")):
            expected = perplexity(load_model(str(path)), load_tokenizer(str(path)), documents)
            assert measured[when] == pytest.approx(expected.perplexity, rel=1e-5)
        assert f"{measured['after']:.2f}" in (directory / "README.md").read_text()
        assert recipe_of(directory)["evaluate"] == str(file)

    def test_one_long_document(self, prune, tmp_path, monkeypatch):
        monkeypatch.setattr("adapt_pruner.run.EVALUATION_WINDOWS", 3)
        file = tmp_path / "long.txt"
        file.write_text("a long story " * 100)
        measured = read(prune("--evaluate", file) / "run.json")["measurements"]
        assert measured["perplexity"]["before"] > 1


class TestDryRun:
    @pytest.fixture
    def no_weights(self, llama, tmp_path) -> Path:
        shutil.copytree(llama, tmp_path / "bare")
        for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "bare" / file).unlink()
        return tmp_path / "bare"

    def test_sizes_without_weights(self, cli, no_weights, tmp_path):
        done = cli("prune", no_weights, "--sparsity", 0.3, "--steps", 3, "--dry-run")
        assert (done.status, done.err) == (0, "")
        target = DENSE - math.ceil(0.3 * IN_LAYERS)
        first = done.out.splitlines()[0]
        assert first == (
            f"{DENSE:,} parameters ({IN_LAYERS:,} in the decoder layers) → at most {target:,} "
            "(sparsity 0.3000)"
        )
        rows = [line.split() for line in done.out.splitlines()]
        for step in (1, 2):  # each leaves the same share of the decoder layers
            share = ((target - OTHER) / IN_LAYERS) ** (step / 3)
            size = OTHER + round(IN_LAYERS * share)
            assert [str(step), f"{size:,}"] in rows
        assert ["3", f"{target:,}"] in rows
        for word in ("Gram matrices", "activations", "peak", "time (estimate"):
            assert word in done.out
        assert [file.name for file in tmp_path.iterdir()] == ["bare"]

    def test_sizes_are_those_of_the_run(self, cli, prune, no_weights):
        said = cli("prune", no_weights, "--sparsity", 0.3, "--steps", 2, "--dry-run").out
        steps = read(prune() / "run.json")["steps"]
        planned = [int(line.split()[1].replace(",", "")) for line in said.splitlines()[2:4]]
        for plan, step in zip(planned, steps, strict=True):
            assert plan - 194 < step["parameters"] <= plan

    def test_paper_takes_its_share_of_the_steps(self, cli, no_weights):
        done = cli("prune", no_weights, "--sparsity", 0.29, "--preset", "paper", "--dry-run")
        rows = [line.split() for line in done.out.splitlines()]
        assert ["15", f"{DENSE - math.ceil(0.29 * IN_LAYERS):,}"] in rows
        assert not any(row[:1] == ["16"] for row in rows)
        assert "weight gradients" in done.out

    def test_target_is_checked(self, cli, no_weights):
        done = cli("prune", no_weights, "--params", "1K", "--dry-run")
        assert done.status == 1
        assert "below what is possible" in done.err


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory) -> Path:
    """The embedded model, pruned on the documentation of Python, in a process of its own."""
    output = tmp_path_factory.mktemp("demo") / "out"
    quick = ("--windows", 32, "--steps", 2, "--max-documents", 200)
    done = run("prune", "demo", "-o", output, "--sparsity", 0.3, *quick)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.endswith(f"written to {output}\n")
    return output


class TestEmbeddedModel:
    def test_size_is_exact(self, demo_run):
        record = read(demo_run / "run.json")
        layers = record["before"]["decoder_layers"]
        target = record["before"]["total"] - math.ceil(0.3 * layers)
        assert record["target_parameters"] == target
        assert target - 3 * 96 < size_of(demo_run) <= target

    def test_its_calibration_text_needs_no_hub(self, demo_run):
        assert recipe_of(demo_run)["calibration"] == "pydocs"
        assert recipe_of(demo_run)["model"] == "demo"

    def test_it_still_writes_text(self, demo_run):
        model, tokenizer = load_model(str(demo_run)), load_tokenizer(str(demo_run))
        tokens = tokenizer("The for statement is used to", return_tensors="pt")
        text = tokenizer.decode(
            model.generate(**tokens, max_new_tokens=12)[0], skip_special_tokens=True
        )
        assert text.startswith("The for statement is used to")
        assert len(set(text.split())) > 7

    def test_a_process_of_its_own_repeats_it(self, demo_run, tmp_path):
        output = tmp_path / "again"
        done = run("prune", "--recipe", demo_run / "recipe.yaml", "-o", output, "--quiet")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert same_weights(demo_run, output)

    @pytest.mark.slow
    def test_demo(self, tmp_path):
        done = run("demo", "-o", tmp_path / "demo")
        assert done.returncode == 0, done.stderr
        for part in ("1. Prune", "perplexity", "2. Reload", "tokens/s", "3. Generate", "pruned"):
            assert part in done.stdout
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "demo")
        assert find_anatomy(loaded).total_parameters == size_of(tmp_path / "demo")


class TestMobileLLM:
    """Checkpoints of MobileLLM come with remote code, which is not needed."""

    @pytest.fixture
    def mobilellm(self, tokenizer, tmp_path) -> Path:
        directory = tmp_path / "mobilellm"
        model = build("llama", torch.float32, tie_word_embeddings=True)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        config = read(directory / "config.json")
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias", "dtype"):
            config.pop(name)
        config |= {
            "model_type": "mobilellm",
            "architectures": ["MobileLLMForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_mobilellm.MobileLLMConfig",
                "AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM",
            },
            "share_embedding": True,
            "layer_sharing": False,
            "torch_dtype": "float32",
            "attention_bias": True,
            "mlp_bias": True,
        }
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    def test_is_a_llama_with_tied_embeddings(self, mobilellm):
        model = load_model(str(mobilellm))
        assert type(model) is LlamaForCausalLM
        assert model.lm_head.weight is model.model.embed_tokens.weight
        expected = logits_of(
            build("llama", torch.float32, tie_word_embeddings=True), random_tokens()
        )
        assert torch.equal(logits_of(model, random_tokens()), expected)

    def test_is_pruned_and_written_as_a_llama(self, mobilellm, cli, text_file, tmp_path):
        output = tmp_path / "out"
        done = cli(
            "prune", mobilellm, "-o", output, "--sparsity", 0.3, *TINY, "--calibration", text_file
        )
        assert (done.status, done.err) == (0, ""), done.err
        config = read(output / "config.json")
        assert config["model_type"] == "llama"
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["tie_word_embeddings"] is True
        assert not {"auto_map", "share_embedding", "layer_sharing"} & set(config)
        assert "lm_head.weight" not in load_file(output / "model.safetensors")
        loaded = AutoModelForCausalLM.from_pretrained(output)
        assert find_anatomy(loaded).total_parameters == read(output / "run.json")["after"]["total"]

    def test_shared_layers_are_refused(self, mobilellm, cli, tmp_path):
        config = read(mobilellm / "config.json") | {"layer_sharing": True}
        (mobilellm / "config.json").write_text(json.dumps(config))
        done = cli("prune", mobilellm, "-o", tmp_path / "out", "--sparsity", 0.3)
        assert done.status == 1
        assert "layer_sharing=True" in done.err


class TestRealModel:
    """A pretrained model on real text, where they are at hand."""

    @pytest.fixture
    def text(self, stories260k) -> Path:
        return STORIES260K.parent / "text" / "tinystories.valid.txt"

    def test_loses_little(self, stories260k, text, cli, tmp_path, monkeypatch):
        monkeypatch.setattr("adapt_pruner.run.EVALUATION_WINDOWS", 100)
        output = tmp_path / "out"
        done = cli(
            "prune", stories260k, "-o", output, "--sparsity", 0.2, "--calibration",
            text.with_name("tinystories.train.txt"), "--windows", 128, "--steps", 5,
            "--evaluate", text,
        )  # fmt: skip
        assert (done.status, done.err) == (0, ""), done.err
        record = read(output / "run.json")
        assert record["before"]["total"] == 260_032
        target = 260_032 - math.ceil(0.2 * record["before"]["decoder_layers"])
        assert target - 192 < record["after"]["total"] <= target
        measured = record["measurements"]["perplexity"]
        assert 3.5 < measured["before"] < 4.6
        assert measured["before"] < measured["after"] < 7.5


def test_environment_is_offline():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
