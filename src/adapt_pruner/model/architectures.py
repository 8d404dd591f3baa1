"""What the supported architectures look like: data, not code paths.

A row says what the parts of a decoder layer are called and how fused projections are laid out.
Everything else (widths, head counts, biases) is read from the modules themselves, so a further
architecture of this family is one more row.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Names of the parts of one decoder layer, relative to that layer."""

    module: str
    """Folder of the modelling file: `transformers.models.{module}.modeling_{module}`."""
    layer_class: str
    """Class of the decoder layer, called with `(config, layer_idx)`."""
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Linears whose output rows are neurons. One name standing for both is fused: gate, then up."""
    mlp_output: str = "mlp.down_proj"
    """Linear whose input columns are neurons."""
    mlp_blocks: int = 1
    """How many times each neuron occurs in every `mlp_inputs` linear (2: gate and up fused)."""
    attention: str | None = "self_attn"
    """Attention module, or None where attention cannot be pruned through the configuration."""
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Query, key and value projections inside `attention`; a single name is fused: q, then k, v."""
    attention_output: str = "o_proj"
    """Output projection inside `attention`."""
    wide_norms: bool = False
    """Whether `q_norm` and `k_norm` run over all heads at once (their weights are then cut too)."""
    layers: str = "model.layers"
    """Path of the list of decoder layers inside the causal language model."""

    @property
    def modeling_module(self) -> str:
        return f"transformers.models.{self.module}.modeling_{self.module}"


def _llama_like(module: str, prefix: str, **differences) -> Architecture:
    return Architecture(module, f"{prefix}DecoderLayer", **differences)


_FUSED_MLP = {"mlp_inputs": ("mlp.gate_up_proj",), "mlp_blocks": 2}
_UNGATED_MLP = {"mlp_inputs": ("mlp.up_proj",)}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _llama_like("llama", "Llama"),
    "mistral": _llama_like("mistral", "Mistral"),
    "ministral3": _llama_like("ministral3", "Ministral3"),
    "qwen2": _llama_like("qwen2", "Qwen2"),
    "qwen3": _llama_like("qwen3", "Qwen3"),
    "gemma": _llama_like("gemma", "Gemma"),
    "gemma2": _llama_like("gemma2", "Gemma2"),
    "gemma3_text": _llama_like("gemma3", "Gemma3"),
    "phi": _llama_like(
        "phi", "Phi", mlp_inputs=("mlp.fc1",), mlp_output="mlp.fc2", attention_output="dense"
    ),
    "phi3": _llama_like("phi3", "Phi3", qkv=("qkv_proj",), **_FUSED_MLP),
    "olmo": _llama_like("olmo", "Olmo"),
    "olmo2": _llama_like("olmo2", "Olmo2", wide_norms=True),
    "olmo3": _llama_like("olmo3", "Olmo3", wide_norms=True),
    "smollm3": _llama_like("smollm3", "SmolLM3"),
    "granite": _llama_like("granite", "Granite"),
    "starcoder2": _llama_like(
        "starcoder2", "Starcoder2", mlp_inputs=("mlp.c_fc",), mlp_output="mlp.c_proj"
    ),
    "cohere2": _llama_like("cohere2", "Cohere2"),
    "glm4": _llama_like("glm4", "Glm4", **_FUSED_MLP),
    "exaone4": _llama_like("exaone4", "Exaone4"),
    "seed_oss": _llama_like("seed_oss", "SeedOss"),
    "apertus": _llama_like("apertus", "Apertus", **_UNGATED_MLP),
    "nemotron": _llama_like("nemotron", "Nemotron", **_UNGATED_MLP),
    "lfm2": _llama_like(
        "lfm2",
        "Lfm2",
        mlp_inputs=("feed_forward.w1", "feed_forward.w3"),
        mlp_output="feed_forward.w2",
        attention_output="out_proj",
    ),
    # Head size is hidden_size / num_attention_heads in the modelling code: only the MLP is cut.
    "gpt_neox": Architecture(
        "gpt_neox",
        "GPTNeoXLayer",
        mlp_inputs=("mlp.dense_h_to_4h",),
        mlp_output="mlp.dense_4h_to_h",
        attention=None,
        layers="gpt_neox.layers",
    ),
}
