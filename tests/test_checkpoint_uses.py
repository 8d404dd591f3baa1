"""A checkpoint in use: saved again, in shards, in half precision, compiled, trained, replayed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from adapt_pruner import checkpoint, find_anatomy, load_model, prune, replay
from adapt_pruner.errors import LoadingError
from checkpoints import Reading, pruned, read
from picomodels import VOCAB_SIZE, build, logits_of
from picomodels import random_tokens as tokens
from reload_checkpoints import outputs


def reload(directory: Path, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def test_config_survives_a_round_trip(llama_checkpoint, tmp_path):
    config = AutoConfig.from_pretrained(llama_checkpoint)
    assert config.is_heterogeneous
    config.save_pretrained(tmp_path)
    written = read(llama_checkpoint / "config.json")
    for key in ("rope_theta", "rope_scaling", "torch_dtype"):  # for transformers 4 alone
        del written[key]
    assert read(tmp_path / "config.json") == written


def test_loaded_model_saves_itself_and_loads_again(llama_checkpoint, tmp_path):
    model = reload(llama_checkpoint)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(reload(tmp_path), tokens()), logits_of(model, tokens()))


def test_deep_copy_is_the_same_model(llama_checkpoint):
    model = reload(llama_checkpoint)
    assert torch.equal(logits_of(copy.deepcopy(model), tokens()), logits_of(model, tokens()))


def test_layers_that_happen_to_be_alike(calibration, tmp_path):
    """Configurations of Llama and Gemma refuse 6 heads at hidden size 64 for the whole model."""
    result = pruned("llama", calibration, amplitude=0.0, sparsity=0.3)
    assert {widths["num_attention_heads"] for widths in result.widths_after} == {6}
    result.save(tmp_path / "alike")
    expected = logits_of(result.model, tokens())
    assert torch.equal(logits_of(reload(tmp_path / "alike"), tokens()), expected)


def test_tied_embeddings_are_written_once(calibration, tmp_path):
    model = build("llama", torch.float32, tie_word_embeddings=True)
    result = prune(model, sparsity=0.3, calibration=calibration, steps=2, tuning_steps=1)
    result.save(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    loaded = reload(tmp_path / "tied")
    assert find_anatomy(loaded).total_parameters == result.after.total
    assert torch.equal(logits_of(loaded, tokens()), logits_of(model, tokens()))


def test_shards(llama_result, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_SIZE", "60KB")
    directory = llama_result.save(tmp_path / "shards")
    assert len(list(directory.glob("*.safetensors"))) > 3
    assert (directory / "model.safetensors.index.json").is_file()
    assert not list(directory.glob("*.bin"))
    loaded = reload(directory)
    assert torch.equal(logits_of(loaded, tokens()), logits_of(llama_result.model, tokens()))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(llama_checkpoint, llama_result, device_map):
    loaded = reload(llama_checkpoint, device_map=device_map)
    assert torch.equal(logits_of(loaded, tokens()), logits_of(llama_result.model, tokens()))


def test_loads_in_half_precision(llama_checkpoint):
    loaded = reload(llama_checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert logits_of(loaded, tokens()).isfinite().all()


def test_compile(llama_checkpoint):
    model = reload(llama_checkpoint)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits_of(compiled, tokens()), logits_of(model, tokens()))


def test_attention_implementation_can_be_changed(llama_checkpoint):
    model = reload(llama_checkpoint)
    expected = logits_of(model, tokens())
    model.set_attn_implementation("eager")
    found = logits_of(model, tokens())
    assert not torch.equal(found, expected)  # other kernels round otherwise
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft 0.21
def test_lora_trains_and_merges(llama_checkpoint, tmp_path):
    model = reload(llama_checkpoint)
    dense = copy.deepcopy(model)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.1)
    for _ in range(2):  # the first step moves B away from zero, the second A too
        optimizer.zero_grad()
        adapted(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    expected = logits_of(adapted, tokens())
    assert not torch.allclose(expected, logits_of(dense, tokens()), atol=0.1)
    merged = adapted.merge_and_unload().eval()
    torch.testing.assert_close(logits_of(merged, tokens()), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits_of(reload(tmp_path), tokens()), logits_of(merged, tokens()))


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "olmo2"])
def test_pruned_model_is_pruned_again(readings, calibration, tmp_path, name):
    first = readings["home"] / "plain" / name
    before = read(first / "pruning.json")
    model = load_model(str(first))
    result = prune(model, sparsity=0.05, calibration=calibration, steps=2, tuning_steps=1)
    assert result.before.total == before["after"]["total"]
    assert result.target - 500 < result.after.total <= result.target
    result.save(tmp_path / "again")
    assert torch.equal(logits_of(reload(tmp_path / "again"), tokens()), logits_of(model, tokens()))
    assert read(tmp_path / "again" / "pruning.json")["previous"] == before


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "olmo2", "lfm2"])
def test_replay_repeats_the_cut(calibration, tmp_path, name):
    result = pruned(name, calibration, compensation="none", tuning_steps=0)
    directory = result.save(tmp_path / "cut")
    expected = logits_of(result.model, tokens())
    for record in (directory, directory / "pruning.json", result.record()):
        model = build(name, torch.float32)
        replay(model, record)
        assert torch.equal(logits_of(model, tokens()), expected)


def as_format_1(record):
    """The record as version 1 of the format had it: units that stayed, by layer and kind."""
    (edit,) = record["edits"]
    kinds = {"kv-groups": "attention", "neurons": "mlp"}
    layers = {}
    for name, entry in edit["axes"].items():
        layer, kind = name.split("/")
        if kind in kinds:  # query heads went with their groups
            layers.setdefault(layer, {})[kinds[kind]] = entry
    rest = {key: value for key, value in record.items() if key not in ("edits", "format")}
    return {"format": 1, **rest, "layers": layers}


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "lfm2"])
def test_replay_reads_records_of_format_1(calibration, tmp_path, name):
    result = pruned(name, calibration, compensation="none", tuning_steps=0)
    file = tmp_path / "pruning.json"
    file.write_text(json.dumps(as_format_1(result.record())), encoding="utf-8")
    model = build(name, torch.float32)
    replay(model, file)
    assert torch.equal(logits_of(model, tokens()), logits_of(result.model, tokens()))


def test_replay_refuses_another_model(llama_checkpoint):
    with pytest.raises(LoadingError, match=r"another model: .* has 64 units here"):
        replay(build("llama", intermediate_size=64), llama_checkpoint)


class TestPortable:
    """A portable checkpoint read by this package itself."""

    @pytest.fixture
    def portable(self, readings) -> Path:
        return readings["home"] / "portable" / "llama"

    def test_imports_what_is_private_in_transformers_only_where_it_must(self, readings):
        place = readings["home"] / "portable"
        texts = {file.parent.name: file.read_text() for file in place.glob("*/modeling_*.py")}
        needing = {name for name, text in texts.items() if "conversion_mapping" in text}
        assert needing == {"gpt_neox"}

    def test_loads_with_the_package_imported(self, portable, readings):
        for trust in (True, False):
            loaded = reload(portable, trust_remote_code=trust)
            expected = readings["portable"].expected["llama"]["logits"]
            assert torch.equal(outputs(loaded)["logits"], expected)
            assert type(loaded).__name__ == "LlamaForCausalLM"
            assert type(loaded).__module__.endswith(".modeling_pruned") == trust

    @pytest.mark.parametrize(("trust", "again"), [(False, False), (True, False), (True, True)])
    def test_pruned_again(self, portable, calibration, tmp_path, trust, again):
        model = load_model(str(portable), trust_remote_code=trust)
        result = prune(model, sparsity=0.2, calibration=calibration, steps=2, tuning_steps=1)
        directory = result.save(tmp_path / "again", portable=again)
        config = read(directory / "config.json")
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert ("auto_map" in config) == again
        assert {file.name for file in directory.glob("*.py")} == (
            {"modeling_pruned.py"} if again else set()
        )
        if again:
            reading = Reading(expected={"again": outputs(model)})
            reading.run(tmp_path, "without", "trust").check("again")
        else:
            assert torch.equal(logits_of(reload(directory), tokens()), logits_of(model, tokens()))


def test_half_precision_stays_on_disk(cli, llama, tokenizer, text_file, tmp_path):
    """On the CPU it is scored in float32, yet written as it came."""
    build("llama", torch.bfloat16).save_pretrained(tmp_path / "bf16")
    tokenizer.save_pretrained(tmp_path / "bf16")
    assert load_model(str(tmp_path / "bf16")).dtype == torch.float32
    done = cli(
        "prune", tmp_path / "bf16", "-o", tmp_path / "out", "--sparsity", 0.3, "--steps", 2,
        "--windows", 8, "--window-length", 12, "--calibration", text_file,
    )  # fmt: skip
    assert done.status == 0, done.err
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert read(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"
    assert reload(tmp_path / "out").dtype == torch.bfloat16


def test_command_line_measures_what_it_writes(tokenizer, text_file, tmp_path):
    """Rotary frequencies, which no file holds, must not lose precision when weights do."""
    from adapt_pruner.methods import make_settings
    from adapt_pruner.run import Request, run_pruning

    build("llama", torch.bfloat16).save_pretrained(tmp_path / "bf16")
    tokenizer.save_pretrained(tmp_path / "bf16")
    settings = make_settings(
        windows=4, window_length=12, steps=1, tuning_steps=1, calibration=str(text_file)
    )
    result = run_pruning(Request(str(tmp_path / "bf16"), settings, sparsity=0.3), tmp_path / "out")
    expected = logits_of(reload(tmp_path / "out"), tokens(length=48))
    assert torch.equal(logits_of(result.model, tokens(length=48)), expected)


def test_vocabulary_is_that_of_the_fixtures(tokenizer):
    assert len(tokenizer) <= VOCAB_SIZE
