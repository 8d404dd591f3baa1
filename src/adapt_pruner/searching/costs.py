"""What a model costs, beside its quality: objectives of a search."""

from __future__ import annotations

from typing import Any

import torch

from ..evaluation.speed import compare_speed
from ..goal import Goal
from ..model.anatomy import find_anatomy
from .request import SearchSettings


def costs_of(
    model: Any, dense: Any, tokenizer: Any, how: SearchSettings, written: torch.dtype
) -> dict[str, float]:
    """The costs that are objectives, each with its name.

    Parameters; bytes of the weights as they are written, or of a GGUF file; latency as a share of
    the dense model's, which takes turns with this one, so that it can be compared between machines
    and times.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    known = {"parameters": float(parameters), "bytes": float(parameters * written.itemsize)}
    if "bytes" in how.costs and how.quantize:
        resource = Goal(bytes=1, quantize=how.quantize).resource(tokenizer)
        known["bytes"] = float(find_anatomy(model, resource).amount)
    if "latency" in how.costs:
        known["latency"] = round(_latency(model, dense, how), 4)
    return {name: known[name] for name in how.costs}


def _latency(model: Any, dense: Any, how: SearchSettings) -> float:
    """From ratios within rounds, so that a machine whose speed drifts changes little."""
    before, after = compare_speed([dense, model], how.prompt_tokens, how.new_tokens)
    prefill = before.time_to_first_token_s
    decode = before.new_tokens / before.decode_tokens_per_s
    now = prefill / after.prefill_speedup + decode / after.decode_speedup
    return now / (prefill + decode)
