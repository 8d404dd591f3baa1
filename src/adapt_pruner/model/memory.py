"""Memory that a cut frees, so that it is free for others, too."""

from __future__ import annotations

import ctypes
import sys

from torch import nn


def own_weights(model: nn.Module) -> None:
    """Copy weights on the CPU, one by one, into memory of their own.

    `from_pretrained` leaves them in the mapped file, of which all stays resident as long as a
    single weight is read from it: a cut would free nothing. Mutates `model`, whose parameters stay
    the same objects with the same values.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def give_back() -> None:
    """Hand memory that was freed back to the system.

    glibc keeps it, in pieces that the next pass, whose tensors have other sizes, does not fit into;
    each step would then need more than the one before it.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
