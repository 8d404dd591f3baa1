"""Precisions: that of checkpoints; float64 where a device has it, and the CPU for a device that has
none (Apple's mps)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
