"""Checkpoints in the hands of others: older libraries, remote code, fine-tunes that save again."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from adapt_pruner import prune
from adapt_pruner.model import portable
from adapt_pruner.model.edits import AddBias, Cut
from adapt_pruner.model.layers import LayerConfig, layer_config
from adapt_pruner.model.older_readers import add_old_keys, old_rope_keys, tidy_tokenizer
from adapt_pruner.report import pictures
from checkpoints import Reading
from conftest import character_tokenizer
from picomodels import build, logits_of
from picomodels import random_tokens as tokens
from reload_checkpoints import outputs

OLD_PYTHON = os.environ.get("ADAPT_PRUNER_OLD_PYTHON")
"""A Python with transformers 4.57; without it, what that version reads is tested by its keys."""
AUTO = {
    "AutoModel": AutoModel,
    "AutoModelForCausalLM": AutoModelForCausalLM,
    "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
    "AutoModelForTokenClassification": AutoModelForTokenClassification,
}


def read(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


def write(file: Path, content) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def _no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw_all", lambda directory, result: {})
        yield


@pytest.fixture(scope="module")
def home(calibration, tmp_path_factory) -> Path:
    """Checkpoints of a Llama with a RoPE that is not the default: portable, plain, uniform."""
    home = tmp_path_factory.mktemp("readers")
    rope = {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    for name, more in (("plain", {}), ("portable", {}), ("uniform", {"layout": "uniform"})):
        model = build("llama", torch.float32, rope_parameters=rope)
        result = prune(
            model, character_tokenizer(), calibration=calibration, sparsity=0.3, steps=2,
            tuning_steps=1, allocation="adaptive", amplitude=0.05, **more,
        )  # fmt: skip
        result.save(home / name, portable=name == "portable")
    return home


@pytest.fixture(scope="module")
def expected(home) -> dict[str, torch.Tensor]:
    return {
        name: logits_of(AutoModelForCausalLM.from_pretrained(home / name), tokens())
        for name in ("plain", "portable", "uniform")
    }


@pytest.fixture(scope="module")
def altered(tmp_path_factory):
    """A Llama without an attention and an MLP, with a bias that its configuration does not offer.
    Returns its directory, portable, and the model."""
    model = build("llama", torch.float32, mlp_bias=False)
    none, some = torch.zeros(1, dtype=torch.bool), torch.arange(96) < 40
    Cut({(0, "attention"): none, (1, "mlp"): none, (2, "neurons"): some}).apply(model)
    AddBias({2: ("mlp.down_proj",)}).apply(model)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.bias.fill_(0.3)
    directory = tmp_path_factory.mktemp("altered") / "altered"
    model.save_pretrained(directory)
    portable.add_modeling_file(directory, model)
    add_old_keys(directory)
    return directory, model


class TestOldKeys:
    @pytest.mark.parametrize("name", ["plain", "uniform", "portable"])
    def test_rope_and_dtype(self, home, name):
        config = read(home / name / "config.json")
        assert config["rope_theta"] == 500.0
        assert config["rope_scaling"] == {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }  # fmt: skip
        assert config["torch_dtype"] == config["dtype"] == "float32"

    def test_transformers_5_reads_the_same_with_them(self, home):
        written = read(home / "uniform" / "config.json")
        config = AutoConfig.from_pretrained(home / "uniform")
        assert config.rope_parameters == written["rope_parameters"]

    @pytest.mark.parametrize(
        ("config", "keys"),
        [
            ({}, {}),
            (
                {"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 0.5}},
                {"rope_theta": 7.0, "rope_scaling": None, "partial_rotary_factor": 0.5},
            ),
            (
                {"rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5.0}}},
                {"rope_theta": 7.0, "rope_local_base_freq": 5.0,
                 "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            ),
            (
                {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 7.0}},
                {"rope_theta": 7.0, "rope_scaling": None, "rotary_emb_base": 7.0,
                 "rotary_pct": 0.25},
            ),
        ],
    )  # fmt: skip
    def test_kinds_of_rope(self, config, keys):
        assert old_rope_keys(config) == keys

    def test_layers_as_transformers_4_stores_them(self):
        class Config:
            per_layer_config = {"00": {"intermediate_size": 3}}  # noqa: RUF012
            intermediate_size = 8

        assert layer_config(Config, 0).intermediate_size == 3
        assert isinstance(layer_config(Config, 0), LayerConfig)
        assert layer_config(Config, 1).intermediate_size == 8

    @pytest.mark.skipif(OLD_PYTHON is None, reason="ADAPT_PRUNER_OLD_PYTHON names no Python")
    @pytest.mark.parametrize(("name", "trust"), [("uniform", "plain"), ("portable", "trust")])
    def test_transformers_4_computes_the_same(self, home, name, trust, monkeypatch):
        monkeypatch.setattr(sys, "executable", OLD_PYTHON)
        wanted = outputs(AutoModelForCausalLM.from_pretrained(home / name).eval())
        Reading(expected={name: wanted}).run(home, "without", trust).check(name)

    @pytest.mark.skipif(OLD_PYTHON is None, reason="ADAPT_PRUNER_OLD_PYTHON names no Python")
    def test_transformers_4_skips_as_well(self, altered, monkeypatch):
        monkeypatch.setattr(sys, "executable", OLD_PYTHON)
        directory, model = altered
        reading = Reading(expected={"altered": outputs(model)})
        reading.run(directory.parent, "without", "trust").check("altered")


class TestTokenizer:
    def test_class_that_transformers_4_knows(self, home):
        config = read(home / "plain" / "tokenizer_config.json")
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert AutoTokenizer.from_pretrained(home / "plain")("the").input_ids == (
            character_tokenizer()("the").input_ids
        )

    @pytest.mark.parametrize(
        ("source", "kept"), [("GPT2TokenizerFast", "GPT2TokenizerFast"),
                             ("TokenizersBackend", "PreTrainedTokenizerFast")],
    )  # fmt: skip
    def test_class_of_the_source(self, tmp_path, source, kept):
        (tmp_path / "source").mkdir()
        write(tmp_path / "source" / "tokenizer_config.json", {"tokenizer_class": source})
        write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "TokenizersBackend"})
        tidy_tokenizer(tmp_path, str(tmp_path / "source"))
        assert read(tmp_path / "tokenizer_config.json")["tokenizer_class"] == kept

    def test_extra_tokens(self, tmp_path):
        tokenizer = character_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
        tokenizer.save_pretrained(tmp_path)
        tidy_tokenizer(tmp_path, None)
        assert "extra_special_tokens" not in read(tmp_path / "tokenizer_config.json")
        again = AutoTokenizer.from_pretrained(tmp_path)
        assert "<extra>" in again.all_special_tokens
        assert len(again("<extra>").input_ids) == 1

    def test_foreign_code_is_not_named(self, tmp_path):
        file = tmp_path / "tokenizer_config.json"
        for named in (
            {"AutoTokenizer": ["someone/else--tok.Slow", None]},
            {"AutoTokenizer": "a.B"},
        ):
            write(file, {"tokenizer_class": "Slow", "auto_map": named})
            tidy_tokenizer(tmp_path, None)
            assert read(file) == {"tokenizer_class": "Slow"}

    def test_code_that_came_along_is_named(self, tmp_path):
        file = tmp_path / "tokenizer_config.json"
        (tmp_path / "tok.py").write_text("")
        write(file, {"tokenizer_class": "Slow", "auto_map": {"AutoTokenizer": ["tok.Slow", None]}})
        tidy_tokenizer(tmp_path, None)
        assert "auto_map" in read(file)

    def test_no_tokenizer(self, tmp_path):
        tidy_tokenizer(tmp_path, None)
        assert list(tmp_path.iterdir()) == []


class TestPortable:
    def test_heads_under_the_base_names(self, home):
        directory = home / "portable"
        config = read(directory / "config.json")
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["auto_map"] == {
            "AutoModel": "modeling_pruned.LlamaModel",
            "AutoModelForCausalLM": "modeling_pruned.LlamaForCausalLM",
            "AutoModelForSequenceClassification": "modeling_pruned.LlamaForSequenceClassification",
            "AutoModelForTokenClassification": "modeling_pruned.LlamaForTokenClassification",
        }
        for auto, named in config["auto_map"].items():
            model = AUTO[auto].from_config(
                AutoConfig.from_pretrained(directory), trust_remote_code=True
            )
            assert type(model).__name__ == named.split(".")[1]
            assert type(model).__module__.endswith(".modeling_pruned")

    @pytest.mark.parametrize("trust", [True, False])
    def test_saved_again(self, home, expected, tmp_path, trust):
        model = AutoModelForCausalLM.from_pretrained(home / "portable", trust_remote_code=trust)
        model.save_pretrained(tmp_path / "again")
        before = read(home / "portable" / "config.json")
        after = read(tmp_path / "again" / "config.json")
        assert after["auto_map"] == before["auto_map"]
        assert after["architectures"] == before["architectures"]
        assert (tmp_path / "again" / portable.FILE).read_text() == (
            (home / "portable" / portable.FILE).read_text()
        )
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
        assert torch.equal(logits_of(again, tokens()), expected["portable"])

    def test_classifier_saved_again(self, home, tmp_path):
        model = AutoModelForSequenceClassification.from_pretrained(
            home / "portable", trust_remote_code=True, num_labels=3
        )
        model.save_pretrained(tmp_path)
        assert read(tmp_path / "config.json")["architectures"] == ["LlamaForSequenceClassification"]
        assert (tmp_path / portable.FILE).is_file()

    def test_what_layers_lack_or_have_more(self, tmp_path, altered):
        """Skipped sublayers and added biases, where this package cannot be imported."""
        Reading(expected={"altered": outputs(altered[1])}).run(
            altered[0].parent, "without", "trust"
        ).check("altered")

    def test_plain_checkpoint_gets_no_file(self, home, tmp_path):
        AutoModelForCausalLM.from_pretrained(home / "plain").save_pretrained(tmp_path)
        assert "auto_map" not in read(tmp_path / "config.json")
        assert not list(tmp_path.glob("*.py"))

    def test_file_imports_public_modules_alone(self, home):
        tree = ast.parse((home / "portable" / portable.FILE).read_text())
        named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                 for alias in node.names}  # fmt: skip
        froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert named == {"functools", "torch", "transformers.models.llama.modeling_llama"}
        assert froms == {"__future__", "torch", "transformers.cache_utils", "types", "typing"}


class TestVllmPlugin:
    def test_entry_point_is_declared(self):
        """As vLLM looks it up, where the package is installed from this tree."""
        declared = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
        assert '[project.entry-points."vllm.general_plugins"]' in declared
        for point in entry_points(group="vllm.general_plugins", name="adapt_pruner"):
            assert point.value == "adapt_pruner.model.layers:register"

    def test_entry_point_does_it_alone(self, home):
        """What vLLM does in each of its processes: load the function, call it, build the model."""
        code = (
            "from importlib import import_module\n"
            "import_module('adapt_pruner.model.layers').register()\n"
            "import sys, transformers\n"
            "model = transformers.AutoModel.from_pretrained(sys.argv[1])\n"
            "print(len({layer.mlp.up_proj.out_features for layer in model.layers}))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, home / "plain"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) > 1
