"""What the command line writes and prints."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from adapt_pruner import find_anatomy, perplexity
from adapt_pruner.model.loading import load_model, load_tokenizer
from command_line import DENSE, IN_LAYERS, OTHER, TINY, read, recipe_of, run, same_weights, size_of
from conftest import STORIES260K
from picomodels import build, logits_of, random_tokens


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
    quick = ("--windows", 32, "--steps", 2, "--max-documents", 200, "--tuning-steps", 4)
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


def test_demo_times_both_models_in_one_precision(cli, tokenizer, tmp_path, monkeypatch):
    from adapt_pruner.evaluation import Speed

    build("llama", torch.float16).save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    seen = []

    def timed(models):
        seen.extend(model.dtype for model in models)
        return [Speed(100, 10, 8, 8), Speed(150, 20, 8, 8, 1, 0.1, 1.5, 2.0)]

    monkeypatch.setattr("adapt_pruner.evaluation.compare_speed", timed)
    (tmp_path / "text.txt").write_text("a short story " * 50)
    monkeypatch.setattr("adapt_pruner.run.EVALUATION_WINDOWS", 3)
    done = cli(
        "demo", "--model", tmp_path / "half", "-o", tmp_path / "out", "--windows", 4,
        "--text", tmp_path / "text.txt",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert seen == [torch.float32, torch.float32]
    assert "(1.50×)" in done.out


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
