"""What an output projection reads, summed up: H = X^T X over all tokens, and the inverse of it that
both the residual scores and the refit are made of.

Shapes: N tokens, C columns of the projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..precision import WITHOUT_FLOAT64, in_float64


@dataclass
class InverseGram:
    """(H / m + ridge * I)^-1 with m = mean(diag H), so that the scale of X plays no part."""

    matrix_CC: Tensor
    diagonal_C: Tensor
    """Of H / m + ridge * I itself."""


def add_to_gram(gram_CC: Tensor, x_NC: Tensor) -> None:
    """Add X^T X, the part above the diagonal alone: five eighths of the whole product's work."""
    width = len(gram_CC)
    block = max(256, -(-width // 4))
    for start in range(0, width, block):
        columns = slice(start, start + block)
        gram_CC[columns, start:].addmm_(x_NC[:, columns].T, x_NC[:, start:])


def mirror(gram_CC: Tensor) -> None:
    """Fill the part below the diagonal from the part above it."""
    lower_CC = gram_CC.triu(1).T
    gram_CC.triu_().add_(lower_CC)


def invert_gram(gram_CC: Tensor, ridge: float) -> InverseGram:
    """Invert. The inverse takes the memory of `gram_CC`, which is lost.

    In the precision of `gram_CC`, whose rounding is small beside a ridge of 1e-3 or more: at 0.01 a
    float32 inverse of 2048 columns is within 5e-5 of the float64 one, in half the time. Below that,
    in float64.

    Args:
        ridge: > 0, relative to the mean of the diagonal. A projection that never saw an input has
            H = 0, and a multiple of I as its inverse.
    """
    system_CC = gram_CC if ridge >= 1e-3 else in_float64(gram_CC)
    if gram_CC.device.type in WITHOUT_FLOAT64:
        system_CC = system_CC.cpu()  # nor is there a Cholesky inverse
    if system_CC is gram_CC:
        system_CC = gram_CC.clone()
    mean = system_CC.diagonal().mean()
    if mean > 0:
        system_CC.div_(mean)
    system_CC.diagonal().add_(ridge)
    diagonal_C = system_CC.diagonal().to(gram_CC)
    gram_CC.copy_(torch.cholesky_inverse(factorise(system_CC)))
    return InverseGram(gram_CC, diagonal_C)


def factorise(matrix: Tensor) -> Tensor:
    """Cholesky factor of a positive definite matrix. May add to its diagonal.

    Gram matrices and their inverses are stored in float32. With a small ridge and inputs that
    repeat each other, rounding can leave eigenvalues below zero; the diagonal is then raised, from
    1e-7 of its mean on in powers of ten, until it has none.
    """
    raised = 1e-7 * matrix.diagonal().mean()
    for _ in range(6):
        factor, info = torch.linalg.cholesky_ex(matrix)
        if info == 0:
            return factor
        matrix.diagonal().add_(raised)
        raised *= 10
    return torch.linalg.cholesky(matrix)
