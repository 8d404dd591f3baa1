"""Whatever is wrong, the user gets one message that says what, with which value, and what to do."""

from __future__ import annotations

import pytest
import torch

from picomodels import build


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
        says = ("1,000 parameters is below what is possible", "27,110", "16,448", "milder target")
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
        says = ("cut: this model has no kv-groups that can be cut; it has neurons, layers",)
        refuse("--cut", "kv-groups", model="neox", says=says)


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
            (
                "sparsity: much",
                "sparsity must be a number or a whole number or a list of them; got 'much'",
            ),
            (
                "sparsity: true",
                "sparsity must be a number or a whole number or a list of them; got True",
            ),
            ("params: 1.5", "params must be a whole number or text or a list of them; got 1.5"),
            ("evaluate: 5", "evaluate must be text; got 5"),
            ("portable: maybe", "portable must be true or false; got 'maybe'"),
            ("preset: [paper]", "preset must be text; got ['paper']"),
            ("preset: papr", "adapt-pruner has no preset 'papr'. Did you mean 'paper'?"),
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
