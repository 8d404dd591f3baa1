"""What llama.cpp computes from an exported file is what transformers computes from the model."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapt_pruner import export_gguf, load_model, load_tokenizer
from adapt_pruner.export.gguf_file import export_weights
from adapt_pruner.export.quantise import FILE_TYPES, T, encode
from adapt_pruner.export.weights import weights_of
from gguf_models import BARE, UNEQUAL, VOCABULARY, byte_tokenizer
from picomodels import build

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
from llama_cpp import LlamaCpp, quantise_chunk

SHARED = Path(__file__).parents[2] / "shared" / "data"

SAMPLE = (
    "Once upon a time, there were 12,345 things: she's gone, they'll see.\n\n"
    "def f(x):\n\treturn x[0] + 1  # naïve café, über Straße\n   Größe 日本語の文章。한국어 "
    "العربية русский 😀👍🏽 e\u0301 \u00a0 end"
)

PIECES = [
    *(
        "Once",
        " upon",
        "the",
        " 3.14",
        "1234567890",
        "naïve",
        " café",
        "Größe",
        "Straße",
        "e\u0301",
    ),
    *(
        "def f(x):",
        "\treturn",
        "x[0] += 1",
        "    if a != b:",
        "// --",
        "->",
        "::",
        "{}",
        "\"'`",
        "\\n",
    ),
    *(
        "日本語",
        "한국어",
        "中文。",
        "العربية",
        "русский",
        "हिन्दी",
        "😀",
        "👍🏽",
        "👨‍👩‍👧",
        "\u200b",
    ),
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\u00a0", ".", ",", "'s", "'LL", "!?", "_"),
]


def mixed_lines(count: int) -> list[str]:
    """Random lines of code, accents, scripts, emoji and spaces, up to 12 pieces of them each."""
    dice = random.Random(0)
    return ["".join(dice.choices(PIECES, k=dice.randint(0, 12))) for _ in range(count)]


MIXED = mixed_lines(1000)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
FULL = {"use_sliding_window": False, "layer_types": ["full_attention"] * 3}
EVERY_FOURTH = {
    "num_hidden_layers": 4,
    "layer_types": [*["sliding_attention"] * 3, "full_attention"],
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {**BARE, **UNTIED}),
    "llama, tied": ("llama", "llama", {**BARE, **TIED}),
    "llama, llama3 rope": ("llama", "llama", {**BARE, "rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", "llama", {**BARE, "rope_parameters": YARN}),
    "llama, linear rope": ("llama", "llama", {**BARE, "rope_parameters": LINEAR}),
    "llama, biases": ("llama", "llama", {}),
    "llama, unequal": ("llama", "deci", {**BARE, **UNEQUAL, **UNTIED}),
    "llama, unequal, biases": ("llama", "deci", UNEQUAL),
    "llama, unequal, llama3": ("llama", "deci", {**BARE, **UNEQUAL, "rope_parameters": LLAMA3}),
    "mistral": ("mistral", "llama", {"sliding_window": None}),
    "mistral, unequal, tied": ("mistral", "deci", {"sliding_window": None, **UNEQUAL, **TIED}),
    "qwen2": ("qwen2", "qwen2", FULL),
    "qwen2, tied, yarn": ("qwen2", "qwen2", {**FULL, **TIED, "rope_parameters": YARN}),
    "qwen2, fewer heads": (
        "qwen2", "deci",
        {**FULL, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "qwen2, unequal": ("qwen2", "deci", {**FULL, "head_dim": 8, **UNEQUAL}),
    "qwen3": ("qwen3", "qwen3", {**FULL, "attention_bias": False}),
    "qwen3, unequal, tied": (
        "qwen3", "openelm",
        {**FULL, **TIED, "attention_bias": False, **UNEQUAL},
    ),
    "gemma": ("gemma", "gemma", {"attention_bias": False}),
    "gemma2": (
        "gemma2", "gemma2",
        {"attention_bias": False, "layer_types": ["sliding_attention", "full_attention"] * 2,
         "num_hidden_layers": 4},
    ),
    "gemma3": (
        "gemma3_text", "gemma3",
        {"attention_bias": False, "num_hidden_layers": 7,
         "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]},
    ),
    "phi": ("phi", "phi2", {}),
    "phi3": ("phi3", "phi3", {"sliding_window": None}),
    "olmo2": ("olmo2", "olmo2", {"attention_bias": False}),
    "smollm3": (
        "smollm3", "smollm3",
        {**BARE, **FULL, "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4,
         "no_rope_layers": [1, 1, 1, 0]},
    ),
    "granite": ("granite", "granite", BARE),
    "olmo3": ("olmo3", "olmo2", {"attention_bias": False, **EVERY_FOURTH}),
    "starcoder2": ("starcoder2", "starcoder2", {"sliding_window": None}),
    "cohere2": ("cohere2", "cohere2", {"attention_bias": False, **EVERY_FOURTH}),
    "glm4": ("glm4", "glm4", {}),
    "nemotron": ("nemotron", "nemotron", BARE),
    "seed_oss": ("seed_oss", "seed_oss", {"attention_out_bias": False, "mlp_bias": False}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_gives_the_logits_of_transformers(case, tmp_path):
    model_type, architecture, overrides = CASES[case]
    model = build(model_type, torch.float32, vocab_size=VOCABULARY, rms_norm_eps=1e-6, **overrides)
    exported = export_gguf(model, tmp_path / "model.gguf", "F32", tokenizer=byte_tokenizer())
    assert exported.architecture == architecture
    compare(model, exported.file)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Within 0.3 % of the standard deviation everywhere: llama.cpp looks GELU up in a table."""
    error = float(np.abs(found - expected).max() / expected.std())
    assert error < 3e-3
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize(
    "skipped",
    [
        {1: ["self_attn"]},
        {2: ["mlp"]},
        {0: ["self_attn"], 1: ["mlp"]},
        {1: ["self_attn", "mlp"]},
        {2: ["self_attn", "mlp"]},
    ],
)
def test_skipped_sublayers(skipped, tmp_path):
    """A layer without attention, without MLP, or without either, as its tensors tell."""
    model = build("llama", torch.float32, vocab_size=VOCABULARY, rms_norm_eps=1e-6, **BARE)
    weights = weights_of(silence(model, skipped))
    gone = tuple(f"model.layers.{i}.{name}." for i, names in skipped.items() for name in names)
    kept = {name: shape for name, shape in weights.shapes.items() if not name.startswith(gone)}
    file = tmp_path / "model.gguf"
    exported = export_weights(replace(weights, shapes=kept), byte_tokenizer(), file, "F32")
    whole = [index for index, names in skipped.items() if len(names) == 2]
    assert len(exported.notes) == len(whole)
    assert exported.architecture == ("llama" if whole else "deci")
    compare(model, file)


def silence(model, skipped: dict[int, list[str]]):
    """The same function without removing anything: a sublayer whose output is zero."""
    with torch.no_grad():
        for index, names in skipped.items():
            layer = model.model.layers[index]
            if "self_attn" in names:
                layer.self_attn.o_proj.weight.zero_()
            if "mlp" in names:
                layer.mlp.down_proj.weight.zero_()
    return model


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q6_K", "Q4_K_M"])
def test_types_come_near(kind, tmp_path):
    sides = {"hidden_size": 256, "head_dim": 32, "num_hidden_layers": 2, "intermediate_size": 273}
    model = build("llama", torch.float32, vocab_size=VOCABULARY, rms_norm_eps=1e-6, **BARE, **sides)
    exported = export_gguf(model, tmp_path / "m.gguf", kind, tokenizer=byte_tokenizer())
    found, expected = both_logits(model, exported.file)
    error = np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
    assert error < {"F16": 2e-3, "BF16": 2e-2, "Q8_0": 0.05, "Q6_K": 0.12}.get(kind, 0.5)


def test_quantised_values_are_llama_cpps_own():
    """The quantiser gives the very bytes that llama.cpp's does, of every type."""
    rows = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    types = {kind.base for kind in FILE_TYPES.values()} - {T.F32, T.F16, T.BF16}
    for kind in sorted(types):
        ours = encode(torch.from_numpy(rows), kind)
        assert ours.tobytes() == quantise_chunk(int(kind), rows, ours.nbytes), kind.name


def both_logits(model, file: Path) -> tuple[np.ndarray, np.ndarray]:
    tokens = list(range(3, 40))
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    with LlamaCpp(file, context=64) as engine:
        return engine.logits(tokens), expected


def compare(model, file: Path) -> None:
    assert_same(*both_logits(model, file))


@pytest.mark.parametrize("name", ["demo", "stories260K", "testbed"])
def test_a_real_model_and_its_tokenizer(name, tmp_path):
    """The same ids of mixed text, the same logits, in float32 and float16."""
    directory = name if name == "demo" else str(SHARED / name)
    if name != "demo" and not Path(directory).is_dir():
        pytest.skip(f"{directory} is not here")
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    ids = tokenizer(SAMPLE).input_ids
    for kind in ("F32", "F16"):
        exported = export_gguf(directory, tmp_path / f"{kind}.gguf", kind)
        with LlamaCpp(exported.file) as engine:
            for line in [SAMPLE, *SAMPLE.splitlines(), *MIXED]:
                assert engine.tokens(line) == tokenizer(line).input_ids, line
            found = engine.logits(ids)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        assert (found.argmax(-1) == expected.argmax(-1)).all()
        assert np.abs(found - expected).max() < (1e-3 if kind == "F32" else 1e-2) * expected.std()


def test_run_says_the_same_through_both_engines(cli, tmp_path):
    file = tmp_path / "demo.gguf"
    assert cli("export", "demo", "-o", file, "--quantize", "F32", "-q").out == ""
    prompt = "The for statement is used to"
    ours = cli("run", "demo", prompt, "--tokens", 12)
    theirs = cli("run", file, prompt, "--tokens", 12)
    assert theirs.status == 0, theirs.err
    assert theirs.out == ours.out
    assert theirs.err == ""
    assert "no chat template" in cli("run", file, prompt, "--chat").err
    assert "There is no model file" in cli("run", tmp_path / "none.gguf", prompt).err
