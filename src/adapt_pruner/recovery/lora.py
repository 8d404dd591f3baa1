"""LoRA for the training between two cuts; merged before the next one."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ..errors import InvalidSettings
from .settings import RecoverySettings


def require_peft() -> None:
    """Raise InvalidSettings if peft is not installed."""
    if find_spec("peft") is None:
        raise InvalidSettings("lora_rank: LoRA needs peft; `pip install 'adapt-pruner[lora]'`.")


def add_lora(model: Any, settings: RecoverySettings) -> Any:
    """Wrap `model`, in place, so that only low-rank updates of its linear layers are trained."""
    from peft import LoraConfig, get_peft_model

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
