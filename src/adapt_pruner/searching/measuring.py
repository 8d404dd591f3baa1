"""How good a pruned model is on the validation text, measured with masks before anything is cut.

Shapes: B windows, T tokens, D hidden size, N tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..compensate.scales import dense_states, divergence
from ..data.calibration import check_vocabulary
from ..errors import EvaluationError, InvalidSettings, NonFiniteError
from ..evaluation.perplexity import Window, window_losses, windows_of
from ..model.anatomy import Anatomy
from ..model.axes import Axis, AxisKey
from ..score.head import TOKENS, hidden_states, plain_head
from .request import SearchSettings

SHARES = (8, 4, 2, 1)
"""A trial is judged on an eighth, a quarter, half and all of the windows."""


def can_mask(anatomy: Anatomy, axes: Sequence[Axis]) -> bool:
    """Whether silencing units is the same as cutting them: not where a norm runs over all heads."""
    return not anatomy.architecture.wide_norms and all(axis.output is not None for axis in axes)


@contextmanager
def masked(axes: Sequence[Axis], keep: Mapping[AxisKey, Tensor]) -> Iterator[None]:
    """Inside the block, units for which `keep` is False add nothing: their columns of the output
    projections are zero. Afterwards the weights are what they were, bit for bit."""
    before: dict[nn.Parameter, Tensor] = {}
    try:
        for axis in axes:
            if axis.key in keep and axis.output is not None:
                weight = axis.output.tensor
                before.setdefault(weight, weight.detach().clone())
                gone = axis.output.index_UK[~keep[axis.key]].flatten().to(weight.device)
                weight.data[:, gone] = 0
        yield
    finally:
        for weight, values in before.items():
            weight.data.copy_(values)


class Validation:
    """The validation text in windows, in an order whose beginning is a fair part of all."""

    def __init__(self, model: Any, tokenizer: Any, texts: Sequence[str], how: SearchSettings):
        self.how = how
        windows: list[Window] = []
        for text in texts:
            ids = tokenizer(text, verbose=False)["input_ids"]
            windows += windows_of(ids, how.validation_window, how.validation_window)
        if how.quality == "kl":  # scored in equal windows
            windows = [window for window in windows if len(window[0]) == how.validation_window]
        if not windows:
            raise EvaluationError(
                f"The validation text has no window of {how.validation_window} tokens. Use more "
                "text, or a smaller --validation-window."
            )
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
        self.windows = [windows[i] for i in order.tolist()[: how.validation_windows]]
        vocab_size = model.get_input_embeddings().weight.shape[0]
        check_vocabulary(max(max(ids) for ids, _ in self.windows), vocab_size)
        self.dense_BTD = self._dense(model) if how.quality == "kl" else None

    @torch.no_grad()
    def _dense(self, model: Any) -> Tensor:
        if plain_head(model) is None:
            raise InvalidSettings(
                "objective: kl needs a model whose logits are made by its head alone; got kl. Take "
                "perplexity."
            )
        return dense_states(model, torch.tensor([ids for ids, _ in self.windows]))

    def grows(self, model: Any) -> Iterator[float]:
        """The objective on an eighth, a quarter, half and all of the windows; each window is run
        once. Raises NonFiniteError."""
        done, total, tokens = 0, 0.0, 0
        for share in SHARES:
            end = -(-len(self.windows) // share)
            if end > done:
                value, count = self._run(model, done, end)
                done, total, tokens = end, total + value, tokens + count
            mean = total / tokens
            if not math.isfinite(mean):
                raise NonFiniteError("The pruned model's loss on the validation text is NaN.")
            yield mean if self.how.quality == "kl" else math.exp(min(mean, 700.0))

    def measure(self, model: Any) -> float:
        """The objective on all windows."""
        return list(self.grows(model))[-1]

    def _run(self, model: Any, start: int, end: int) -> tuple[float, int]:
        """Sum over some windows, and the number of tokens that it runs over."""
        windows = self.windows[start:end]
        if self.dense_BTD is None:
            with torch.no_grad():
                losses = window_losses(model, windows, 8, lambda done, total: None)
            return float(losses.sum()), sum(scored for _, scored in windows)
        dense_BTD = self.dense_BTD[start:end]
        total = sum(
            _divergence(model, torch.tensor([ids for ids, _ in some]), dense)
            for some, dense in zip(_split(windows, 8), dense_BTD.split(8), strict=True)
        )
        return total, sum(len(ids) for ids, _ in windows)


def _split(windows: Sequence[Window], size: int) -> Iterator[Sequence[Window]]:
    return (windows[i : i + size] for i in range(0, len(windows), size))


@torch.no_grad()
def _divergence(model: Any, tokens_BT: Tensor, dense_BTD: Tensor) -> float:
    """Sum over tokens of KL(dense || model)."""
    training = model.training
    model.eval()
    try:
        head = model.get_output_embeddings()
        device = model.get_input_embeddings().weight.device
        outcome, total = divergence(head, dense_BTD, num_tokens=1), 0.0
        hidden_ND = hidden_states(model, tokens_BT.to(device)).flatten(0, 1)
        for start in range(0, len(hidden_ND), TOKENS):
            some = slice(start, start + TOKENS)
            total += float(outcome(head(hidden_ND[some]), some)[0])
        return total
    finally:
        model.train(training)
