"""A saved model is, for whoever loads it, the model that was in memory."""

from __future__ import annotations

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from adapt_pruner import prune
from adapt_pruner.model.architectures import ARCHITECTURES
from checkpoints import read
from picomodels import INTERMEDIATE_SIZE, NUM_HEADS, PICO, build

NOTICES = {
    "plain": ("xIELU", "causal_conv1d"),  # optional kernels, which dense models look for as well
    "uniform": ("xIELU", "causal_conv1d"),
    "portable": ("xIELU", "causal_conv1d", "Reading global config value"),  # before our code runs
}
"""Notices of transformers that are none of our doing."""


def test_every_architecture_is_tried():
    assert set(PICO) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", PICO)
def test_fresh_process_gets_the_same_outputs(readings, name):
    readings["plain"].check(name)


@pytest.mark.parametrize("name", PICO)
def test_layers_of_that_checkpoint_differ_in_all_their_widths(readings, name):
    layers = read(readings["home"] / "plain" / name / "config.json")["per_layer_config"]
    widths = [layer["intermediate_size"] for layer in layers.values()]
    assert len(set(widths)) > 1
    assert max(widths) < INTERMEDIATE_SIZE
    if ARCHITECTURES[name].has_free_heads and name != "lfm2":  # its two attending layers lost alike
        heads = [layer["num_attention_heads"] for layer in layers.values()]
        assert len(set(heads)) > 1
        assert max(heads) < NUM_HEADS


@pytest.mark.parametrize("name", PICO)
def test_portable_checkpoint_needs_only_transformers(readings, name):
    readings["portable"].check(name)


@pytest.mark.parametrize("name", PICO)
def test_uniform_checkpoint_needs_only_transformers_and_no_trust(readings, name):
    readings["uniform"].check(name)
    directory = readings["home"] / "uniform" / name
    config = read(directory / "config.json")
    assert "per_layer_config" not in config
    assert "auto_map" not in config
    assert not list(directory.glob("*.py"))


@pytest.mark.parametrize("kind", NOTICES)
def test_loading_prints_nothing(readings, kind):
    lines = readings[kind].messages.splitlines()
    assert [line for line in lines if not any(word in line for word in NOTICES[kind])] == []


def test_files_of_a_checkpoint(llama_checkpoint):
    files = {file.name for file in llama_checkpoint.iterdir()}
    assert files == {
        ".adapt-pruner.json",
        "README.md", "config.json", "generation_config.json", "model.safetensors", "pictures",
        "pruning.json", "recipe.yaml", "report.html", "run.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert {file.suffix for file in (llama_checkpoint / "pictures").iterdir()} == {".svg", ".png"}


def test_files_can_be_read_by_whom_the_process_allows(llama_checkpoint):
    modes = {file.stat().st_mode for file in llama_checkpoint.iterdir() if file.is_file()}
    assert len(modes) == 1


def test_pruning_json_says_what_stayed(llama_checkpoint, llama_result):
    record = read(llama_checkpoint / "pruning.json")
    assert record["target_parameters"] == llama_result.target
    assert record["after"]["total"] == sum(p.numel() for p in llama_result.model.parameters())
    assert record["before"]["total"] == sum(p.numel() for p in build("llama").parameters())
    assert record["settings"] == llama_result.settings.model_dump(mode="json")
    assert record["previous"] is None
    assert record["format"] == 2
    (edit,) = record["edits"]
    assert edit["edit"] == "cut"
    for i, widths in enumerate(llama_result.widths_after):
        attention, mlp = edit["axes"][f"{i}/kv-groups"], edit["axes"][f"{i}/neurons"]
        assert (attention["units"], mlp["units"]) == (4, INTERMEDIATE_SIZE)
        assert len(attention["kept"]) == widths["num_key_value_heads"]
        assert len(mlp["kept"]) == widths["intermediate_size"]
        assert mlp["kept"] == sorted(set(mlp["kept"]))


def test_run_json_accounts_for_every_step(llama_checkpoint, llama_result):
    record = read(llama_checkpoint / "run.json")
    assert len(record["steps"]) == len(llama_result.steps) > 0
    assert record["steps"][-1]["parameters"] == record["after"]["total"] <= llama_result.target
    assert record["steps"][-1]["widths"] == record["widths_after"] == llama_result.widths_after
    assert record["sparsity"] == pytest.approx(0.38, abs=0.01)
    assert torch.__version__.startswith(record["versions"]["torch"])  # a wheel may add +cu130


def test_model_card_says_the_sizes_and_how_to_load(llama_checkpoint, llama_result):
    card = (llama_checkpoint / "README.md").read_text(encoding="utf-8")
    assert f"{llama_result.before.total:,} | {llama_result.after.total:,}" in card
    assert "import adapt_pruner" in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    for picture in ("widths.svg", "layer_importance.svg"):
        assert f"(pictures/{picture})" in card
        assert (llama_checkpoint / "pictures" / picture).is_file()


def test_recipe_holds_target_and_settings(llama_checkpoint, llama_result):
    recipe = yaml.safe_load((llama_checkpoint / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe.pop("params") == llama_result.target
    assert recipe == {"allocation": "adaptive", "steps": 4, "amplitude": 0.1, "tuning_steps": 1}


def test_recipe_names_the_text_that_was_read(tokenizer, text_file):
    result = prune(
        build("llama", torch.float32), tokenizer, sparsity=0.1, calibration=text_file,
        windows=4, window_length=12, steps=1, tuning_steps=1,
    )  # fmt: skip
    assert result.record()["settings"]["calibration"] == str(text_file)


def test_tokenizer_comes_along(llama_checkpoint, tokenizer):
    text = "the first of many"
    assert AutoTokenizer.from_pretrained(llama_checkpoint)(text).input_ids == (
        tokenizer(text).input_ids
    )
