"""Which models are supported, and why others are not."""

from __future__ import annotations

from ..errors import UnsupportedModel, near_match
from .architectures import ARCHITECTURES, Architecture


def architecture_of(config) -> Architecture:
    """Look up the architecture of a configuration.

    Raises:
        UnsupportedModel: naming what is supported, if this is another kind of model.
    """
    model_type = getattr(config, "model_type", "")
    if getattr(config, "is_encoder_decoder", False):
        _refuse(model_type, "it is an encoder-decoder model")
    if model_type not in ARCHITECTURES:
        experts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
        if any(getattr(config, name, None) for name in experts):
            _refuse(model_type, "it is a mixture of experts")
        if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
            _refuse(model_type, "it is a multimodal model; extract its text model first")
        if hasattr(config, "state_size") or hasattr(config, "ssm_state_size"):
            _refuse(model_type, "it is a state-space model")
        hint = near_match(model_type, ARCHITECTURES)
        _refuse(model_type, "its architecture is not known here", hint)
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel(
            "This model is quantised already; its weights can no longer be scored and cut. "
            "Prune the original model and quantise the result."
        )
    if getattr(config, "qk_layernorm", False) and model_type == "phi":
        raise UnsupportedModel("Phi models with qk_layernorm=True cannot be pruned; got one.")
    return ARCHITECTURES[model_type]


def _refuse(model_type: str, why: str, hint: str = "") -> None:
    raise UnsupportedModel(
        f"A model of type '{model_type}' cannot be pruned: {why}.{hint} "
        f"Supported: {', '.join(sorted(ARCHITECTURES))}, mobilellm."
    )
