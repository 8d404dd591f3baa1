"""GGUF files as models for every command, and files that are none."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from adapt_pruner import export_gguf, load_model, load_tokenizer
from adapt_pruner.errors import LoadingError
from adapt_pruner.model.gguf_input import read_header
from gguf_models import BARE, VOCABULARY, byte_tokenizer
from picomodels import build, logits_of, random_tokens


@pytest.fixture(scope="module")
def model():
    return build("llama", torch.float32, vocab_size=VOCABULARY, rms_norm_eps=1e-6, **BARE)


@pytest.fixture(scope="module")
def file(model, tmp_path_factory) -> Path:
    """A tiny model as a GGUF file in float32. Not to be written to."""
    place = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return export_gguf(model, place, "F32", tokenizer=byte_tokenizer()).file


def test_a_file_gives_back_the_model(model, file):
    loaded = load_model(str(file))
    tokens = random_tokens()
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
    assert not hasattr(loaded.config, "quantization_config")
    text = "def f(x): return 12 + x  # naïve"
    assert load_tokenizer(str(file))(text).input_ids == byte_tokenizer()(text).input_ids


def test_digits_are_split_where_the_file_says_smollm(model, tmp_path):
    from tokenizers import pre_tokenizers

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    exported = export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    assert read_header(exported.file).metadata["tokenizer.ggml.pre"] == "smollm"
    read = load_tokenizer(str(exported.file)).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in read.pre_tokenize_str("a 123")] == ["a", "Ġ", "1", "2", "3"]


def test_quantised_files_are_read_as_floats(model, tmp_path):
    exported = export_gguf(model, tmp_path / "q.gguf", "Q8_0", tokenizer=byte_tokenizer())
    loaded = load_model(str(exported.file), dtype="stored")
    assert loaded.dtype == torch.float16
    error = logits_of(loaded.float(), random_tokens()) - logits_of(model, random_tokens())
    assert error.abs().max() < 0.2


def test_commands_take_files(cli, file, text_file, tmp_path):
    outcome = cli("inspect", file)
    assert outcome.status == 0, outcome.err
    outcome = cli("evaluate", file, "--text", text_file, "--cache-dir", tmp_path / "c", "-q")
    assert outcome.status == 0, outcome.err
    options = ("--sparsity", 0.2, "--calibration", text_file, "--windows", 8, "--steps", 1, "-q",
               "--tuning-steps", 1)  # fmt: skip
    outcome = cli("prune", file, "-o", tmp_path / "smaller", *options)
    assert outcome.status == 0, outcome.err
    config = json.loads((tmp_path / "smaller" / "config.json").read_text())
    assert "quantization_config" not in config
    smaller = tmp_path / "smaller.gguf"
    outcome = cli("prune", file, "-o", smaller, "--quantize", "Q8_0", *options)
    assert outcome.status == 0, outcome.err
    assert read_header(smaller).architecture == "deci"
    outcome = cli("prune", file, "-o", file, "--overwrite", *options)
    assert "is the model itself" in outcome.err
    assert "layers of different width" in cli("inspect", smaller).err
    outcome = cli("prune", file, "-o", smaller, "--quantize", "Q8_0", *options)
    assert (outcome.status, "--overwrite" in outcome.err) == (1, True)


def test_hostile_files_get_one_message(cli, file, tmp_path):
    good = file.read_bytes()

    def after(name: bytes, skipped: int, form: str, value: int) -> bytes:
        start = good.index(name) + len(name) + skipped
        return good[:start] + struct.pack(form, value) + good[start + struct.calcsize(form) :]

    count = good.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    hostile = {
        "none": b"\x00" * 100,
        "empty": b"",
        "short": good[:30],
        "in the header": good[: len(good) // 50],
        "in the tensors": good[: len(good) * 9 // 10],
        "tensors": good[:8] + struct.pack("<Q", 2**60) + good[16:],
        "keys": good[:16] + struct.pack("<Q", 2**60) + good[24:],
        "length of a key": good[:24] + struct.pack("<Q", 2**63 + 5) + good[32:],
        "array": good[:count] + struct.pack("<Q", 2**59) + good[count + 8 :],
        "version": good[:4] + struct.pack("<I", 77) + good[8:],
        "layers without end": after(b"llama.block_count", 4, "<I", 10**9),
        "layers that are left over": after(b"llama.block_count", 4, "<I", 1),
        "heads": after(b"llama.attention.head_count", 4, "<I", 10**8),
        "offset": after(b"token_embd.weight", 4 + 2 * 8 + 4, "<Q", 7),
    }
    for name, content in hostile.items():
        bad = tmp_path / "bad.gguf"
        bad.write_bytes(content)
        for command in (("inspect", bad), ("export", bad, "-o", tmp_path / "x.gguf")):
            outcome = cli(*command)
            assert outcome.status == 1, name
            assert "is no GGUF file that can be read" in outcome.err, (name, outcome.err)
            assert len(outcome.err.strip().splitlines()) == 1, name
    with pytest.raises(LoadingError, match="There is no model file"):
        load_model(str(tmp_path / "nothing.gguf"))
    assert "Traceback" not in cli("inspect", tmp_path / "nothing.gguf").err
