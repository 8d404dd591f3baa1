"""A saved model is, for whoever loads it, the model that was in memory."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from adapt_pruner import PruningResult, checkpoint, find_anatomy, load_model, prune, replay
from adapt_pruner.errors import LoadingError
from adapt_pruner.model.architectures import ARCHITECTURES
from adapt_pruner.report import pictures
from picomodels import INTERMEDIATE_SIZE, NUM_HEADS, PICO, VOCAB_SIZE, build, logits_of
from picomodels import random_tokens as tokens
from reload_checkpoints import outputs

READER = Path(__file__).with_name("reload_checkpoints.py")
NOTICES = {
    "plain": ("xIELU", "causal_conv1d"),  # optional kernels, which dense models look for as well
    "uniform": ("xIELU", "causal_conv1d"),
    "portable": ("xIELU", "causal_conv1d", "Reading global config value"),  # before our code runs
}
"""Notices of transformers that are none of our doing."""


def pruned(model_type: str, calibration, dtype=torch.float32, **overrides) -> PruningResult:
    """A model whose layers lost different numbers of KV groups and neurons."""
    settings = {"allocation": "adaptive", "steps": 4, "amplitude": 0.05, "sparsity": 0.3}
    return prune(build(model_type, dtype), calibration=calibration, **{**settings, **overrides})


def reload(directory: Path, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def read(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


@dataclass
class Reading:
    """What a process of its own got out of checkpoints, and what the models in memory gave."""

    expected: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    found: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    messages: str = ""

    def run(self, directory: Path, imported: str, trust: str) -> Reading:
        """Read every checkpoint in `directory` in a new process."""
        result = directory / "result.safetensors"
        names = [str(directory / name) for name in self.expected]
        cache = str(directory / "home")  # remote code is copied there
        environment = {**os.environ, "HF_HOME": cache, "PYTHONWARNINGS": "default"}
        done = subprocess.run(
            [sys.executable, str(READER), imported, trust, str(result), *names],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.messages = done.stdout + done.stderr
        for key, value in load_file(result).items():
            name, output = key.rsplit(".", 1)
            self.found.setdefault(name, {})[output] = value
        return self

    def check(self, name: str) -> None:
        for output, expected in self.expected[name].items():
            assert torch.equal(self.found[name][output], expected), output


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures take longer than all the rest of a tiny run."""
    monkeypatch.setattr(pictures, "draw_all", lambda directory, result: {})


@pytest.fixture(scope="module")
def readings(calibration, tmp_path_factory) -> dict[str, Any]:
    """Models of all architectures, read back as plain, portable and uniform checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw_all", lambda directory, result: {})
        return write_and_read(calibration, tmp_path_factory.mktemp("checkpoints"))


def write_and_read(calibration, home: Path) -> dict[str, Any]:
    plain, portable, uniform = Reading(), Reading(), Reading()
    for name in PICO:
        result = pruned(name, calibration)
        result.save(home / "plain" / name)
        plain.expected[name] = outputs(result.model)
        result.save(home / "portable" / name, portable=True)
        portable.expected[name] = plain.expected[name]
        result = pruned(name, calibration, layout="uniform")
        result.save(home / "uniform" / name, portable=True)
        uniform.expected[name] = outputs(result.model)
    return {
        "plain": plain.run(home / "plain", "with", "plain"),
        "portable": portable.run(home / "portable", "without", "trust"),
        "uniform": uniform.run(home / "uniform", "without", "plain"),
        "home": home,
    }


@pytest.fixture(scope="module")
def llama_result(calibration, tokenizer) -> PruningResult:
    """A pruned Llama with its tokenizer. Not to be changed."""
    result = pruned("llama", calibration)
    result.tokenizer = tokenizer
    return result


@pytest.fixture(scope="module")
def llama_checkpoint(llama_result, tmp_path_factory) -> Path:
    return llama_result.save(tmp_path_factory.mktemp("llama") / "smaller")


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
    assert record["sparsity"] == pytest.approx(0.3, abs=0.01)
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
    assert recipe == {"allocation": "adaptive", "steps": 4, "amplitude": 0.05}


def test_recipe_names_the_text_that_was_read(tokenizer, text_file):
    result = prune(
        build("llama", torch.float32), tokenizer, sparsity=0.1, calibration=text_file,
        windows=4, window_length=12, steps=1,
    )  # fmt: skip
    assert result.record()["settings"]["calibration"] == str(text_file)


def test_tokenizer_comes_along(llama_checkpoint, tokenizer):
    text = "the first of many"
    assert AutoTokenizer.from_pretrained(llama_checkpoint)(text).input_ids == (
        tokenizer(text).input_ids
    )


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


def test_layers_that_happen_to_be_alike(calibration, no_pictures, tmp_path):
    """Configurations of Llama and Gemma refuse 6 heads at hidden size 64 for the whole model."""
    result = pruned("llama", calibration, amplitude=0.0, sparsity=0.3)
    assert {widths["num_attention_heads"] for widths in result.widths_after} == {6}
    result.save(tmp_path / "alike")
    expected = logits_of(result.model, tokens())
    assert torch.equal(logits_of(reload(tmp_path / "alike"), tokens()), expected)


def test_tied_embeddings_are_written_once(calibration, no_pictures, tmp_path):
    model = build("llama", torch.float32, tie_word_embeddings=True)
    result = prune(model, sparsity=0.3, calibration=calibration, steps=2)
    result.save(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    loaded = reload(tmp_path / "tied")
    assert find_anatomy(loaded).total_parameters == result.after.total
    assert torch.equal(logits_of(loaded, tokens()), logits_of(model, tokens()))


def test_shards(llama_result, no_pictures, tmp_path, monkeypatch):
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
def test_lora_trains_and_merges(llama_checkpoint, no_pictures, tmp_path):
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
def test_pruned_model_is_pruned_again(readings, calibration, no_pictures, tmp_path, name):
    first = readings["home"] / "plain" / name
    before = read(first / "pruning.json")
    model = load_model(str(first))
    result = prune(model, sparsity=0.1, calibration=calibration, steps=2)
    assert result.before.total == before["after"]["total"]
    assert result.target - 500 < result.after.total <= result.target
    result.save(tmp_path / "again")
    assert torch.equal(logits_of(reload(tmp_path / "again"), tokens()), logits_of(model, tokens()))
    assert read(tmp_path / "again" / "pruning.json")["previous"] == before


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "olmo2", "lfm2"])
def test_replay_repeats_the_cut(calibration, no_pictures, tmp_path, name):
    result = pruned(name, calibration, compensation="none")
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
    result = pruned(name, calibration, compensation="none")
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
    def test_pruned_again(self, portable, calibration, no_pictures, tmp_path, trust, again):
        model = load_model(str(portable), trust_remote_code=trust)
        result = prune(model, sparsity=0.2, calibration=calibration, steps=2)
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
    settings = make_settings(windows=4, window_length=12, steps=1, calibration=str(text_file))
    result = run_pruning(Request(str(tmp_path / "bf16"), settings, 0.3), tmp_path / "out")
    expected = logits_of(reload(tmp_path / "out"), tokens(length=48))
    assert torch.equal(logits_of(result.model, tokens(length=48)), expected)


def test_vocabulary_is_that_of_the_fixtures(tokenizer):
    assert len(tokenizer) <= VOCAB_SIZE
