"""Which precision things are in: sums in float64 where a device has it, the model's own passes in
bfloat16 where that is faster, and checkpoints as the model is stored."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Types of devices on which torch cannot make a float64 tensor."""


def stored_dtype(model: Any) -> torch.dtype | None:
    """The precision that the model's configuration states."""
    dtype = getattr(model.config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def written_dtype(settings: Any, model: Any) -> torch.dtype:
    """The precision in which a checkpoint will hold the weights."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    return stored_dtype(model) or torch.float32


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on its own device or else on the CPU."""
    return where_float64_is(tensor).double()


def where_float64_is(tensor: Tensor) -> Tensor:
    """The tensor as it is, on its own device or else on the CPU, for sums in float64."""
    return tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor


def zero_in_float64(device: torch.device) -> Tensor:
    """A sum to start from, where `in_float64` leaves the tensors of a device."""
    return in_float64(torch.zeros((), device=device))


WORTH_BFLOAT16 = 100_000_000
"""Parameters from which on matrix products take most of a pass, so that faster ones pay."""


def compute_dtype_of(
    choice: str,
    model: nn.Module,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> torch.dtype | None:
    """What `computing_in` is told for the setting `compute_dtype` and a model as it is loaded.

    Args:
        choice: `bfloat16`, `float32`, or `auto`: bfloat16 where the hardware multiplies it and the
            model is large. A model whose weights are not in float32 computes in their precision.
        dtype: of the weights; default: what the model has.
        device: where they are; default: where they are now.
    """
    weight = next(model.parameters())
    if (dtype or weight.dtype) != torch.float32 or choice == "float32":
        return None
    if choice == "auto":
        size = sum(parameter.numel() for parameter in model.parameters())
        where = torch.device(device or weight.device)
        if size < WORTH_BFLOAT16 or not multiplies_bfloat16(where.type):
            return None
    return torch.bfloat16


def computing_in(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Inside, matrix products are made in this precision; None: in that of the weights.

    Weights stay as they are, and so does what transformers computes in float32: norms, softmax, the
    residual stream.
    """
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def multiplies_bfloat16(device: str) -> bool:
    """Whether a type of device has instructions for it, so that it is faster than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        known = getattr(torch.cpu, "get_capabilities", dict)()  # unknown to older versions
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return False
