"""Whatever is wrong, the user gets one message that says what, with which value, and what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adapt_pruner import (
    CalibrationData,
    load_calibration,
    load_model,
    make_settings,
    prune,
    replay,
)
from adapt_pruner.data import formats
from adapt_pruner.errors import (
    AdaptPrunerError,
    CalibrationError,
    InvalidSettings,
    InvalidTarget,
    LoadingError,
    UnsupportedModel,
)
from adapt_pruner.model.loading import load_tokenizer
from conftest import character_tokenizer
from picomodels import build

CYRILLIC = "".join(chr(0x430 + i) for i in range(40))
"""Characters that get tokens which the tiny Llama does not have."""


@pytest.fixture
def workplace(llama, text_file, tmp_path, monkeypatch) -> Path:
    """The current directory, with `llama` and `text.txt` in it."""
    (tmp_path / "llama").symlink_to(llama)
    (tmp_path / "text.txt").symlink_to(text_file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refuse(cli, workplace) -> Callable[..., None]:
    """Run `adapt-pruner prune llama -o out` with more arguments, and look at its refusal.

    The message must hold `says`; nothing may be created, and the output directory must not be.
    """

    def check(
        *more: object,
        says: str | tuple[str, ...],
        model: object = "llama",
        target: tuple[object, ...] = ("--sparsity", 0.2),
        calibration: object = "text.txt",
        output: object = "out",
        status: int = 1,
    ) -> None:
        before = snapshot(workplace)
        done = cli(
            "prune", model, "-o", output, *target, "--calibration", calibration,
            "--windows", 4, "--window-length", 12, "--steps", 1, *more,
        )  # fmt: skip
        message = done.err
        assert message.startswith("adapt-pruner: error: "), message
        assert message.count("\n") == 1, message
        assert len(message) < 600, message
        assert done.out == ""
        assert done.status == status
        for part in (says,) if isinstance(says, str) else says:
            assert part in message, message
        for word in ("Traceback", "Unexpected", "site-packages", "None"):
            assert word not in message
        assert message.endswith((".\n", "?\n", "mobilellm.\n")), message
        assert snapshot(workplace) == before

    return check


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, and every directory, by name."""
    paths = sorted(directory.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths}


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


class TestTarget:
    @pytest.mark.parametrize(
        ("value", "says"),
        [
            (20, ("got 20", "Did you mean 0.2?")),
            (1.5, ("got 1.5", "in [0, 1)")),
            (1, ("got 1", "in [0, 1)")),
            (-0.1, ("got -0.1", "in [0, 1)")),
            ("nan", ("got nan", "in [0, 1)")),
        ],
    )
    def test_sparsity(self, refuse, value, says):
        refuse(target=("--sparsity", value), says=("share of the decoder layers'", *says))

    def test_sparsity_that_is_no_number(self, refuse):
        refuse(target=("--sparsity", "much"), says="'much' is not a valid float", status=2)

    def test_params_above_the_model(self, refuse):
        refuse(
            target=("--params", "10M"), says=("10,000,000", "above the model's 110,336", "smaller")
        )

    def test_params_below_what_is_possible(self, refuse):
        says = ("1,000 parameters is below what is possible", "27,110", "16,448", "larger target")
        refuse(target=("--params", "1K"), says=says)

    @pytest.mark.parametrize("value", ["abc", "0", "-5", "1.5", "nan", "inf", "M", "3X"])
    def test_params_that_are_no_count(self, refuse, value):
        says = ("--params", "a count such as 350M, 1.2B or 260032", f"got '{value}'")
        refuse(target=("--params", value), says=says, status=2)

    @pytest.mark.parametrize("target", [(), ("--sparsity", 0.2, "--params", "80K")])
    def test_not_exactly_one_target(self, refuse, target):
        refuse(target=target, says="Give the target once: --sparsity 0.2, or --params 350M")

    def test_everything_protected(self, refuse):
        refuse("--protect-layers", "0,1,2", says=("below what is possible", "110,336"))


class TestOptions:
    @pytest.mark.parametrize(
        ("option", "meant"),
        [("--sparsty", "--sparsity"), ("--windws", "--windows"), ("--calibraton", "--calibration")],
    )
    def test_unknown_option(self, refuse, option, meant):
        says = f"There is no option '{option}'. Did you mean '{meant}'?"
        refuse(option, 1, says=says, status=2)

    def test_unknown_option_like_no_other(self, refuse):
        refuse("--zzz", says="There is no option '--zzz'. --help lists them.", status=2)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("prun",), "There is no command 'prun'. Did you mean 'prune'? Commands: prune,"),
            (("zzz",), "There is no command 'zzz'. Commands: prune,"),
            (("prune",), "Name a MODEL"),
            (("prune", "llama"), "Name the directory to write: -o DIR"),
            (("prune", "llama", "more", "-o", "out"), "unexpected extra argument (more)"),
            (("prune", "llama", "-o"), "Option '-o' requires an argument"),
        ],
    )
    def test_command(self, cli, workplace, arguments, says):
        done = cli(*arguments)
        assert done.status == 2
        assert done.err.startswith("adapt-pruner: error: ")
        assert says in done.err
        assert done.out == ""

    @pytest.mark.parametrize(
        ("flag", "value", "says"),
        [
            ("--method", "adapt-prunr", "Did you mean 'adapt-pruner'?"),
            ("--preset", "papr", "Did you mean 'paper'? Known: best, paper"),
            ("--importance", "tailor", "Did you mean 'taylor'? Known: taylor, taylor-vector"),
            ("--layout", "unifrom", "Did you mean 'uniform'?"),
            ("--distance", "cosinus", "Did you mean 'cosine'?"),
            ("--dtype", "bf16", "Known: auto, float32, bfloat16"),
            ("--steps", "many", "'many' is not a valid integer"),
            ("--protect-layers", "first", "expected integers such as 0,1,-1; got 'first'"),
        ],
    )
    def test_value_of_another_kind(self, refuse, flag, value, says):
        refuse(flag, value, says=(flag, f"'{value}'", says), status=2)

    @pytest.mark.parametrize(
        ("flag", "value", "says"),
        [
            ("--steps", 0, ("steps: ", "greater than or equal to 1; got 0")),
            ("--windows", -4, ("windows: ", "got -4")),
            ("--window-length", 1, ("window_length: ", "greater than or equal to 2; got 1")),
            ("--multiple", 0, ("multiple: ", "got 0")),
            ("--ridge", 0, ("ridge: ", "greater than or equal to 0.000000000001; got 0.0")),
            ("--amplitude", -1, ("amplitude: ", "got -1")),
            ("--seed", -1, ("seed: ", "got -1")),
            ("--micro-batch-size", 0, ("micro_batch_size: ", "got 0")),
            ("--protect-layers", "0,7", ("protect_layers: ", "layers 0 to 2; got 7")),
            ("--protect-layers", "-4", ("protect_layers: ", "layers 0 to 2; got -4")),
            ("--window-length", 65, ("window_length: ", "at most 64 tokens; got 65")),
            ("--device", "cuda:99", ("device: 'cuda:99' is not available here", "cpu")),
            ("--device", "gpu", ("device: 'gpu' is not available here", "cpu")),
            ("--device", "meta", ("device: 'meta' is not available here", "cpu")),
            ("--device-map", "magic", ("found magic", "'auto'")),
        ],
    )
    def test_value_out_of_range(self, refuse, flag, value, says):
        refuse(flag, value, says=says)

    def test_uniform_layout_with_protected_layers(self, refuse):
        says = ("uniform layout cuts every layer alike", "protect_layers must be empty; got [0]")
        refuse("--layout", "uniform", "--protect-layers", "0", says=says)

    def test_attention_that_cannot_be_cut(self, refuse, workplace, tokenizer):
        build("gpt_neox", torch.float32).save_pretrained(workplace / "neox")
        tokenizer.save_pretrained(workplace / "neox")
        says = ("prune: the attention of this architecture cannot be cut", "use mlp")
        refuse("--prune", "attention", model="neox", says=says)


class TestRecipe:
    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("sparsty: 0.2", "has an unknown key 'sparsty'. Did you mean 'sparsity'?"),
            ("window-length: 4", "unknown key 'window-length'. Did you mean 'window_length'?"),
            ("1: 2", "has an unknown key '1'"),
            ("- sparsity", "must be a mapping such as `sparsity: 0.2`; got ['sparsity']"),
            ("just words", "must be a mapping such as `sparsity: 0.2`; got 'just words'"),
            ("steps: 3\nseed: [1", "is not YAML: expected ',' or ']'"),
            ("a: b: c", "is not YAML: mapping values are not allowed here in line 1"),
            ("sparsity: much", "sparsity must be a number or a whole number; got 'much'"),
            ("sparsity: true", "sparsity must be a number or a whole number; got True"),
            ("params: 1.5", "params must be a whole number or text; got 1.5"),
            ("evaluate: 5", "evaluate must be text; got 5"),
            ("portable: maybe", "portable must be true or false; got 'maybe'"),
            ("preset: [paper]", "preset must be text; got ['paper']"),
            ("preset: papr", "There is no preset 'papr'. Did you mean 'paper'?"),
            ("seed: -1", "seed: Input should be greater than or equal to 0; got -1"),
            ("importance: tailor", "got 'tailor'"),
            ("protect_layers: [first]", "got 'first'"),
            ("protect_layers: 1", "got 1"),
        ],
    )
    def test_content(self, refuse, workplace, text, says):
        (workplace / "recipe.yaml").write_text(text)
        refuse("--recipe", "recipe.yaml", says=says)

    def test_count(self, refuse, workplace):
        (workplace / "recipe.yaml").write_text("params: some")
        says = "params: expected a count such as 350M, 1.2B or 260032; got 'some'"
        refuse("--recipe", "recipe.yaml", says=says, target=())

    def test_missing(self, refuse):
        says = "There is no recipe file 'nowhere.yaml'"
        refuse("--recipe", "nowhere.yaml", says=says)

    def test_directory(self, refuse):
        refuse("--recipe", "llama", says="Recipe 'llama' cannot be read: Is a directory")

    def test_not_text(self, refuse, workplace):
        (workplace / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
        refuse("--recipe", "recipe.yaml", says="Recipe 'recipe.yaml' is not a text file in UTF-8")


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
        says = ("Decoder layer 1 puts out NaN", "--dtype float32")
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


class TestSilence:
    """What would run, and mean something else than its user thinks."""

    def test_multiple_that_cuts_no_neuron(self, refuse):
        for multiple in (96, 1_000_000):
            says = ("multiple: the widest MLP has 96 neurons", "none could be cut")
            refuse("--multiple", multiple, says=says)

    @pytest.mark.parametrize("option", ["--evaluate", "--calibration", "--recipe", "--device"])
    @pytest.mark.parametrize("value", ["", "  "])
    def test_empty_value(self, refuse, option, value):
        refuse(option, value, says=f"The argument after {option} is empty", status=2)

    def test_empty_value_in_a_recipe(self, refuse, workplace):
        for key, says in (("evaluate", "evaluate is empty"), ("calibration", "calibration: ")):
            (workplace / "recipe.yaml").write_text(f"{key}: ''")
            flags = () if key == "evaluate" else ("--calibration", "text.txt")
            if not flags:
                refuse("--recipe", "recipe.yaml", says=says)
            with pytest.raises(InvalidSettings, match="at least 1 character"):
                make_settings(calibration="")

    @pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0", "-1", "1e9", "x"])
    @pytest.mark.parametrize("option", ["--max-hours", "--gpu-tflops"])
    def test_limit_that_is_none(self, cli, workplace, option, value):
        done = cli("accel", "llama", "-o", "out", option, value)
        assert done.status == 2
        assert option in done.err
        assert not (workplace / "out").exists()

    @pytest.mark.parametrize(
        ("limit", "says"),
        [
            ("1e-300", "less than one"),
            ("0.001", "less than one"),
            ("1.5", "whole number of items"),
            ("nan", "finite number"),
            ("1e300", "less than or equal to"),
        ],
    )
    def test_limit_that_takes_nothing(self, cli, workplace, limit, says):
        done = cli("evaluate", "llama", "--text", "text.txt", "--limit", limit, "--window", 16)
        assert done.status == 1
        assert "limit: " in done.err
        assert says in done.err

    def test_answers_of_plain_text(self, cli, workplace):
        done = cli(
            "accel", "llama", "-o", "out", "--data", "text.txt", "--tokens", 512, "--alpha", 0,
            "--sequence-length", 16, "--batch-tokens", 64, "--loss-on", "answers", "--sparsity",
            0.2, "--calibration", "text.txt", "--windows", 4, "--window-length", 12, "--repeat",
        )  # fmt: skip
        assert done.status == 1
        assert "loss_on: the data are plain text, without answers" in done.err

    def test_demo_is_silent_before_it_refuses(self, cli, workplace):
        done = cli("demo", "-o", "out", "--sparsity", 2)
        assert done.status == 1
        assert done.out == ""
        assert "got 2" in done.err


class TestPlaces:
    """Outputs that are no ordinary files."""

    @pytest.mark.parametrize("kind", ["pipe", "link", "thesis", "long"])
    def test_file_that_is_not_replaced(self, cli, workplace, kind):
        place = workplace / ("a" * 300 if kind == "long" else "out.json")
        if kind == "pipe":
            os.mkfifo(place)
        elif kind == "link":
            (workplace / "thesis").write_text("years of work")
            place.symlink_to("thesis")
        elif kind == "thesis":
            place.write_text("years of work")
        for command in (("inspect", "llama", "--json"), ("report", "llama", "-o")):
            done = cli(*command, place)
            assert done.status == 1
            assert done.err.startswith("adapt-pruner: error: ")
            assert "Unexpected" not in done.err
        if kind in ("link", "thesis"):
            assert place.read_text() == "years of work"
        if kind == "pipe":
            assert place.is_fifo()

    def test_results_are_replaced(self, cli, workplace):
        for _ in range(2):
            assert cli("inspect", "llama", "--json", "out.json").status == 0

    @pytest.mark.parametrize("name", ["/dev/zero", "pipe", "circle"])
    def test_input_without_an_end(self, cli, workplace, name):
        os.mkfifo(workplace / "pipe")
        (workplace / "circle").symlink_to("circle")
        for command in (
            ("prune", "llama", "-o", "out", "--sparsity", 0.2, "--recipe", name),
            ("prune", "llama", "-o", "out", "--sparsity", 0.2, "--calibration", name),
            ("prune", name, "-o", "out", "--sparsity", 0.2),
            ("compare", "llama", "-o", "out", "--evaluate", "text.txt", "--variants", name),
            ("report", name),
        ):
            done = cli(*command)
            assert done.status == 1, command
            assert "Unexpected" not in done.err
            assert "Out of memory" not in done.err
        assert not (workplace / "out").exists()

    def test_template_that_loops(self, cli, workplace, monkeypatch):
        monkeypatch.setattr(formats, "TEMPLATE_SECONDS", 0.2)
        (workplace / "loop.jinja").write_text(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        )
        (workplace / "chat.jsonl").write_text(
            json.dumps({"messages": [{"role": "user", "content": "a"}]})
        )
        template = formats.ChatTemplate(load_tokenizer("llama"), "loop.jinja", mark_answers=False)
        with pytest.raises(formats.TemplateRefusal, match=r"longer than 0\.2 s"):
            template.document([{"role": "user", "content": "a"}])


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


class TestCalibration:
    @pytest.mark.parametrize("name", ["no.txt", "./nowhere", "/no/where", "no.jsonl", "no.parquet"])
    def test_missing(self, refuse, name):
        refuse(calibration=name, says=f"There is no text file or directory '{name}'")

    def test_missing_text_for_evaluation(self, refuse):
        refuse("--evaluate", "no.txt", says="There is no text file or directory 'no.txt'")

    @pytest.mark.parametrize("name", ["some-lab/some-text", "nowhere"])
    def test_data_set_on_the_hub_while_offline(self, refuse, name):
        says = (f"Data set '{name}' cannot be read", "local txt, jsonl, json or parquet file")
        refuse(calibration=name, says=says)

    @pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.parquet"])
    def test_empty(self, refuse, workplace, name):
        (workplace / name).touch()
        says = (f"'{name}' has no document of at least 12 tokens", "it is empty", "Use other text")
        refuse(calibration=name, says=says)

    @pytest.mark.parametrize("text", ["\n\n", '{"text": ""}\n{"text": null}\n'])
    def test_nothing_but_blank_lines(self, refuse, workplace, text):
        (workplace / "blank.jsonl").write_text(text)
        refuse(calibration="blank.jsonl", says="it is empty")

    def test_documents_too_short(self, refuse, workplace):
        (workplace / "short.txt").write_text("one\n<|endoftext|>\nseven\n")
        says = ("at least 12 tokens", "the longest of 2 has 5", "smaller --window-length")
        refuse(calibration="short.txt", says=says)

    @pytest.mark.parametrize(
        ("name", "text", "says"),
        [
            ("bad.jsonl", '{"text": "abc"}\n{"text": "abc\n', "line 2 is not valid JSON"),
            ("bad.jsonl", "no json at all\n", "line 1 is not valid JSON"),
            ("bad.json", "{", "line 1 is not valid JSON"),
            ("bad.json", "[1", "is not valid JSON"),
            ("bad.json", "[1]", "record 1 must be an object"),
            ("bad.parquet", "no parquet at all", "is no parquet file that can be read"),
        ],
    )
    def test_malformed(self, refuse, workplace, name, text, says):
        (workplace / name).write_text(text)
        refuse(calibration=name, says=(f"'{name}' ", says))

    def test_malformed_file_among_others_is_named(self, refuse, workplace):
        data = workplace / "data"
        data.mkdir()
        (data / "a.jsonl").write_text('{"text": "abc"}\n' * 3)
        (data / "b.jsonl").write_text('{"text": "abc"}\n{"text": "abc\n')
        (data / "c.jsonl").write_text('{"text": "abc"}\n' * 3)
        refuse(calibration="data", says="'data/b.jsonl' line 2 is not valid JSON")

    def test_missing_column(self, refuse, workplace):
        (workplace / "data.jsonl").write_text('{"content": "abc", "id": 1}\n')
        says = ("no column 'text'; it has content, id", "--text-column")
        refuse(calibration="data.jsonl", says=says)
        says = ("no column 'body'; it has content, id", "--text-column")
        refuse("--text-column", "body", calibration="data.jsonl", says=says)

    def test_column_that_is_not_text(self, refuse, workplace):
        (workplace / "data.jsonl").write_text('{"text": 7}\n')
        says = ("Column 'text' of 'data.jsonl' holds 7, which is not text", "--text-column")
        refuse(calibration="data.jsonl", says=says)

    def test_not_utf8(self, refuse, workplace):
        (workplace / "latin.txt").write_bytes("café".encode("latin-1"))
        refuse(calibration="latin.txt", says="'latin.txt' is not UTF-8 text (byte 3)")

    def test_files_of_no_known_form(self, refuse, workplace):
        (workplace / "data").mkdir()
        (workplace / "data" / "table.csv").write_text("text\nabc\n")
        for name in ("data", "data/table.csv"):
            says = (f"'{name}' holds no text that can be read", ".json, .jsonl, .parquet, .txt")
            refuse(calibration=name, says=says)

    def test_existing_result_survives(self, refuse, workplace):
        (workplace / "out").mkdir()
        (workplace / "out" / "thesis.txt").write_text("years of work")
        refuse("--overwrite", calibration="no.txt", says="that no run wrote")


class TestPython:
    """The same care for those who call the library."""

    @pytest.fixture
    def model(self) -> nn.Module:
        return build("llama", torch.float32)

    @pytest.mark.parametrize(
        ("arguments", "error", "says"),
        [
            ({"sparsity": 20}, InvalidTarget, r"got 20\. Did you mean 0\.2\?"),
            ({}, InvalidTarget, "Give the target once"),
            ({"sparsity": 0.2, "params": 1000}, InvalidTarget, "Give the target once"),
            ({"params": 10**9}, InvalidTarget, "above the model's 110,336"),
            ({"sparsity": 0.2, "preset": "bst"}, InvalidSettings, "Did you mean 'best'"),
            ({"sparsity": 0.2, "step": 3}, InvalidSettings, "no setting 'step'. .* 'steps'"),
            ({"sparsity": 0.2, "steps": "x"}, InvalidSettings, "steps: .*got 'x'"),
            (
                {"sparsity": 0.2, "settings": make_settings(), "steps": 3},
                InvalidSettings,
                r"`settings` or single ones, not both; got \['steps'\]",
            ),
            ({"sparsity": 0.2, "protect_layers": (5,)}, InvalidSettings, "layers 0 to 2; got 5"),
        ],
    )
    def test_arguments(self, model, calibration, arguments, error, says):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(error, match=says):
            prune(model, calibration=calibration, **arguments)
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_text_without_a_tokenizer(self, model, text_file):
        with pytest.raises(InvalidSettings, match="needs the model's tokenizer; got None"):
            prune(model, sparsity=0.2, calibration=text_file)

    def test_window_longer_than_the_context(self, model, tokenizer, text_file):
        with pytest.raises(InvalidSettings, match="at most 64 tokens; got 65"):
            prune(model, tokenizer, sparsity=0.2, calibration=text_file, window_length=65)

    def test_model_of_another_kind(self, calibration):
        class Other(nn.Module):
            config = build("llama").config

        with pytest.raises(UnsupportedModel, match=r"decoder layers at 'model\.layers'; got Other"):
            prune(Other(), sparsity=0.2, calibration=calibration)

    def test_layers_of_another_kind(self, model, calibration):
        model.model.layers[1].mlp.up_proj = nn.Identity()
        with pytest.raises(UnsupportedModel, match=r"'mlp\.up_proj' to be .*Linear; got Identity"):
            prune(model, sparsity=0.2, calibration=calibration)

    def test_no_documents(self):
        with pytest.raises(CalibrationError, match="it is empty"):
            CalibrationData([], window_length=4, num_windows=2)

    def test_source_that_does_not_exist(self, tokenizer):
        with pytest.raises(CalibrationError, match=r"no text file or directory 'no\.txt'"):
            load_calibration("no.txt", tokenizer, 4, 2)

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{",
            "[]",
            "{}",
        ],
    )
    def test_record_that_is_none(self, model, tmp_path, content):
        (tmp_path / "pruning.json").write_text(content)
        with pytest.raises(LoadingError):
            replay(model, tmp_path)

    def test_every_error_is_of_one_family(self):
        kinds = (CalibrationError, InvalidSettings, InvalidTarget, LoadingError, UnsupportedModel)
        assert all(issubclass(kind, AdaptPrunerError) for kind in kinds)
