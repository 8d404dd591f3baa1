"""The output head, some tokens at a time.

The logits of a micro-batch outweigh all else in a small model with a large vocabulary: 2,048 tokens
of 49,152 float32 logits are 0.4 GB, and a gradient of them as much again. Where only a linear head
stands between the last hidden states and the logits, neither has to be in memory as a whole.

Shapes: B windows, T tokens, N tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..precision import in_float64, zero_in_float64

TOKENS = 256
"""Tokens whose logits are there at once."""

HeadOutcome = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Takes the logits (N, V) of some of the tokens, and which; returns the sum of what is minimised,
float64, and its gradient to the logits."""


@torch.no_grad()
def plain_head(model: Any) -> nn.Module | None:
    """The linear layer that turns the last hidden states into logits, if nothing else does.

    Found by trying, with two tokens: several architectures scale or bend their logits afterwards
    (`final_logit_softcapping`, `logits_scaling`), each under a name of its own. None for those.
    """
    head, base = model.get_output_embeddings(), getattr(model, "base_model", model)
    if head is None or base is model:
        return None
    device = model.get_input_embeddings().weight.device
    tokens_BT = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # checkpointing
        logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
        same_BTV = head(hidden_states(model, tokens_BT))
    return head if torch.equal(logits_BTV, same_BTV) else None


def hidden_states(model: Any, tokens_BT: Tensor) -> Tensor:
    """(B, T, D), what the head reads."""
    return model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state


def through_head(
    head: nn.Module, hidden_BTD: Tensor, outcome: HeadOutcome
) -> tuple[Tensor, Tensor]:
    """Sum of `outcome` over all tokens, and its gradient to the hidden states.

    Returns a float64 scalar, and a tensor like the hidden states. Changes no gradient.
    """
    flat_ND = hidden_BTD.detach().flatten(0, 1)
    gradient_ND = torch.empty_like(flat_ND)
    total = zero_in_float64(flat_ND.device)
    for start in range(0, len(flat_ND), TOKENS):
        some = slice(start, start + TOKENS)
        x_ND = flat_ND[some].requires_grad_()
        with torch.enable_grad():
            logits_NV = head(x_ND)
        value, gradient_NV = outcome(logits_NV.detach(), some)
        (gradient_ND[some],) = torch.autograd.grad(logits_NV, x_ND, gradient_NV.to(logits_NV))
        total += value.to(total.device)
    return total, gradient_ND.view_as(hidden_BTD)


def value_through_head(head: nn.Module, hidden_BTD: Tensor, outcome: HeadOutcome) -> Tensor:
    """The same sum alone."""
    flat_ND, total = hidden_BTD.flatten(0, 1), zero_in_float64(hidden_BTD.device)
    for start in range(0, len(flat_ND), TOKENS):
        some = slice(start, start + TOKENS)
        value, _ = outcome(head(flat_ND[some]), some)
        total += value.to(total.device)
    return total


def cross_entropy(tokens_BT: Tensor) -> HeadOutcome:
    """Sum over windows of the mean cross-entropy of the next token, in nats.

    The last token of a window predicts nothing.
    """
    num_predicted = tokens_BT.shape[1] - 1
    next_N = tokens_BT.roll(-1, dims=1).flatten()
    weight_N = torch.full(tokens_BT.shape, 1 / num_predicted, device=tokens_BT.device)
    weight_N[:, -1] = 0
    weight_N = weight_N.flatten()

    def outcome(logits_NV: Tensor, some: slice) -> tuple[Tensor, Tensor]:
        device = logits_NV.device
        targets_N1, weight_N1 = next_N[some, None].to(device), weight_N[some, None].to(device)
        log_probs_NV = logits_NV.float().log_softmax(dim=-1)
        loss = -in_float64(log_probs_NV.gather(1, targets_N1) * weight_N1).sum()
        probs_NV = log_probs_NV.exp_()
        probs_NV.scatter_add_(1, targets_N1, probs_NV.new_full(targets_N1.shape, -1.0))
        return loss, probs_NV.mul_(weight_N1)

    return outcome
