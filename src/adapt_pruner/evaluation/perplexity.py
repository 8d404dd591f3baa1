"""Token perplexity of a text, with stated window and stride.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data.calibration import check_vocabulary
from ..errors import CalibrationError, NonFiniteError


@dataclass(frozen=True)
class Perplexity:
    """Perplexity per token, and all that is needed to measure it again."""

    perplexity: float
    """exp of the mean loss in nats per predicted token."""
    bits_per_byte: float
    """Comparable between tokenizers: total loss in bits over the UTF-8 bytes of the texts."""
    standard_error: float
    """Of the mean loss in nats, over windows."""
    num_tokens: int
    """Tokens that were predicted."""
    window: int
    stride: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def perplexity(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    window: int = 256,
    max_windows: int | None = None,
    batch_size: int = 8,
) -> Perplexity:
    """Measure the perplexity of `model` on `texts`, document by document.

    Every document is cut into consecutive windows of `window` tokens (stride = window), the last
    one shorter; within a window every token but the first is predicted. Windows never cross
    documents. The model is put back into the mode it was in.

    Args:
        max_windows: stop after so many; the last document is then measured in part.

    Raises:
        CalibrationError: if the texts hold no two tokens.
        NonFiniteError: if the model puts out NaN.
    """
    windows, num_bytes = [], 0
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        pieces = [ids[i : i + window] for i in range(0, len(ids), window)]
        pieces = [piece for piece in pieces if len(piece) > 1]
        if max_windows is not None and len(windows) + len(pieces) > max_windows:
            pieces = pieces[: max_windows - len(windows)]
            text = tokenizer.decode(ids[: len(pieces) * window], skip_special_tokens=True)
        windows += pieces
        num_bytes += len(text.encode("utf-8")) if pieces else 0
        if len(windows) == max_windows:
            break
    if not windows:
        raise CalibrationError("There is no text to measure perplexity on.")
    vocab_size = model.get_input_embeddings().weight.shape[0]
    check_vocabulary(max(map(max, windows)), vocab_size)
    losses = _window_losses(model, windows, batch_size)
    counts = torch.tensor([len(piece) - 1 for piece in windows], dtype=torch.float64)
    total, num_tokens = float(losses.sum()), int(counts.sum())
    mean = total / num_tokens
    if not math.isfinite(mean):
        raise NonFiniteError("The model's loss on the evaluation text is NaN or infinite.")
    # Ratio estimator over windows: residuals of the loss against its expectation by length.
    residual = losses - mean * counts
    spread = float(residual.square().sum().sqrt()) / num_tokens
    return Perplexity(
        perplexity=math.exp(min(mean, 700.0)),
        bits_per_byte=total / math.log(2) / max(num_bytes, 1),
        standard_error=spread,
        num_tokens=num_tokens,
        window=window,
        stride=window,
    )


def _window_losses(model: nn.Module, windows: list[list[int]], batch_size: int) -> torch.Tensor:
    """Total loss of each window in nats, float64."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
    training, losses = model.training, torch.zeros(len(windows), dtype=torch.float64)
    order = sorted(range(len(windows)), key=lambda i: len(windows[i]))
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = max(len(windows[i]) for i in chosen)
            # Padding on the right is never looked at by a causal model; its loss is ignored.
            ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
            labels = torch.full((len(chosen), longest), -100)
            for row, i in enumerate(chosen):
                ids[row, : len(windows[i])] = torch.tensor(windows[i])
                labels[row, : len(windows[i])] = torch.tensor(windows[i])
            logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].to(logits.device).flatten(), reduction="none"
            )
            losses[chosen] = loss.view(len(chosen), -1).double().sum(dim=1).cpu()
    finally:
        model.train(training)
    return losses
