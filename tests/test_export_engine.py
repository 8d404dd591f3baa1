"""What llama.cpp computes from an exported file is what transformers computes from the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapt_pruner import export_gguf
from gguf_models import BARE, UNEQUAL, VOCABULARY, byte_tokenizer
from picomodels import build

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
from llama_cpp import LlamaCpp  # noqa: E402

SAMPLE = (
    "Once upon a time, there were 12,345 things: she's gone, they'll see.\n\n"
    "def f(x):\n\treturn x[0] + 1  # naïve café, über Straße\n   Größe 日本語の文章。한국어 "
    "العربية русский 😀👍🏽 e\u0301 \u00a0 end"
)


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
    "llama, unequal, llama3 rope": ("llama", "deci", {**BARE, **UNEQUAL, "rope_parameters": LLAMA3}),
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
    "qwen3, unequal, tied": ("qwen3", "openelm", {**FULL, **TIED, "attention_bias": False, **UNEQUAL}),
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
    "phi3": ("phi3", "phi3", {"sliding_window": None}),
    "olmo2": ("olmo2", "olmo2", {"attention_bias": False}),
    "smollm3": (
        "smollm3", "smollm3",
        {**BARE, **FULL, "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4,
         "no_rope_layers": [1, 1, 1, 0]},
    ),
    "granite": ("granite", "granite", BARE),
    "seed_oss": ("seed_oss", "seed_oss", {"attention_out_bias": False, "mlp_bias": False}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_gives_the_logits_of_transformers(case, tmp_path):
    model_type, architecture, overrides = CASES[case]
    model = build(model_type, torch.float32, vocab_size=VOCABULARY, rms_norm_eps=1e-6, **overrides)
    exported = export_gguf(model, tmp_path / "model.gguf", "F32", tokenizer=byte_tokenizer())
    assert exported.architecture == architecture
    tokens = list(range(3, 40))
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    with LlamaCpp(exported.file, context=64) as engine:
        found = engine.logits(tokens)
    assert_same(found, expected)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Within 0.3 % of the standard deviation everywhere: llama.cpp looks GELU up in a table."""
    error = float(np.abs(found - expected).max() / expected.std())
    assert error < 3e-3
    assert (found.argmax(-1) == expected.argmax(-1)).all()
