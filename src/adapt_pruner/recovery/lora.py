"""LoRA for the training between two cuts; merged before the next one."""

from __future__ import annotations

from typing import Any

from ..errors import InvalidSettings
from .settings import RecoverySettings


def add_lora(model: Any, settings: RecoverySettings) -> Any:
    """Wrap `model`, in place, so that only low-rank updates of its linear layers are trained."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InvalidSettings(
            f"lora_rank: {settings.lora_rank} needs peft; `pip install 'adapt-pruner[lora]'`."
        ) from None
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def merge_lora(model: Any) -> Any:
    """Add the updates to the weights and return the plain model."""
    plain = model.merge_and_unload()
    plain.requires_grad_(True)
    return plain
