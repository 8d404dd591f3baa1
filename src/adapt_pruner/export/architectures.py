"""How llama.cpp calls the supported architectures: data, not code paths.

A row says under which name a GGUF file holds a model type, and in what its tensors differ from
those of transformers. Names of tensors come from the `gguf` package. Every row here was compared
with transformers in llama.cpp itself (tests/test_export_engine.py); a further one is one more row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class GgufArchitecture:
    """One architecture of llama.cpp."""

    name: str
    """Value of `general.architecture`, and prefix of the keys."""
    interleaved: bool = False
    """Whether RoPE turns neighbouring entries of a head instead of its two halves: rows of the
    query and key projections are then written in that order."""
    norm_offset: float = 0.0
    """Added to the weights of RMS norms (Gemma stores the difference from 1)."""
    activation: str = "silu"
    """The activation function that llama.cpp uses, as `hidden_act` names it."""
    window_every: int | None = None
    """Every so many layers one attends to everything and the others to a window; None: no windows
    at all, and the context of a model that has some is cut to them."""
    per_layer: str | None = None
    """Row of PER_LAYER that holds such a model when its layers differ in width."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Further keys of the file -> attributes of the configuration, written where they are set."""
    fused_qkv: bool = False
    """Whether query, key and value projections are one tensor."""
    biases: tuple[str, ...] = ()
    """Linears that may have a bias, by their names in transformers."""
    must_be_tied: bool = False
    """Whether the head is always the embedding matrix."""


_QKV = ("q_proj", "k_proj", "v_proj")
_ALL = (*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj")


def _llama() -> GgufArchitecture:
    return GgufArchitecture("llama", interleaved=True, per_layer="deci", biases=_ALL)


_GEMMA = {"norm_offset": 1.0, "activation": "gelu_pytorch_tanh"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}

GGUF_ARCHITECTURES: dict[str, GgufArchitecture] = {
    "llama": _llama(),
    "mistral": _llama(),
    "qwen2": GgufArchitecture("qwen2", per_layer="deci", biases=_QKV),
    "qwen3": GgufArchitecture("qwen3", per_layer="openelm"),
    "gemma": GgufArchitecture("gemma", **_GEMMA),
    "gemma2": GgufArchitecture("gemma2", window_every=2, keys={**_WINDOW, **_CAPS}, **_GEMMA),
    "gemma3_text": GgufArchitecture("gemma3", window_every=6, keys={**_WINDOW, **_CAPS}, **_GEMMA),
    "phi": GgufArchitecture(
        "phi2",
        activation="gelu_new",
        biases=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head"),
    ),
    "phi3": GgufArchitecture("phi3"),
    "olmo2": GgufArchitecture("olmo2"),
    "olmo3": GgufArchitecture("olmo2", window_every=4, keys=_WINDOW),
    "smollm3": GgufArchitecture("smollm3", interleaved=True),
    "granite": GgufArchitecture(
        "granite",
        interleaved=True,
        keys={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    "starcoder2": GgufArchitecture(
        "starcoder2",
        activation="gelu_pytorch_tanh",
        biases=(*_QKV, "o_proj", "c_fc", "c_proj"),
    ),
    "cohere2": GgufArchitecture(
        "cohere2", window_every=4, keys={**_WINDOW, "logit_scale": "logit_scale"}
    ),
    "glm4": GgufArchitecture("glm4", biases=_QKV),
    "nemotron": GgufArchitecture("nemotron", norm_offset=1.0, activation="relu2"),
    "seed_oss": GgufArchitecture("seed_oss", biases=_QKV),
}

PER_LAYER: dict[str, GgufArchitecture] = {
    "deci": GgufArchitecture("deci", interleaved=True, biases=_ALL),
    "openelm": GgufArchitecture("openelm", fused_qkv=True, must_be_tied=True),
}
"""Architectures of llama.cpp whose layers may differ in heads, KV heads and MLP width."""
