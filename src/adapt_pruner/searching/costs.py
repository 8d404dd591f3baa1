"""What a model costs, beside its quality: objectives of a search."""

from __future__ import annotations

from typing import Any

import torch

from ..evaluation.speed import Speed, compare_speed
from .request import SearchSettings


def costs_of(model: Any, dense: Any, how: SearchSettings, written: torch.dtype) -> dict[str, float]:
    """The costs that are objectives, each with its name.

    Parameters; bytes of the weights as they are written; latency as a share of the dense model's,
    which takes turns with this one, so that it can be compared between machines and times.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    known = {"parameters": float(parameters), "bytes": float(parameters * written.itemsize)}
    if "latency" in how.costs:
        before, after = compare_speed([dense, model], how.prompt_tokens, how.new_tokens)
        known["latency"] = round(_seconds(after) / _seconds(before), 4)
    return {name: known[name] for name in how.costs}


def _seconds(speed: Speed) -> float:
    """To read the prompt and to write the new tokens."""
    return speed.time_to_first_token_s + speed.new_tokens / speed.decode_tokens_per_s
