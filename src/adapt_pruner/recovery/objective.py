"""What recovery training minimises: cross-entropy with the text, and with a teacher's predictions.

Shapes: B windows, T tokens, N = B * T positions, V vocabulary, K stored logits per position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


@dataclass
class Teaching:
    """What the teacher predicts at every position.

    `index_NK` is None where all logits are given (K = V). Otherwise `log_total_N`, the logarithm of
    the sum of exp(logit / temperature) over the whole vocabulary, makes the given ones
    probabilities.
    """

    logits_NK: Tensor
    index_NK: Tensor | None = None
    log_total_N: Tensor | None = None


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
    logits_NV = logits_BTV.flatten(0, 1).float()
    ce_N = F.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=IGNORED, reduction="none")
    total = ce_N.sum()
    if teaching is not None and alpha:
        kl_N = forward_kl(logits_NV, teaching, temperature)
        kl = (kl_N * (targets_BT.flatten() != IGNORED)).sum()
        total = (1 - alpha) * total + alpha * temperature**2 * kl
    return total, ce_N.detach().view(targets_BT.shape).sum(dim=1)


def forward_kl(logits_NV: Tensor, teaching: Teaching, temperature: float) -> Tensor:
    """(N,) KL(teacher || student) at each position, both softened by the temperature.

    With stored logits, all tokens that are not among them count as one outcome, so that it equals
    the full divergence where all are stored, and is never above it.
    """
    student_NV = F.log_softmax(logits_NV / temperature, dim=-1)
    scaled_NK = teaching.logits_NK.float() / temperature
    if teaching.index_NK is None or teaching.log_total_N is None:
        return _divergence(F.log_softmax(scaled_NK, dim=-1), student_NV)
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
