"""Scale what is left, so that the model predicts what it predicted before the cut.

Every linear map W of the decoder layers becomes diag(r) W diag(c). The scales r and c are trained
for a few dozen steps on calibration text, to bring the predictions close to those of the dense
model, and are then folded into W: nothing is left of them but other weights. The idea is that of
GRASPrune (scales per unit, folded afterwards). Columns of the maps behind a norm do for the norm's
weight, columns of an output projection are the units that stay, and its rows write to the residual
stream. Windows that no step has seen decide whether the scales are kept.

Shapes: B windows, T tokens, N tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.anatomy import Anatomy
from ..precision import computing_in, in_float64
from ..processes import copy_from_first, decided_by_first
from ..score.collect import micro_batch_size, prepared
from ..score.head import Outcome, hidden_states, plain_head, through_head


@dataclass(frozen=True)
class Tuning:
    """How scales are trained."""

    windows_per_step: int = 4
    judging_windows: int = 4
    """The last of the windows: not trained on. Scales are folded only if they help here."""
    learning_rate: float = 0.01
    """Of Adam, at its highest: it rises over four steps and falls to 0 in a straight line."""
    betas: tuple[float, float] = (0.9, 0.99)
    compute_dtype: torch.dtype | None = None
    """Of matrix products; None: that of the weights."""


@dataclass(frozen=True)
class Tuned:
    """What a training of scales did. Mean divergences per token, in nats."""

    steps: list[float]
    """Before each step, on what it trained on."""
    before: float
    """On the judging windows, as `after`."""
    after: float

    @property
    def is_kept(self) -> bool:
        """Whether the scales helped, and were folded into the weights."""
        return self.after < self.before


@torch.no_grad()
def dense_states(
    model: nn.Module, windows_BT: Tensor, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """(B, T, D), what the head of the dense model reads: to be taken before anything is cut. The
    head itself stays, so these are its predictions in D numbers a token instead of V."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator,union-attr]
    size = micro_batch_size(None, windows_BT.shape[1], device.type, [])
    with computing_in(compute_dtype, device):
        return torch.cat([hidden_states(model, w.to(device)).cpu() for w in windows_BT.split(size)])


def tune_scales(
    model: nn.Module,
    anatomy: Anatomy,
    windows_BT: Tensor,
    dense_BTD: Tensor,
    how: Tuning | None = None,
    group: Any = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Tuned:
    """Train scales on KL(dense || model) and fold them. Mutates the weights of the linear maps.

    Each window is used once. Processes of a group all make this call with the same arguments, and
    end with the weights of the first one.

    Args:
        dense_BTD: `dense_states` of the same windows.
        on_progress: called with the number of windows done so far.
    """
    how = how or Tuning()
    head = plain_head(model)
    assert head is not None, "the logits of this model are not a plain function of hidden states"
    linears = [m for layer in anatomy.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    number = len(windows_BT) - how.judging_windows
    to_train = [windows_BT[:number], dense_BTD[:number]]
    to_judge = [windows_BT[number:], dense_BTD[number:]]
    with prepared(model, anatomy, [], [], False), _scaled(linears) as scales:
        with torch.no_grad():
            before = _passes(model, head, *to_judge, how=how)
        steps = _train(model, head, scales, to_train, how, on_progress)
        with torch.no_grad():
            after = _passes(model, head, *to_judge, how=how)
        tuned = decided_by_first(Tuned(steps, before, after), group)
        if not tuned.is_kept:
            for scale in scales:
                scale.data.fill_(1)
    copy_from_first(model.parameters(), group)
    return tuned


def _train(model, head, scales, lessons, how: Tuning, on_progress) -> list[float]:
    parts = [part_BTX.split(how.windows_per_step) for part_BTX in lessons]
    batches = list(zip(*parts, strict=True))
    optimizer = torch.optim.Adam(scales, how.learning_rate, how.betas)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 4) * (1 - step / len(batches))
    )
    found, done = [], 0
    for batch in batches:
        with torch.enable_grad():
            found.append(_passes(model, head, *batch, how=how))
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        done += len(batch[0])
        on_progress(done)
    return found


def _passes(model, head: nn.Module, windows_BT: Tensor, dense_BTD: Tensor, how: Tuning) -> float:
    """Mean divergence per token, in micro-batches; where gradients are on, also its gradients."""
    device = model.get_input_embeddings().weight.device
    # Scales keep more than twice of what a scoring pass keeps for its way back.
    size, found = micro_batch_size(None, 2 * windows_BT.shape[1], device.type, []), 0.0
    for tokens_BT, dense in zip(windows_BT.split(size), dense_BTD.split(size), strict=True):
        with computing_in(how.compute_dtype, device):
            hidden_BTD = hidden_states(model, tokens_BT.to(device))
            part = divergence(head, dense, windows_BT.numel())
            loss, gradient_BTD = through_head(head, hidden_BTD, part)
        if torch.is_grad_enabled():
            hidden_BTD.backward(gradient_BTD)
        found += loss.item()
    return found


def divergence(head: nn.Module, dense_BTD: Tensor, num_tokens: int) -> Outcome:
    """Sum over tokens of KL(dense || model) / num_tokens, both through the same head."""
    dense_ND = dense_BTD.flatten(0, 1)

    @torch.no_grad()
    def outcome(logits_NV: Tensor, some: slice) -> tuple[Tensor, Tensor]:
        dense_NV = head(dense_ND[some].to(logits_NV.device)).float().log_softmax(dim=-1)
        model_NV = logits_NV.float().log_softmax(dim=-1)
        loss = F.kl_div(model_NV, dense_NV, reduction="sum", log_target=True)
        gradient_NV = model_NV.exp_().sub_(dense_NV.exp_())
        return in_float64(loss) / num_tokens, gradient_NV.div_(num_tokens)

    return outcome


@contextmanager
def _scaled(linears: list[nn.Linear]) -> Iterator[list[nn.Parameter]]:
    """Put a scale on every input and output of the maps; fold all of them on leaving."""
    scales, handles = [], []
    for linear in linears:
        rows, columns = linear.weight.shape
        r_O, c_I = (
            nn.Parameter(torch.ones(size, device=linear.weight.device)) for size in (rows, columns)
        )
        scales += [r_O, c_I]
        handles.append(linear.register_forward_pre_hook(_times_input(c_I)))
        handles.append(linear.register_forward_hook(_times_output(r_O)))
    try:
        yield scales
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for linear, r_O, c_I in zip(linears, scales[::2], scales[1::2], strict=True):
            scaled_OI = linear.weight * r_O[:, None] * c_I  # in float32 at least
            linear.weight.copy_(scaled_OI)
            if linear.bias is not None:
                linear.bias.copy_(linear.bias * r_O)


def _times_input(scale: Tensor):
    return lambda module, args: (args[0] * scale.to(args[0].dtype), *args[1:])


def _times_output(scale: Tensor):
    return lambda module, args, output: output * scale.to(output.dtype)
