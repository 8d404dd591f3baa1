"""What a model consists of, from its configuration alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from adapt_pruner import find_anatomy, prune
from adapt_pruner.allocate.target import resolve_target
from adapt_pruner.errors import UnsupportedModel
from adapt_pruner.inspection import inspect_model
from picomodels import PICO, build


@pytest.mark.parametrize("model_type", PICO)
def test_parts_add_up_for_every_architecture(model_type):
    model = build(model_type, torch.float32)
    found = inspect_model(model)
    assert sum(found.budget.values()) == found.total == sum(p.numel() for p in model.parameters())
    assert found.budget["embeddings"] == 128 * 64
    assert ("head" in found.budget) != found.is_tied
    assert ("others" in found.budget) == (model_type == "lfm2")
    anatomy = find_anatomy(model)
    in_units = {"kv-groups": 0, "neurons": 0, "attention": 0}
    for axis in anatomy.of_kinds(in_units):
        in_units[axis.kind] += axis.num_units * axis.unit_cost
    # Output biases and per-head norms belong to a part, and to none of its units.
    assert 0 <= found.budget["MLP"] - in_units["neurons"] < 1000
    if anatomy.architecture.has_free_heads:
        assert 0 <= found.budget["attention"] - in_units["kv-groups"] < 1000
    else:  # attention goes as a whole, with its norm
        assert in_units["attention"] - found.budget["attention"] == 3 * 2 * 64


def test_known_model():
    found = inspect_model(build("llama", torch.float32))
    assert found.budget == {
        "embeddings": 8192,
        "attention": 3 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 2 + 32 * 2),
        "MLP": 3 * (3 * 64 * 96 + 96 * 2 + 64),
        "norms": 7 * 64,
        "head": 8192,
    }
    attention, mlp = 48 * 64 * 4 + 4 * 32 + 64 + 64, 3 * 64 * 96 + 2 * 96 + 64 + 64  # with norms
    neuron, query_head = 3 * 64 + 2, 64 * 8 * 2 + 8
    # A hidden dimension: a column of the embeddings, of the head and of each projection that reads
    # (64 + 32 + 32 query, key and value rows, 96 gate and 96 up rows), a row and bias of each that
    # writes (64 and 96 columns), and one weight of each norm.
    dimension = 2 * 128 + 1 + 3 * (128 + 2 * 96 + 64 + 1 + 96 + 1 + 2)
    assert {units.kind: (units.total, units.smallest_cost) for units in found.units} == {
        "kv-groups": (12, 64 * 8 * 6 + 8 * 4),
        "query-heads": (24, query_head),
        "neurons": (288, neuron),
        "attention": (3, attention),
        "mlp": (3, mlp),
        "layers": (3, attention + mlp),
        "hidden": (64, dimension),
    }
    assert all(units.smallest_cost == units.largest_cost for units in found.units)
    assert found.kv_entries_per_token == 2 * 3 * 4 * 8


def test_targets_are_those_of_a_run():
    model = build("llama", torch.float32)
    found, anatomy = inspect_model(model), find_anatomy(model)
    for target in found.targets:
        assert target.parameters == resolve_target(anatomy, target.sparsity, None)
        assert target.is_possible == (target.sparsity <= found.largest_sparsity)
    assert found.smallest == found.total - 3 * (3 * 3104 + 95 * 194)


def test_impossible_targets_are_marked():
    # Few units: the last ones, which stay, are more than a fifth.
    found = inspect_model(build("llama", num_key_value_heads=1, num_attention_heads=1, head_dim=64))
    assert [target.is_possible for target in found.targets][-1] is False
    assert found.targets[0].is_possible


def test_pruned_model_has_widths_per_layer(calibration):
    model = build("llama", torch.float32)
    result = prune(model, sparsity=0.4, calibration=calibration, steps=1, tuning_steps=1)
    found = inspect_model(model)
    assert found.widths == result.widths_after
    assert found.total == result.after.total
    heads = sum(widths["num_key_value_heads"] for widths in result.widths_after)
    assert found.kv_entries_per_token == 2 * heads * 8


def test_model_that_cannot_be_pruned():
    with pytest.raises(UnsupportedModel, match="decoder layers at"):
        inspect_model(build("llama").model)


class TestCommand:
    def test_without_weights(self, cli, llama, tmp_path):
        shutil.copy(llama / "config.json", tmp_path)
        file = tmp_path / "inspect.json"
        done = cli("inspect", tmp_path, "--json", file)
        assert (done.status, done.err) == (0, "")
        lines = [line.split() for line in done.out.splitlines()]
        assert ["MLP", "56,064", "50.81%", "224.3", "kB"] in lines
        assert ["0", "to", "2", "8", "4", "96"] in lines
        assert ["KV", "groups", "12", "3,104"] in lines
        assert ["hidden", "dimensions", "64", "1,709"] in lines
        assert ["--sparsity", "0.5", "63,392", "57.5%", "253.6", "kB"] in lines
        assert "smallest possible: 27,110 parameters" in done.out
        assert json.loads(file.read_text())["total"] == 110_336

    def test_layers_of_different_width(self, cli, calibration, tmp_path, tokenizer):
        model = build("llama", torch.float32)
        result = prune(
            model, tokenizer, sparsity=0.4, calibration=calibration, steps=1, tuning_steps=1
        )
        done = cli("inspect", result.save(tmp_path / "smaller"))
        lines = [line.split() for line in done.out.splitlines()]
        for layer, widths in enumerate(result.widths_after):
            assert [str(layer), *map(str, widths.values())] in lines

    @pytest.mark.parametrize(
        ("config", "says"),
        [
            ({"model_type": "gpt2"}, "type 'gpt2' cannot be pruned"),
            ({}, "has no config.json with a model_type"),
        ],
    )
    def test_refusals(self, cli, tmp_path, config, says):
        (tmp_path / "config.json").write_text(json.dumps(config))
        done = cli("inspect", tmp_path)
        assert (done.status, done.out) == (1, "")
        assert says in done.err
        assert done.err.count("\n") == 1
