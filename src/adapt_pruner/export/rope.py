"""Rotary position embeddings: what a GGUF file says of them."""

from __future__ import annotations

import math
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import UnsupportedModel

_KNOWN = ("default", "linear", "yarn", "llama3")


def rope_parameters(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of layers with full attention, and of those with a sliding window.

    Raises:
        UnsupportedModel: for a scaling that llama.cpp does not have.
    """
    said = config.rope_parameters
    full = said.get("full_attention", said) or {}
    sliding = said.get("sliding_attention") or {}
    kind = full.get("rope_type", "default")
    if kind not in _KNOWN or sliding.get("rope_type", "default") != "default":
        raise UnsupportedModel(
            f"RoPE scaling of type '{kind}' cannot be exported to GGUF. "
            f"Supported: {', '.join(_KNOWN)}."
        )
    return full, sliding


def rope_keys(config: Any, head_dim: int) -> dict[str, Any]:
    """Keys of the file, without the architecture's prefix."""
    full, sliding = rope_parameters(config)
    keys: dict[str, Any] = {
        "rope.dimension_count": int(head_dim * full.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(full["rope_theta"]),
    }
    if sliding:
        keys["rope.freq_base_swa"] = float(sliding["rope_theta"])
    kind = full.get("rope_type", "default")
    if kind == "linear":
        keys["rope.scaling.type"] = gguf.RopeScalingType.LINEAR.value
        keys["rope.scaling.factor"] = float(full["factor"])
    elif kind == "yarn":
        keys |= _yarn(config, full)
    return keys


def _yarn(config: Any, said: dict[str, Any]) -> dict[str, Any]:
    factor = float(said["factor"])
    original = said.get("original_max_position_embeddings") or config.max_position_embeddings
    _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    if said.get("truncate", True) is False:
        raise UnsupportedModel(
            "RoPE scaling of type 'yarn' with truncate=False cannot be exported to GGUF."
        )
    return {
        "rope.scaling.type": gguf.RopeScalingType.YARN.value,
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(original),
        # llama.cpp multiplies this by 1 + 0.1 ln(factor), which is YaRN's own attention factor.
        "rope.scaling.attn_factor": attention_factor / (1 + 0.1 * math.log(factor)),
        "rope.scaling.yarn_beta_fast": float(said.get("beta_fast") or 32),
        "rope.scaling.yarn_beta_slow": float(said.get("beta_slow") or 1),
    }


def rope_factors(config: Any, head_dim: int) -> Tensor | None:
    """(head_dim / 2,) what the frequencies of llama3 scaling are divided by; None for others."""
    full, _ = rope_parameters(config)
    if full.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = full["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (plain / scaled.double()).float()
