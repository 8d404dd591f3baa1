"""Float64 where a device has it, and the CPU for a device that has none (Apple's mps)."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Types of devices on which torch cannot make a float64 tensor."""


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on its own device or else on the CPU."""
    return where_float64_is(tensor).double()


def where_float64_is(tensor: Tensor) -> Tensor:
    """The tensor as it is, on its own device or else on the CPU, for sums in float64."""
    return tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor


def zero_in_float64(device: torch.device) -> Tensor:
    """A sum to start from, where `in_float64` leaves the tensors of a device."""
    return in_float64(torch.zeros((), device=device))
