"""Files written for llama.cpp: what is in them, and what is refused. Needs no engine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapt_pruner import AdaptPrunerError, export_gguf, prune
from adapt_pruner.errors import InvalidSettings, UnsupportedModel, WritingError
from adapt_pruner.export import GgufCommands
from adapt_pruner.export.quantise import FILE_TYPES
from adapt_pruner.export.tensors import interleave
from adapt_pruner.model.gguf_input import read_header
from adapt_pruner.model.pretokenizers import PRE_TOKENIZERS, named, recognise
from gguf_models import BARE, UNEQUAL, VOCABULARY, byte_tokenizer
from picomodels import build


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def small(model_type="llama", **overrides):
    return build(model_type, torch.float32, vocab_size=VOCABULARY, **{**BARE, **overrides})


def test_interleave_pairs_the_halves_of_every_head():
    rows = torch.arange(8)  # two heads of four
    assert interleave(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_metadata_is_complete(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ messages[0].content }}"
    try:
        model = small(tie_word_embeddings=True, rms_norm_eps=1e-6)
        exported = export_gguf(model, tmp_path / "tiny.gguf", tokenizer=tokenizer, name="Tiny")
    finally:
        tokenizer.chat_template = None
    said = read_header(exported.file).metadata
    assert said["general.name"] == "Tiny"
    assert said["llama.context_length"] == 64
    assert said["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert said["llama.rope.freq_base"] == 10_000
    assert said["llama.attention.head_count"] == 8
    assert said["llama.attention.head_count_kv"] == 4
    assert said["tokenizer.ggml.model"] == "gpt2"
    assert said["tokenizer.ggml.pre"] == "gpt-2"
    assert said["tokenizer.ggml.merges"] == ["t h"]
    assert said["tokenizer.ggml.bos_token_id"] == 1
    assert said["tokenizer.ggml.add_bos_token"] is False
    assert said["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert len(said["tokenizer.ggml.tokens"]) == VOCABULARY
    names = {tensor.name for tensor in read_header(exported.file).tensors}
    assert "output.weight" not in names  # tied
    assert "llama-cli" in exported.commands.llama_cpp[0]


def test_a_directory_gives_the_file_that_its_model_gives(tmp_path, tokenizer):
    directory = tmp_path / "model"
    model = small()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    card = "---\nlicense: apache-2.0\nlanguage: [en]\n---\n# A model\n"
    (directory / "README.md").write_text(card)
    read = export_gguf(directory, tmp_path / "read.gguf")
    held = export_gguf(model, tmp_path / "held.gguf", tokenizer=tokenizer, name="model")
    said = read_header(read.file).metadata
    assert said.pop("general.license") == "apache-2.0"
    assert said.pop("general.languages") == ["en"]
    assert said == read_header(held.file).metadata
    for one, other in zip(_tensors(read.file), _tensors(held.file), strict=True):
        assert one.name == other.name
        assert np.array_equal(one.data, other.data)


def _tensors(file):
    return gguf.GGUFReader(file).tensors


def test_unequal_layers_are_arrays(tokenizer, tmp_path):
    exported = export_gguf(small(**UNEQUAL), tmp_path / "u.gguf", tokenizer=tokenizer)
    said = read_header(exported.file).metadata
    assert said["general.architecture"] == "deci"
    assert said["deci.attention.head_count"] == [8, 4, 6]
    assert said["deci.attention.head_count_kv"] == [4, 2, 3]
    assert said["deci.feed_forward_length"] == [96, 40, 17]


def test_a_pruned_model_in_memory(calibration, tokenizer, tmp_path):
    model = build("llama", torch.float32, **BARE)
    result = prune(model, None, sparsity=0.3, calibration=calibration, tuning_steps=1)
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    exported = export_gguf(result, tmp_path / "p.gguf", "Q8_0", tokenizer=tokenizer)
    assert exported.architecture == "deci"


def test_quantised_files_say_what_falls_back(tokenizer, tmp_path):
    model = small(intermediate_size=256)
    exported = export_gguf(model, tmp_path / "q.gguf", "Q4_K_M", tokenizer=tokenizer)
    stored = {t.name: t.tensor_type.name for t in _tensors(exported.file)}
    assert stored["blk.1.ffn_down.weight"] == "Q6_K" or stored["blk.0.ffn_down.weight"] == "Q4_K"
    assert stored["blk.0.ffn_up.weight"] == "Q5_0"  # rows of 64
    assert stored["blk.0.attn_norm.weight"] == "F32"
    fallen = {one.tensor: one for one in exported.fallbacks}
    assert fallen["blk.0.ffn_up.weight"].wanted == "Q4_K"
    assert fallen["blk.0.ffn_up.weight"].row_length == 64


def test_neurons_of_zeros_fill_blocks(tokenizer, tmp_path):
    model = small(**UNEQUAL)
    exported = export_gguf(model, tmp_path / "q.gguf", "Q8_0", tokenizer=tokenizer)
    assert read_header(exported.file).metadata["deci.feed_forward_length"] == [96, 64, 32]
    down = next(t for t in _tensors(exported.file) if t.name == "blk.2.ffn_down.weight")
    values = gguf.quants.dequantize(down.data, down.tensor_type)
    assert np.abs(values[:, 17:]).max() == 0
    assert np.abs(values[:, 16]).max() > 0
    assert any("neurons of zeros" in note for note in exported.notes)


@pytest.mark.parametrize("name", FILE_TYPES)
def test_size_is_what_the_types_say(name, tokenizer, tmp_path):
    model = small(hidden_size=256, head_dim=32, intermediate_size=256, num_hidden_layers=2)
    exported = export_gguf(model, tmp_path / "q.gguf", name.lower(), tokenizer=tokenizer)
    data = sum(t.n_bytes for t in _tensors(exported.file))
    assert data < exported.num_bytes < data + 20_000


# What cannot be written


def test_q_k_norms_with_unequal_layers_name_the_way_out(tokenizer, tmp_path):
    model = build(
        "qwen3", torch.float32, vocab_size=VOCABULARY, attention_bias=False,
        tie_word_embeddings=False, **UNEQUAL,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="--layout uniform"):
        export_gguf(model, tmp_path / "q.gguf", tokenizer=tokenizer)
    model = build("gemma2", torch.float32, vocab_size=VOCABULARY, attention_bias=False, **UNEQUAL)
    with pytest.raises(UnsupportedModel, match="--layout uniform"):
        export_gguf(model, tmp_path / "q.gguf", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_other_models_and_scalings_are_refused(tokenizer, tmp_path):
    for model, words in (
        (build("gpt_neox", torch.float32, vocab_size=VOCABULARY), "gpt_neox"),
        (small(hidden_act="relu"), "relu"),
        (build("gemma2", torch.float32, vocab_size=VOCABULARY), "no bias of"),
        (
            small(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "dynamic",
        ),
    ):
        with pytest.raises(UnsupportedModel, match=words):
            export_gguf(model, tmp_path / "q.gguf", tokenizer=tokenizer)


def test_a_tokenizer_that_gguf_cannot_express(tmp_path):
    word_level = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    split = byte_tokenizer()
    split.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{2}"), "isolated"),
            pre_tokenizers.ByteLevel(use_regex=False, add_prefix_space=False),
        ]
    )
    lower = byte_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    for tokenizer in (PreTrainedTokenizerFast(tokenizer_object=word_level), split, lower):
        with pytest.raises(UnsupportedModel, match="GGUF cannot express"):
            export_gguf(small(), tmp_path / "q.gguf", tokenizer=tokenizer)
    big = byte_tokenizer()
    with pytest.raises(UnsupportedModel, match="128 rows"):
        export_gguf(build("llama", torch.float32, **BARE), tmp_path / "q.gguf", tokenizer=big)
    assert not list(tmp_path.iterdir())


def test_unknown_quantisation_gets_the_nearest(cli, tmp_path):
    outcome = cli("export", "demo", "-o", tmp_path / "m.gguf", "--quantize", "Q4_KM")
    assert outcome.status == 1
    assert "Did you mean 'Q4_K_M'" in outcome.err
    with pytest.raises(InvalidSettings):
        export_gguf("demo", tmp_path / "m.gguf", "int4")


def test_bad_places_and_models(cli, tmp_path):
    for arguments, words in (
        (("nowhere.gguf",), "There is no model file"),
        (("./nowhere",), "There is no model directory"),
    ):
        outcome = cli("export", *arguments, "-o", tmp_path / "m.gguf")
        assert (outcome.status, words in outcome.err) == (1, True), outcome.err
    outcome = cli("export", "demo", "-o", tmp_path / "m.bin")
    assert "ends in .gguf" in outcome.err
    note = tmp_path / "note.gguf"
    note.write_text("my notes")
    assert "exists" in cli("export", "demo", "-o", note).err
    assert "not a GGUF file" in cli("export", "demo", "-o", note, "--overwrite").err
    assert note.read_text() == "my notes"
    outcome = cli("prune", "demo", "-o", tmp_path / "x", "--sparsity", 0.2, "--quantize", "Q8_0")
    assert "-o smaller.gguf" in outcome.err


def test_overwrite_replaces_a_file_whole(cli, tmp_path):
    file = tmp_path / "m.gguf"
    assert cli("export", "demo", "-o", file).status == 0
    first = file.stat().st_size
    outcome = cli("export", "demo", "-o", file, "--overwrite", "--quantize", "Q8_0")
    assert outcome.status == 0, outcome.err
    assert file.stat().st_size < first
    assert "llama-server" in outcome.out
    assert "ollama create" in outcome.out
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_commands_take_any_name_of_a_file():
    commands = GgufCommands(Path("/models/My model (2).gguf"))
    assert commands.ollama == [
        "echo 'FROM /models/My model (2).gguf' > my-model-2.Modelfile",
        "ollama create my-model-2 -f my-model-2.Modelfile",
        "ollama run my-model-2",
    ]
    assert commands.lm_studio == ["lms import --copy '/models/My model (2).gguf'"]
    assert list(commands.by_engine()) == ["first look", "llama.cpp", "Ollama", "LM Studio"]


def test_a_full_disk_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    def full(self, tensor, *rest):
        raise OSError(28, "No space left on device")

    file = tmp_path / "m.gguf"
    export_gguf(small(), file, tokenizer=tokenizer)
    before = file.read_bytes()
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(WritingError, match="the disk is full"):
        export_gguf(small(), file, "F32", tokenizer=tokenizer, overwrite=True)
    assert os.listdir(tmp_path) == ["m.gguf"]
    assert file.read_bytes() == before


# Ways to split text


@pytest.mark.parametrize("known", PRE_TOKENIZERS, ids=lambda known: known.name)
def test_every_way_to_split_is_recognised_as_tokenizers_writes_it(known):
    steps = {"type": "Sequence", "pretokenizers": known.steps()}
    backend = Tokenizer(models.BPE({"a": 0}, []))
    form = json.loads(backend.to_str())
    form["pre_tokenizer"] = steps
    written = json.loads(Tokenizer.from_str(json.dumps(form)).to_str())["pre_tokenizer"]
    assert recognise(written, known.ignore_merges) is known
    assert named(known.name) is known


def test_splits_are_those_that_transformers_knows():
    """The same names have the same patterns in transformers, where it has them."""
    splits = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    theirs = splits.GGUF_PRE_TOKENIZER_SPLITS
    ours = {known.name: known.pattern for known in PRE_TOKENIZERS if known.pattern}
    assert {name: theirs.get(name) for name in ours} == ours


def test_errors_are_meant_for_users():
    assert issubclass(UnsupportedModel, AdaptPrunerError)
