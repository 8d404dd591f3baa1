"""Token perplexity of a text, with stated window and stride.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data import pydocs
from ..data.calibration import EMBEDDED, check_vocabulary, read_documents
from ..errors import CalibrationError, NonFiniteError
from ..precision import in_float64

Window = tuple[list[int], int]
"""Token ids, and how many of the last ones are scored; those before them are context."""


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


def evaluation_texts(
    source: str, text_column: str = "text", max_documents: int | None = 10_000
) -> list[str]:
    """Documents to measure on; of the embedded text those that no training has seen."""
    if source == EMBEDDED:
        return pydocs.documents("heldout")
    return list(islice(read_documents(source, text_column), max_documents))


@torch.no_grad()
def perplexity(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    window: int = 256,
    max_windows: int | None = None,
    batch_size: int = 8,
    stride: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Measure the perplexity of `model` on `texts`, document by document.

    Every document is cut into windows of at most `window` tokens, one every `stride` tokens.
    Windows never cross documents. Without overlap every token of a window but the first is
    predicted; with overlap every token of the document but the first, once, in the window that
    reaches it first. The model is put back into the mode it was in.

    Args:
        max_windows: stop after so many; the last document is then measured in part.
        stride: tokens from one window to the next; default: `window`, no overlap.
        on_progress: called with the windows done and their number.

    Raises:
        CalibrationError: if the texts hold no two tokens.
        NonFiniteError: if the model puts out NaN.
    """
    stride = stride or window
    windows, num_bytes = _all_windows(tokenizer, texts, window, stride, max_windows)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    check_vocabulary(max(max(ids) for ids, _ in windows), vocab_size)
    losses = window_losses(model, windows, batch_size, on_progress)
    counts = torch.tensor([scored for _, scored in windows], dtype=torch.float64)
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
        stride=stride,
    )


def _all_windows(
    tokenizer: Any, texts: Iterable[str], window: int, stride: int, max_windows: int | None
) -> tuple[list[Window], int]:
    """The windows of all documents, and the bytes of the text that they hold."""
    windows: list[Window] = []
    num_bytes = 0
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        pieces = windows_of(ids, window, stride)
        if max_windows is not None and len(windows) + len(pieces) > max_windows:
            pieces = pieces[: max_windows - len(windows)]
            end = (len(pieces) - 1) * stride + window if pieces else 0
            text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        windows += pieces
        num_bytes += len(text.encode("utf-8")) if pieces else 0
        if len(windows) == max_windows:
            break
    if not windows:
        raise CalibrationError("There is no text to measure perplexity on.")
    return windows, num_bytes


def windows_of(ids: list[int], window: int, stride: int) -> list[Window]:
    """Cut one document.

    >>> [scored for _, scored in windows_of(list(range(10)), window=4, stride=2)]
    [3, 2, 2, 2]
    """
    windows: list[Window] = []
    end = 0
    for start in range(0, len(ids), stride):
        piece = ids[start : start + window]
        # The first token of a window has no context there.
        scored = min(start + len(piece) - end, len(piece) - 1)
        if scored > 0:
            windows.append((piece, scored))
        end = start + len(piece)
        if end == len(ids):
            break
    return windows


def window_losses(
    model: nn.Module,
    windows: list[Window],
    batch_size: int,
    on_progress: Callable[[int, int], None],
) -> torch.Tensor:
    """Total loss of each window in nats, float64."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
    training, losses = model.training, torch.zeros(len(windows), dtype=torch.float64)
    order = sorted(range(len(windows)), key=lambda i: len(windows[i][0]))
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = max(len(windows[i][0]) for i in chosen)
            # Padding on the right is never looked at by a causal model; its loss is ignored.
            ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
            labels = torch.full((len(chosen), longest), -100)
            for row, i in enumerate(chosen):
                tokens, scored = windows[i]
                ids[row, : len(tokens)] = torch.tensor(tokens)
                labels[row, len(tokens) - scored : len(tokens)] = torch.tensor(tokens[-scored:])
            logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].to(logits.device).flatten(), reduction="none"
            )
            losses[chosen] = in_float64(loss.view(len(chosen), -1)).sum(dim=1).cpu()
            on_progress(start + len(chosen), len(order))
    finally:
        model.train(training)
    return losses
