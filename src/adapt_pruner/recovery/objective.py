"""What recovery training minimises: cross-entropy with the text, and with a teacher's predictions.

Shapes: B windows, T tokens, N = B * T positions, V vocabulary, K stored logits per position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..data.sampling import IGNORED

_CHUNK = 2**22
"""Logits per chunk of the distillation loss, at least those of one token."""


@dataclass
class Teaching:
    """What the teacher predicts at every position.

    `index_NK` is None where the logits of the first K tokens are given, and the teacher knows no
    others. Otherwise `log_total_N`, the logarithm of the sum of exp(logit / temperature) over its
    vocabulary, makes the given ones probabilities.
    """

    logits_NK: Tensor
    index_NK: Tensor | None = None
    log_total_N: Tensor | None = None

    def at(self, some: slice) -> Teaching:
        """Some of the positions."""
        index_NK, log_total_N = self.index_NK, self.log_total_N
        return Teaching(
            self.logits_NK[some],
            None if index_NK is None else index_NK[some],
            None if log_total_N is None else log_total_N[some],
        )


Teacher = Callable[[Tensor, Tensor], Teaching]
"""From (B,) positions in the data order and (B, T) token ids to the teacher's predictions."""


def targets_of(labels_BT: Tensor) -> Tensor:
    """(B, T): at each position the label of the next token; the last one predicts nothing."""
    last_B1 = labels_BT.new_full((len(labels_BT), 1), IGNORED)
    return torch.cat([labels_BT[:, 1:], last_B1], dim=1)


def loss_sums(
    logits_BTV: Tensor,
    labels_BT: Tensor,
    teaching: Teaching | None = None,
    alpha: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The objective summed over predicted tokens, and the cross-entropy of each window, in nats.

    The objective is (1 - alpha) * CE + alpha * temperature^2 * KL(teacher || student), both at the
    positions whose next token has a label. Returns float32: (scalar, (B,) detached).
    """
    targets_BT = targets_of(labels_BT)
    logits_NV, targets_N = logits_BTV.flatten(0, 1), targets_BT.flatten()
    if teaching is not None and alpha:
        found: Any = _Distillation.apply(logits_NV, targets_N, teaching, alpha, temperature)
        total, ce_N = found
    else:
        ce_N = F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORED, reduction="none")
        total = ce_N.sum()
    return total, ce_N.detach().view(targets_BT.shape).sum(dim=1)


class _Distillation(torch.autograd.Function):
    """The objective with a teacher, and its gradient at once, some tokens at a time: beside both
    models' logits there is one copy more, the gradient, where autograd would hold six."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        targets_N: Tensor,
        teaching: Teaching,
        alpha: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        gradient_NV = torch.empty_like(logits_NV)
        total = logits_NV.new_zeros((), dtype=torch.float32)
        ce_N = total.new_empty(len(logits_NV))
        size = max(1, _CHUNK // logits_NV.shape[1])
        for start in range(0, len(logits_NV), size):
            some = slice(start, start + size)
            with torch.enable_grad():
                part_NV = logits_NV[some].detach().float().requires_grad_()
                targets = targets_N[some]
                ce = F.cross_entropy(part_NV, targets, ignore_index=IGNORED, reduction="none")
                kl = forward_kl(part_NV, teaching.at(some), temperature) * (targets != IGNORED)
                loss = (1 - alpha) * ce.sum() + alpha * temperature**2 * kl.sum()
                (gradient_NV[some],) = torch.autograd.grad(loss, part_NV)
            total += loss.detach()
            ce_N[some] = ce.detach()
        ctx.gradient_NV = gradient_NV
        ctx.mark_non_differentiable(ce_N)
        return total, ce_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient_NV, ctx.gradient_NV = ctx.gradient_NV, None
        return gradient_NV.mul_(gradients[0]), None, None, None, None


def forward_kl(logits_NV: Tensor, teaching: Teaching, temperature: float) -> Tensor:
    """(N,) KL(teacher || student) at each position, both softened by the temperature.

    With stored logits, all tokens that are not among them count as one outcome, so that it equals
    the full divergence where all are stored, and is never above it. Tokens that the teacher does
    not know have probability 0 there.
    """
    student_NV = F.log_softmax(logits_NV / temperature, dim=-1)
    scaled_NK = teaching.logits_NK.float() / temperature
    if teaching.index_NK is None or teaching.log_total_N is None:
        return _divergence(F.log_softmax(scaled_NK, dim=-1), student_NV[:, : scaled_NK.shape[1]])
    teacher_NK = scaled_NK - teaching.log_total_N.float()[:, None]
    student_NK = student_NV.gather(1, teaching.index_NK.long())
    return _divergence(_with_rest(teacher_NK), _with_rest(student_NK))


def _divergence(teacher_NK: Tensor, student_NK: Tensor) -> Tensor:
    return F.kl_div(student_NK, teacher_NK, reduction="none", log_target=True).sum(dim=1)


def _with_rest(log_NK: Tensor) -> Tensor:
    """(N, K + 1): one more outcome for what is left of probability 1, at least 1e-7 so that its
    logarithm has a gradient."""
    rest_N1 = (1 - log_NK.exp().sum(dim=1, keepdim=True)).clamp(min=1e-7)
    return torch.cat([log_NK, rest_N1.log()], dim=1)


@torch.no_grad()
def store_teaching(logits_NV: Tensor, top_k: int, temperature: float) -> Teaching:
    """Keep the `top_k` largest logits per position, and the sum over all of them."""
    logits_NV = logits_NV.float()
    top = logits_NV.topk(min(top_k, logits_NV.shape[1]), dim=1)
    log_total_N = torch.logsumexp(logits_NV / temperature, dim=1)
    return Teaching(top.values, top.indices.int(), log_total_N)
