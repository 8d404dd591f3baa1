"""Tiny random causal language models, one for every supported architecture.

    model = build("qwen3")                          # float64, random weights of seed 0
    model = build("llama", torch.float32, seed=1, num_hidden_layers=2)
    logits = logits_of(model, random_tokens())

All have hidden size 64, 3 layers, 8 query heads on 4 KV heads (gpt_neox: 8 on 8), 96 neurons per
MLP, 128 tokens, every bias their configuration offers, and sliding windows that texts of 12 tokens
run out of. The epsilon of the norms is tiny: the norms over all heads of olmo2 and olmo3 then
rescale exactly when heads are cut.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import adapt_pruner  # noqa: F401  (extends the layer classes)

VOCAB_SIZE = 128
NUM_LAYERS = 3
NUM_HEADS = 8
NUM_KV_HEADS = 4
INTERMEDIATE_SIZE = 96
TINY = 1e-12

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_KV_HEADS,
    "intermediate_size": INTERMEDIATE_SIZE,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SLIDING = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

_DIFFERENCES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 8, "rms_norm_eps": TINY, "attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 8, "rms_norm_eps": TINY, "sliding_window": 6},
    "ministral3": {
        "head_dim": 8,
        "rms_norm_eps": TINY,
        "sliding_window": 6,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "qwen2": {"rms_norm_eps": TINY, "use_sliding_window": True, **_SLIDING},
    "qwen3": {  # heads wider than hidden_size / num_attention_heads
        "head_dim": 16,
        "rms_norm_eps": TINY,
        "attention_bias": True,
        "use_sliding_window": True,
        **_SLIDING,
    },
    "gemma": {"head_dim": 16, "rms_norm_eps": TINY, "attention_bias": True},
    "gemma2": {
        "head_dim": 16,
        "rms_norm_eps": TINY,
        "attention_bias": True,
        "query_pre_attn_scalar": 16,
        **_SLIDING,
    },
    "gemma3_text": {
        "head_dim": 16,
        "rms_norm_eps": TINY,
        "attention_bias": True,
        "query_pre_attn_scalar": 16,
        **_SLIDING,
    },
    "phi": {"layer_norm_eps": TINY},
    "phi3": {"rms_norm_eps": TINY, "sliding_window": 6},
    "olmo": {"attention_bias": True, "clip_qkv": 1.0},
    "olmo2": {"rms_norm_eps": TINY, "attention_bias": True},
    "olmo3": {"rms_norm_eps": TINY, "attention_bias": True, **_SLIDING},
    "smollm3": {
        "rms_norm_eps": TINY,
        "attention_bias": True,
        "mlp_bias": True,
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        **_SLIDING,
    },
    "granite": {
        "rms_norm_eps": TINY,
        "attention_bias": True,
        "mlp_bias": True,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.7,
    },
    "starcoder2": {"norm_epsilon": TINY, "use_bias": True, "sliding_window": 6},
    "cohere2": {
        "head_dim": 8,
        "layer_norm_eps": TINY,
        "attention_bias": True,
        "logit_scale": 0.5,
        **_SLIDING,
    },
    "glm4": {"head_dim": 8, "rms_norm_eps": TINY, "attention_bias": True},
    "exaone4": {"rms_norm_eps": TINY, **_SLIDING},
    "seed_oss": {
        "head_dim": 8,
        "rms_norm_eps": TINY,
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
    },
    "apertus": {
        "rms_norm_eps": TINY,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    },
    "nemotron": {"head_dim": 8, "norm_eps": TINY, "attention_bias": True, "mlp_bias": True},
    "lfm2": {
        "norm_eps": TINY,
        "layer_types": ["full_attention", "conv", "full_attention"],
        "intermediate_size": INTERMEDIATE_SIZE * 3 // 2,  # LFM2 takes two thirds of it
        "block_multiple_of": 32,
    },
    "gpt_neox": {"num_key_value_heads": NUM_HEADS, "layer_norm_eps": TINY},
}

PICO: dict[str, dict[str, Any]] = {
    model_type: {**_COMMON, **differences} for model_type, differences in _DIFFERENCES.items()
}
"""Configuration of the tiny model of every architecture."""


def build(
    model_type: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Build a model in evaluation mode whose every parameter is random, norms and biases included.

    `overrides` replace values of its configuration. PyTorch's global random state stays as it was.
    """
    key = (model_type, dtype, seed, repr(sorted(overrides.items())))
    if key not in _BUILT:
        _BUILT[key] = _build(model_type, dtype, seed, **overrides)
    return copy.deepcopy(_BUILT[key])  # a third of the time that building takes


_BUILT: dict[Any, PreTrainedModel] = {}


def _build(model_type: str, dtype: torch.dtype, seed: int, **overrides: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **{**PICO[model_type], **overrides})
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Draw matrices of variance 1 / inputs; move vectors, which start at 0 or 1, by 0.3 * randn."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() == 1:
            parameter.add_((0.3 * noise).to(parameter))
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)


def random_tokens(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """(B, T) int64 token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)


@torch.no_grad()
def logits_of(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """(B, T, V) logits, without a cache."""
    return model(input_ids=tokens_BT, use_cache=False).logits


SINK_LAYER, MASSIVE_LAYER, MASSIVE_NEURON = 2, 1, 5


@torch.no_grad()
def with_massive_activation(strength: float = 3000.0, seed: int = 0) -> PreTrainedModel:
    """A Llama of four layers that treats the first token, always 1, as large language models do.

    One neuron of layer 1 answers to token 1 alone, thousands of times as strongly as any other;
    what it writes is all that is left of that token behind a norm. The heads of layer 2 read it as
    the key that every query likes best, and its value is nothing: an attention sink.
    """
    model: Any = build("llama", seed=seed, num_hidden_layers=4, mlp_bias=False)
    marker, massive = 0, 1  # hidden dimensions
    embedding = model.get_input_embeddings().weight
    embedding[:, marker] = 0
    embedding[1] = 0
    embedding[1, marker] = 8
    for layer in model.model.layers:
        for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
            output.weight[[marker, massive]] = 0
        layer.self_attn.o_proj.bias[[marker, massive]] = 0
    mlp = model.model.layers[MASSIVE_LAYER].mlp
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.weight[MASSIVE_NEURON] = 0
        projection.weight[MASSIVE_NEURON, marker] = 4
    mlp.down_proj.weight[:, MASSIVE_NEURON] = 0
    mlp.down_proj.weight[massive, MASSIVE_NEURON] = 1
    attention = model.model.layers[SINK_LAYER].self_attn
    # The last pair of rotary dimensions turns so slowly that places play no part.
    slow = attention.head_dim // 2 - 1
    attention.q_proj.bias[slow :: attention.head_dim] = 6
    attention.k_proj.weight[:, massive] = 0
    attention.k_proj.weight[slow :: attention.head_dim, massive] = 0.5
    attention.v_proj.weight[:, massive] = 0
    attention.v_proj.bias[:] = 0
    now = _inputs_of(mlp.down_proj, model)[0, 0, MASSIVE_NEURON]
    mlp.up_proj.weight[MASSIVE_NEURON] *= strength / now
    return model


def _inputs_of(module: nn.Module, model: nn.Module) -> Tensor:
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(input_ids=starting_with_one(random_tokens()))
    handle.remove()
    return seen[0]


def starting_with_one(tokens_BT: Tensor) -> Tensor:
    tokens_BT[:, 0] = 1
    return tokens_BT


@torch.no_grad()
def share_of_sink(model: Any, tokens_BT: Tensor) -> float:
    """Mean attention of later tokens to the first one in the sink's layer."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    weights_BHTT = model(input_ids=tokens_BT, output_attentions=True).attentions[SINK_LAYER]
    model.set_attn_implementation(before)
    return float(weights_BHTT[:, :, 1:, 0].mean())
