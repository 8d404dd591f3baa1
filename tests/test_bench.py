"""What models cost: bytes, operations and time against counts by hand."""

from __future__ import annotations

import json

import pytest
import torch

from adapt_pruner import prune
from adapt_pruner.evaluation.bench import RunningCost, _LiveTensors, compare_costs
from adapt_pruner.settings import BenchSettings
from picomodels import PICO, build

QUICK = BenchSettings(prompt_tokens=16, new_tokens=2, repetitions=1)


@pytest.fixture(scope="module")
def costs(calibration) -> list[RunningCost]:
    dense, pruned = build("llama", torch.float32), build("llama", torch.float32)
    prune(pruned, sparsity=0.5, calibration=calibration, steps=1, tuning_steps=1)
    return compare_costs([dense, pruned], QUICK)


def test_weights_cache_and_operations_of_a_known_model(costs):
    dense, _ = costs
    assert dense.parameters == 110_336
    assert dense.weight_bytes == 4 * 110_336
    assert dense.decode_bytes == 4 * (110_336 - 128 * 64)  # all but the input embedding
    assert dense.kv_bytes_per_token == 4 * 2 * 3 * 4 * 8  # keys, values; layers; KV heads; size
    matrices = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    attention = 3 * 2 * 8 * 8 * 16 * 16  # scores and values of 8 heads of size 8
    assert dense.prefill_flops == 2 * (16 * matrices + attention + 64 * 128)
    assert dense.ideal_decode_speedup == dense.speed.decode_speedup == 1


def test_ideal_speedups_are_ratios(costs):
    dense, pruned = costs
    assert pruned.parameters < dense.parameters
    assert pruned.ideal_decode_speedup == dense.decode_bytes / pruned.decode_bytes > 1.5
    assert pruned.ideal_prefill_speedup == dense.prefill_flops / pruned.prefill_flops > 1.2
    assert pruned.speed.decode_tokens_per_s > 0
    assert pruned.speed.decode_speedup > 0


def test_speeds_and_first_token(costs):
    speed = costs[0].speed
    assert (speed.prompt_tokens, speed.new_tokens, speed.batch_size) == (16, 2, 1)
    assert speed.prefill_tokens_per_s == pytest.approx(16 / speed.time_to_first_token_s)


def test_peak_holds_weights_cache_and_activations(costs):
    dense, pruned = costs
    cache = dense.kv_bytes_per_token * 18
    neurons = 16 * 96 * 4
    assert dense.weight_bytes + cache + neurons < dense.peak_bytes < dense.weight_bytes + 2e6
    assert pruned.peak_bytes < dense.peak_bytes


def test_live_tensors_are_counted_while_they_live():
    with _LiveTensors() as live:
        first = torch.ones(1000)
        view = first[:10]
        del first
        assert live.now == 4000  # the view keeps it
        del view
        assert live.now == 0
        torch.ones(500).add_(1)
    assert live.peak == 4000


@pytest.mark.parametrize("model_type", ["lfm2", "gpt_neox", "gemma2"])
def test_other_architectures(model_type):
    (cost,) = compare_costs([build(model_type, torch.float32)], QUICK)
    heads, size = (8, 8) if model_type == "gpt_neox" else (4, PICO[model_type].get("head_dim", 8))
    layers = 2 if model_type == "lfm2" else 3  # one layer is a convolution
    assert cost.kv_bytes_per_token == 4 * 2 * layers * heads * size
    tied = model_type != "gpt_neox"
    assert (cost.decode_bytes == cost.weight_bytes) == tied


def test_prompt_is_shortened_to_the_context():
    (cost,) = compare_costs([build("llama", torch.float32)], BenchSettings(repetitions=1))
    assert cost.speed.prompt_tokens == 64 - 32


class TestCommand:
    def test_table_and_json(self, cli, llama, tmp_path):
        file = tmp_path / "bench.json"
        done = cli(
            "bench", "demo", llama, "--repetitions", 1, "--prompt-tokens", 8, "--new-tokens", 2,
            "--json", file,
        )  # fmt: skip
        assert (done.status, done.err) == (0, ""), done.err
        rows = {line.split("  ")[0].strip(): line for line in done.out.splitlines()}
        names = ("weights", "KV cache per token", "peak memory", "time to first token",
                 "prefill, tokens/s", "decode, tokens/s")  # fmt: skip
        assert rows.keys() >= set(names)
        assert "8.26×" in rows["parameters"]
        assert "prompt of 8 tokens, 2 new ones" in done.out
        found = json.loads(file.read_text())
        assert [model["model"] for model in found["models"]] == ["demo", str(llama)]
        assert found["models"][0]["dtype"] == "float32"
        assert "torch" in found["versions"]

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("./nowhere",), "There is no model directory './nowhere'"),
            (("demo", "--new-tokens", 0), "new_tokens: "),
            (("demo", "--device", "warp"), "device: 'warp' is not available"),
            (("demo", "--dtype", "float8"), "there is no 'float8'"),
        ],
    )
    def test_refusals(self, cli, arguments, says):
        done = cli("bench", *arguments)
        assert done.status in (1, 2)
        assert done.err.startswith("adapt-pruner: error: ")
        assert says in done.err
        assert done.err.count("\n") == 1
