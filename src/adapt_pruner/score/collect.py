"""The only place that runs a model to score it: one stream over the calibration windows.

Whatever a method asks for (`Wants`) is gathered in the same pass. Each window contributes its mean
loss per token; sums run over windows, so results do not depend on the micro-batch size. Where
several processes run (torch.distributed), each takes its share of the windows, and the sums run
over all of them, so that every process gets the same statistics.

Shapes: B windows, T tokens, D hidden size, U units, K columns per unit, C = U * K columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum, Flag, auto
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import NonFiniteError
from ..model.anatomy import Anatomy, Group
from ..precision import in_float64, zero_in_float64
from ..processes import add_up, share_of
from .gram import InverseGram, add_to_gram, invert_gram, mirror

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

GroupKey = tuple[int, str]


class Wants(Flag):
    """What to gather during the pass. Layer importance always comes along."""

    NOTHING = 0
    WEIGHT_GRADIENTS = auto()
    """Mean gradient of every prunable matrix, in its `.grad` while the statistics are open."""
    FISHER = auto()
    """Mean over windows of the squared gradient of every prunable matrix (Fisher diagonal)."""
    UNIT_GRADIENTS = auto()
    """Gradient of the loss to a gate on each unit's activation. Needs no weight gradients."""
    GRAM = auto()
    """X^T X of the inputs X of every output projection."""

    @property
    def backward(self) -> bool:
        return bool(self & (Wants.WEIGHT_GRADIENTS | Wants.FISHER | Wants.UNIT_GRADIENTS))

    @property
    def of_weights(self) -> bool:
        return bool(self & (Wants.WEIGHT_GRADIENTS | Wants.FISHER))


class Distance(str, Enum):
    """How far a decoder layer moves the residual stream (Adapt-Pruner, eq. 3)."""

    COSINE = "cosine"
    EUCLIDEAN = "euclidean"
    MANHATTAN = "manhattan"

    def between(self, x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
        """Mean over tokens, float64 scalar, higher = the layer changes its input more."""
        x_BTD, y_BTD = x_BTD.float(), y_BTD.float()
        if self is Distance.COSINE:
            per_token = -F.cosine_similarity(x_BTD, y_BTD, dim=-1)
        else:
            order = 2 if self is Distance.EUCLIDEAN else 1
            per_token = torch.linalg.vector_norm(y_BTD - x_BTD, ord=order, dim=-1)
        return in_float64(per_token).mean()


@dataclass
class Statistics:
    """What one pass over the calibration windows found. Unit tensors are float32 on their layer's
    device, keyed by `Group.key`."""

    num_windows: int = 0
    num_tokens: int = 0
    loss: float = 0.0
    """Mean loss in nats per predicted token, 0 if no loss was needed."""
    layer_distance: list[float] = field(default_factory=list)
    """Per decoder layer, as `Distance.between`."""
    unit_gradient_abs: dict[GroupKey, Tensor] = field(default_factory=dict)
    """(U,), mean over windows of |sum over tokens of activation * dL/d(activation)|."""
    unit_gradient_squared: dict[GroupKey, Tensor] = field(default_factory=dict)
    """(U,), mean over windows of the square of the same sum."""
    gram: dict[GroupKey, Tensor] = field(default_factory=dict)
    """(C, C), sum over tokens of the outer product of the output projection's input."""
    ridge: float = 0.01
    """Added to the diagonal of a Gram matrix before it is inverted, relative to its mean."""
    fisher: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    """Shaped like the matrix, mean over windows of the squared gradient."""
    _inverses: dict[GroupKey, InverseGram] = field(default_factory=dict)

    @property
    def layer_importance(self) -> list[float]:
        """Layer distances shifted to mean 0 and scaled to max |.| 1 (eq. 4 and 5)."""
        mean = math.fsum(self.layer_distance) / len(self.layer_distance)
        centred = [distance - mean for distance in self.layer_distance]
        largest = max(map(abs, centred))
        return [value / largest if largest > 0 else 0.0 for value in centred]

    def inverse_gram(self, key: GroupKey) -> InverseGram:
        """Inverse of the Gram matrix plus ridge; at the first call it takes the matrix's place."""
        if key not in self._inverses:
            self._inverses[key] = invert_gram(self.gram.pop(key), self.ridge)
        return self._inverses[key]


@dataclass
class Pass:
    """How to run the passes over calibration windows."""

    micro_batch_size: int | None = None
    """Windows per forward pass. None starts at about 2048 tokens and halves when memory runs out;
    the size found is kept for later passes."""
    gradient_checkpointing: bool = False
    """Keep only the residual stream between layers for the backward pass and recompute the rest."""
    distance: Distance = Distance.COSINE
    ridge: float = 0.01
    """See `Statistics.ridge`."""
    group: ProcessGroup | None = None
    """Processes that share the windows; each of them calls `collect`. None: this one alone."""


@contextmanager
def collect(
    model: nn.Module,
    anatomy: Anatomy,
    windows_BT: Tensor,
    wants: Wants,
    how: Pass | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Statistics]:
    """Run `model` over the windows and yield what was asked for; score inside the `with` block.

    Weight gradients exist only inside it: `.grad`, `requires_grad` and the training mode of the
    model are as before afterwards. `how.micro_batch_size` is set to the size that was found.

    Args:
        windows_BT: (B, T) int64 token ids on any device.
        on_progress: called with the number of windows done so far.

    Raises:
        NonFiniteError: if the loss, a gradient or a layer's output is NaN or infinite.
    """
    how = how or Pass()
    with _prepared(model, anatomy, wants, how.gradient_checkpointing):
        size = _first_micro_batch_size(how, windows_BT, wants)
        while True:
            try:
                statistics = _run(model, anatomy, windows_BT, wants, how, size, on_progress)
                break
            except RuntimeError as error:
                if size == 1 or how.micro_batch_size or not should_reduce_batch_size(error):
                    raise
            model.zero_grad(set_to_none=True)
            size //= 2
        how.micro_batch_size = size
        _check_finite(statistics, anatomy, wants)
        yield statistics


def _first_micro_batch_size(how: Pass, windows_BT: Tensor, wants: Wants) -> int:
    if Wants.FISHER in wants:
        return 1  # the square of a gradient is taken window by window
    return how.micro_batch_size or max(1, min(len(windows_BT), 2048 // windows_BT.shape[1]))


def _run(model, anatomy, windows_BT, wants, how, size, on_progress) -> Statistics:
    observer = _Observer(anatomy, wants, how)
    device = model.get_input_embeddings().weight.device
    loss = zero_in_float64(device)
    group = how.group if share_of(how.group)[1] <= len(windows_BT) else None
    rank, processes = share_of(group)
    own_BT = windows_BT[rank::processes]
    with observer.attached(), torch.set_grad_enabled(wants.backward):
        for start in range(0, len(own_BT), size):
            batch_BT = own_BT[start : start + size].to(device)
            loss += _run_micro_batch(model, batch_BT, wants.backward).to(loss.device)
            on_progress(min((start + len(batch_BT)) * processes, len(windows_BT)))
    if group is not None:
        add_up([loss], group)
        observer.sum_over_processes(group)
    num_windows, window_length = windows_BT.shape
    return observer.statistics(num_windows, window_length, loss.item())


def _run_micro_batch(model, tokens_BT: Tensor, backward: bool) -> Tensor:
    """Forward and backward. Returns the sum of the window losses, or 0 without a backward pass.

    The graph is gone when this returns: hooks in it hold activations of every layer, which must not
    live on into the next micro-batch.
    """
    logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    if not backward:
        return zero_in_float64(tokens_BT.device)
    loss, gradient_BTV = _loss_and_gradient(logits_BTV.detach(), tokens_BT.to(logits_BTV.device))
    logits_BTV.backward(gradient_BTV)
    return loss


@torch.no_grad()
def _loss_and_gradient(logits_BTV: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over windows of the mean cross-entropy of the next token, and its gradient.

    Computed in float32, some 128 tokens at a time: autograd would hold three float32 copies of the
    logits of the whole micro-batch, which outweigh all else in a small model.

    Returns a float64 scalar in nats, and a tensor like the logits.
    """
    num_predicted = tokens_BT.shape[1] - 1
    loss = zero_in_float64(logits_BTV.device)
    gradient_BTV = torch.zeros_like(logits_BTV)  # the last token of a window predicts nothing here
    size = max(1, 128 // tokens_BT.shape[1])
    for start in range(0, len(tokens_BT), size):
        some = slice(start, start + size)
        targets_BT1 = tokens_BT[some, 1:, None]
        log_probs_BTV = logits_BTV[some, :-1].float().log_softmax(dim=-1)
        loss -= in_float64(log_probs_BTV.gather(2, targets_BT1)).sum() / num_predicted
        probs_BTV = log_probs_BTV.exp_()
        probs_BTV.scatter_add_(2, targets_BT1, probs_BTV.new_tensor(-1.0).expand(targets_BT1.shape))
        gradient_BTV[some, :-1] = probs_BTV.div_(num_predicted)
    return loss, gradient_BTV


class _Observer:
    """Hooks that sum up statistics while the model runs.

    With gradient checkpointing a layer runs twice, first without gradients. Only the run that has
    gradients is observed, so everything is counted once.
    """

    def __init__(self, anatomy: Anatomy, wants: Wants, how: Pass):
        self.anatomy, self.wants, self.distance = anatomy, wants, how.distance
        self.sums = Statistics(ridge=how.ridge)
        self.distances: list[list[Tensor]] = [[] for _ in anatomy.layers]
        self.gradients: dict[nn.Parameter, Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        layers, wants = self.anatomy.layers, self.wants
        with ExitStack() as stack:

            def keep(handle):
                stack.callback(handle.remove)

            for i, layer in enumerate(layers):
                keep(layer.register_forward_hook(self._on_layer(i), with_kwargs=True))
            if wants.backward:
                keep(layers[0].register_forward_pre_hook(_require_gradient, with_kwargs=True))
            if wants & (Wants.UNIT_GRADIENTS | Wants.GRAM):
                for group in self.anatomy.groups:
                    hook = self._on_input(group)
                    keep(group.output_projection.register_forward_pre_hook(hook))
            if Wants.FISHER in wants:
                for parameter in prunable_matrices(self.anatomy):
                    keep(parameter.register_post_accumulate_grad_hook(self._on_window_gradient))
            yield

    def _observes(self) -> bool:
        return torch.is_grad_enabled() or not self.wants.backward

    def _on_layer(self, i: int):
        def hook(module, args, kwargs, output):
            if self._observes():
                x_BTD = (args[0] if args else kwargs["hidden_states"]).detach()
                y_BTD = (output[0] if isinstance(output, tuple) else output).detach()
                distance = self.distance.between(x_BTD, y_BTD.to(x_BTD.device))
                self.distances[i].append(distance * len(x_BTD))

        return hook

    def _on_input(self, group: Group):
        def hook(module, args):
            if not self._observes():
                return
            x_BTC = args[0]
            if Wants.GRAM in self.wants:
                x_NC = x_BTC.detach().flatten(0, -2).float()
                if group.key not in self.sums.gram:
                    self.sums.gram[group.key] = x_NC.new_zeros(2 * x_NC.shape[1:])
                add_to_gram(self.sums.gram[group.key], x_NC)
            if Wants.UNIT_GRADIENTS in self.wants:
                x_BTC.register_hook(self._on_input_gradient(group, x_BTC.detach()))

        return hook

    def _on_input_gradient(self, group: Group, x_BTC: Tensor):
        def hook(gradient_BTC: Tensor) -> None:
            effect_BC = (x_BTC * gradient_BTC).sum(dim=1, dtype=torch.float32)
            effect_BU = effect_BC.unflatten(1, (group.num_units, -1)).sum(dim=2)
            _add(self.sums.unit_gradient_abs, group.key, effect_BU.abs().sum(dim=0))
            _add(self.sums.unit_gradient_squared, group.key, effect_BU.square().sum(dim=0))

        return hook

    def _on_window_gradient(self, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        _add(self.sums.fisher, parameter, gradient.float().square())
        _add(self.gradients, parameter, gradient)

    def sum_over_processes(self, group: ProcessGroup) -> None:
        """Replace all sums by those over all processes; every process calls it."""
        sums = self.sums
        for i, layer in enumerate(self.distances):
            self.distances[i] = [torch.stack(layer).sum()]
        own = [distance for (distance,) in self.distances]
        for table in (sums.unit_gradient_abs, sums.unit_gradient_squared, sums.gram, sums.fisher):
            own += table.values()
        if self.wants.of_weights:
            for parameter in prunable_matrices(self.anatomy):
                gradient = self.gradients.get(parameter, parameter.grad)
                own += [gradient] if gradient is not None else []
        add_up(own, group)

    def statistics(self, num_windows: int, window_length: int, loss: float) -> Statistics:
        """Turn the sums over windows into means."""
        result = self.sums
        result.num_windows, result.num_tokens = num_windows, num_windows * window_length
        result.loss = loss / num_windows
        result.layer_distance = [
            math.fsum(distance.item() for distance in layer) / num_windows
            for layer in self.distances
        ]
        for table in (result.unit_gradient_abs, result.unit_gradient_squared, result.fisher):
            for value in table.values():
                value.div_(num_windows)
        for gram_CC in result.gram.values():
            mirror(gram_CC)
        if self.wants.of_weights:
            for parameter in prunable_matrices(self.anatomy):
                parameter.grad = self.gradients.get(parameter, parameter.grad)
                if parameter.grad is not None:
                    parameter.grad.div_(num_windows)
        return result


def prunable_matrices(anatomy: Anatomy) -> Iterator[nn.Parameter]:
    """The matrices that units are cut from, each once."""
    for group in anatomy.groups:
        for part in group.parts:
            if part.tensor.dim() == 2:
                yield part.tensor


def _require_gradient(module, args, kwargs) -> None:
    """Make the backward pass reach the first layer, whether or not weights require gradients."""
    x_BTD = args[0] if args else kwargs["hidden_states"]
    if torch.is_grad_enabled() and not x_BTD.requires_grad:
        x_BTD.requires_grad_()


def _add(table: dict, key, value: Tensor) -> None:
    if key in table:
        table[key].add_(value)
    else:
        table[key] = value


@contextmanager
def _prepared(model, anatomy: Anatomy, wants: Wants, checkpointing: bool) -> Iterator[None]:
    """Evaluation mode and gradients only where wanted; everything as before on leaving."""
    modes = {module: module.training for module in model.modules()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    wanted = set(prunable_matrices(anatomy)) if wants.of_weights else set()
    try:
        model.eval()
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(parameter in wanted)
        recomputed = anatomy.layers if checkpointing and wants.backward else []
        with checkpointed(recomputed, reentrant=True):
            yield
    finally:
        for parameter, requires_grad, gradient in before:
            # A cut inside the block changes shapes; a gradient of the old shape is void.
            fits = gradient is not None and gradient.shape == parameter.shape
            parameter.grad = gradient if fits else None
            parameter.requires_grad_(requires_grad)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def checkpointed(layers: list[nn.Module], reentrant: bool) -> Iterator[None]:
    """Let transformers' decoder layers recompute their activations in the backward pass.

    Only the layers themselves are put into training mode, which they ask for; their dropout is not.
    Reentrant to observe: the first run is then without gradients, and what it computes is neither
    kept nor counted.
    """
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [{name: vars(layer).get(name) for name in names} for layer in layers]
    recompute = partial(checkpoint, use_reentrant=reentrant)
    try:
        for layer in layers:
            vars(layer).update(zip(names, (True, recompute), strict=True))
            layer.training = True
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name, value in values.items():
                if value is None:
                    vars(layer).pop(name, None)
                else:
                    vars(layer)[name] = value


def _check_finite(statistics: Statistics, anatomy: Anatomy, wants: Wants) -> None:
    advice = "Try --dtype float32 (or bfloat16), and check that the model is sound."
    if not math.isfinite(statistics.loss):
        raise NonFiniteError(f"The loss on the calibration text is {statistics.loss}. {advice}")
    for i, distance in enumerate(statistics.layer_distance):
        if not math.isfinite(distance):
            raise NonFiniteError(f"Decoder layer {i} puts out NaN or infinite values. {advice}")
    for group in anatomy.groups:
        found = [
            table[group.key]
            for table in (statistics.unit_gradient_abs, statistics.gram)
            if group.key in table
        ]
        if wants.of_weights:
            found += [part.tensor.grad for part in group.parts if part.tensor.grad is not None]
        if not all(torch.isfinite(tensor.sum()) for tensor in found):
            raise NonFiniteError(f"A gradient in {group} is NaN or infinite. {advice}")
