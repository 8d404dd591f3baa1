"""Models, weights and tokenizers that cannot be pruned are refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapt_pruner import (
    load_model,
)
from conftest import character_tokenizer
from picomodels import build

CYRILLIC = "".join(chr(0x430 + i) for i in range(40))
"""Characters that get tokens which the tiny Llama does not have."""


def variant(
    workplace: Path,
    tensors: Callable[[dict[str, torch.Tensor]], Any] | None = None,
    without: tuple[str, ...] = (),
    **config: object,
) -> str:
    """A copy of the tiny Llama, changed. Returns its name."""
    directory = workplace / "changed"
    shutil.copytree(workplace / "llama", directory)
    for file in without:
        (directory / file).unlink()
    if config:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if tensors is not None:
        weights = load_file(directory / "model.safetensors")
        tensors(weights)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return "changed"


def of_type(workplace: Path, model_type: str, **config: object) -> str:
    """A directory with nothing but a configuration of this type. Returns its name."""
    (workplace / model_type).mkdir()
    (workplace / model_type / "config.json").write_text(
        json.dumps({"model_type": model_type, **config})
    )
    return model_type


class TestModel:
    @pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere-at-all", "text.txt"])
    def test_missing_directory(self, refuse, name):
        refuse(model=name, says="There is no model directory '")

    @pytest.mark.parametrize("name", ["nowhere", "some-lab/some-model"])
    def test_name_on_the_hub_while_offline(self, refuse, name):
        says = (f"'{name}' cannot be read", "no such directory", "the hub cannot be reached")
        refuse(model=name, says=says)

    @pytest.mark.parametrize(
        ("model_type", "why"),
        [
            ("t5", "an encoder-decoder model"),
            ("whisper", "an encoder-decoder model"),
            ("mixtral", "a mixture of experts"),
            ("qwen3_moe", "a mixture of experts"),
            ("deepseek_v3", "a mixture of experts"),
            ("mamba", "a state-space model"),
            ("mamba2", "a state-space model"),
            ("llava", "a multimodal model"),
            ("gemma3", "a multimodal model"),
            ("vit", "its architecture is not known here"),
            ("bert", "its architecture is not known here"),
            ("opt", "its architecture is not known here"),
        ],
    )
    def test_unsupported_type(self, refuse, workplace, model_type, why):
        says = (f"A model of type '{model_type}' cannot be pruned", why, "Supported: apertus, ")
        refuse(model=of_type(workplace, model_type), says=says)

    @pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "mamba", "llava"])
    def test_reason_comes_without_a_guess_at_the_name(self, cli, workplace, model_type):
        model = of_type(workplace, model_type)
        assert "Did you mean" not in cli("prune", model, "--dry-run", "--sparsity", 0.2).err

    def test_type_that_transformers_does_not_know_either(self, refuse, workplace):
        model = of_type(workplace, "lama")
        says = ("type 'lama' cannot be pruned", "not known here. Did you mean 'llama'?")
        refuse(model=model, says=says)

    @pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
    def test_quantised(self, refuse, workplace, method):
        how = {"quant_method": method, "bits": 4, "load_in_4bit": True}
        says = ("is quantised already", "Prune the original model and quantise the result")
        refuse(model=variant(workplace, quantization_config=how), says=says)

    def test_phi_with_normalised_queries(self, refuse, workplace):
        model = of_type(workplace, "phi", qk_layernorm=True)
        refuse(model=model, says="qk_layernorm=True cannot be pruned")

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("{}", "has no config.json with a model_type"),
            ("{", "is not valid JSON"),
            ('{"model_type": "llama", "hidden_size": "x"}', "hidden_size must be a whole number"),
            ('{"model_type": "llama", "num_attention_heads": 0}', "cannot be read"),
            ('{"model_type": "llama", "num_attention_heads": 7}', "not a multiple of the number"),
            ('{"model_type": "llama", "hidden_act": "magic"}', "magic"),
        ],
    )
    def test_configuration(self, refuse, workplace, text, says):
        (workplace / "bad").mkdir()
        (workplace / "bad" / "config.json").write_text(text)
        refuse(model="bad", says=("bad", says))

    def test_no_configuration(self, refuse, workplace):
        (workplace / "empty").mkdir()
        refuse(model="empty", says="'empty' has no config.json with a model_type")


class TestWeights:
    def test_nan(self, refuse, workplace):
        def spoil(weights):
            weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan

        model = variant(workplace, spoil)
        refuse(model=model, says=("loss on the calibration text is nan", "--dtype float32"))
        says = ("The output of decoder layer 1 is NaN or infinite", "--dtype float32")
        without_loss = ("--importance", "magnitude-l1", "--compensation", "none")
        refuse(*without_loss, model=model, says=says)
        refuse("--evaluate", "text.txt", model=model, says="NaN")

    def test_pickle_only(self, refuse, workplace):
        model = variant(workplace, without=("model.safetensors",))
        torch.save({}, workplace / model / "pytorch_model.bin")
        says = ("no model.safetensors", "pickles are not read", "Convert")
        refuse(model=model, says=says)

    def test_none(self, refuse, workplace):
        model = variant(workplace, without=("model.safetensors",))
        refuse(model=model, says=("weights of 'changed'", "no model.safetensors"))

    @pytest.mark.parametrize("share", [0, 0.5])
    def test_truncated(self, refuse, workplace, share):
        model = variant(workplace)
        file = workplace / model / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
        refuse(model=model, says=("weights of 'changed'", "damaged or incomplete", "again"))

    def test_missing_shard(self, refuse, workplace):
        build("llama", torch.float32).save_pretrained(workplace / "cut", max_shard_size="100KB")
        next((workplace / "cut").glob("*-00002-of-*")).unlink()
        shutil.copy(workplace / "llama" / "tokenizer.json", workplace / "cut")
        refuse(model="cut", says=("weights of 'cut'", "model-00002-of"))

    def test_missing_tensor_is_not_drawn_at_random(self, refuse, workplace):
        name = "model.layers.1.mlp.up_proj.weight"
        model = variant(workplace, lambda weights: weights.pop(name))
        refuse(model=model, says=("weights of 'changed'", f"lack {name}", "incomplete"))

    def test_shape_that_does_not_fit(self, refuse, workplace):
        refuse(
            model=variant(workplace, intermediate_size=64),
            says=("weights of 'changed'", "shapes do not fit the config.json"),
        )

    def test_layers_that_the_configuration_does_not_count(self, refuse, cli, workplace):
        """Loaded with one layer less, the model would be another one, and nobody would know."""
        model = variant(workplace, num_hidden_layers=2)
        says = ("weights of 'changed' hold model.layers.2.", "has no place")
        refuse(model=model, says=says)
        for command in (("evaluate", model, "--text", "text.txt"), ("bench", model)):
            assert "has no place" in cli(*command).err

    def test_tensor_of_another_part(self, refuse, workplace):
        model = variant(workplace, lambda weights: weights.update(extra=torch.ones(2)))
        refuse(model=model, says=("weights of 'changed' hold extra", "has no place"))

    def test_tensors_that_no_model_needs(self, cli, workplace):
        """Of old checkpoints: rotary frequencies, which follow from the configuration."""

        def add(weights):
            weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

        assert load_model(variant(workplace, add)).config.num_hidden_layers == 3

    @pytest.mark.parametrize(
        "name", ["../llama/model.safetensors", "/etc/passwd", "a/b", "..", "", 7, ["a"]]
    )
    def test_index_that_leads_elsewhere(self, refuse, workplace, name):
        model = variant(workplace, without=("model.safetensors",))
        weights = load_file(workplace / "llama" / "model.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
        (workplace / model / "model.safetensors.index.json").write_text(json.dumps(index))
        says = ("model.safetensors.index.json' names the file", "must lie beside it")
        refuse(model=model, says=says)

    def test_class_of_another_architecture(self, refuse, cli, workplace):
        model = variant(workplace, architectures=["GPT2LMHeadModel"])
        says = ("says architectures 'GPT2LMHeadModel'", "is LlamaForCausalLM", "do not belong")
        refuse(model=model, says=says)
        assert says[0] in cli("evaluate", model, "--text", "text.txt").err

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("num_hidden_layers", 10**7),
            ("num_hidden_layers", 0),
            ("num_hidden_layers", -1),
            ("num_hidden_layers", 1.5),
            ("hidden_size", 10**12),
            ("head_dim", "x"),
            ("vocab_size", True),
            ("intermediate_size", [10**9]),
        ],
    )
    def test_size_that_no_model_has(self, refuse, workplace, key, value):
        model = variant(workplace, **{key: value})
        refuse(model=model, says=("configuration of 'changed'", f"{key} must be a whole number"))

    def test_speed_of_damaged_weights_is_not_measured(self, cli, workplace):
        def spoil(weights):
            weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan

        done = cli("bench", variant(workplace, spoil))
        assert done.status == 1
        assert "mlp.up_proj.weight of 'changed' holds NaN or infinity" in done.err

    def test_type_that_is_not_known_is_not_said_to_be_unprunable(self, cli, workplace):
        model = of_type(workplace, "lama")
        for command in (("evaluate", model, "--text", "text.txt"), ("bench", model)):
            said = cli(*command).err
            assert "type 'lama' is not known to transformers. Did you mean 'llama'?" in said
            assert "cannot be pruned" not in said
        said = cli("inspect", of_type(workplace, "vit")).err
        assert "inspect shows what can be cut, and here nothing can: " in said


class TestTokenizer:
    def test_missing(self, refuse, workplace):
        model = variant(workplace, without=("tokenizer.json", "tokenizer_config.json"))
        says = ("tokenizer of 'changed'", "files are missing", "tokenizer.json")
        refuse(model=model, says=says)

    @pytest.mark.parametrize("content", ["", "{", "{}"])
    def test_damaged(self, refuse, workplace, content):
        model = variant(workplace)
        (workplace / model / "tokenizer.json").write_text(content)
        refuse(model=model, says="tokenizer of 'changed' cannot be read")

    def test_of_a_larger_vocabulary(self, refuse, workplace):
        model = variant(workplace)
        character_tokenizer(CYRILLIC).save_pretrained(workplace / model)
        (workplace / "cyrillic.txt").write_text(CYRILLIC * 3, encoding="utf-8")
        says = ("puts out token 138", "vocabulary has 128 entries", "belongs to the model")
        refuse(model=model, calibration="cyrillic.txt", says=says)

    def test_of_a_larger_vocabulary_in_evaluation(self, refuse, workplace):
        model = variant(workplace)
        character_tokenizer(CYRILLIC).save_pretrained(workplace / model)
        (workplace / "cyrillic.txt").write_text(CYRILLIC * 3, encoding="utf-8")
        says = ("token 138", "vocabulary has 128 entries", "belongs to the model")
        refuse("--evaluate", "cyrillic.txt", model=model, says=says)
