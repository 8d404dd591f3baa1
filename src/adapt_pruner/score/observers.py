"""Statistics that are gathered while a model runs over calibration windows.

An `Observer` is one of them. It watches the axes that it is given, adds up what each micro-batch
shows, and holds the result when the pass is over, for scores and refits to read. To invent one,
write a subclass beside the method that needs it.

Shapes: B windows, T tokens, D hidden size, U units of an axis, K columns per unit, C columns.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..model.anatomy import Anatomy
from ..model.axes import Axis, AxisKey, Site
from ..model.edits import Keep, entries_of
from .gram import InverseGram, add_to_gram, invert_gram, mirror


class Observer(ABC):
    """One statistic of the calibration windows.

    Each window counts by its mean loss per token; sums run over windows, so results do not depend
    on the size of the micro-batches.
    """

    needs_backward: ClassVar[bool] = False
    """Whether the loss has to be propagated backward."""
    needs_loss: ClassVar[bool] = False
    """Whether `Statistics.loss` is wanted, although nothing is propagated backward."""
    needs_weight_gradients: ClassVar[bool] = False
    """Whether gradients of the axes' matrices are wanted in `.grad`."""
    sees_single_windows: ClassVar[bool] = False
    """Whether micro-batches must be of one window."""

    anatomy: Anatomy
    axes: Sequence[Axis]
    is_active: Callable[[], bool]
    """Whether hooks should observe now: with gradient checkpointing layers run twice, and only the
    run with gradients counts."""

    def attach(self) -> Iterator[Any]:
        """Start afresh, and yield the handles of the hooks that watch `anatomy` and `axes`."""
        return iter(())

    def sums(self) -> Iterable[Tensor]:
        """What is added up over processes, in place."""
        return ()

    def finish(self, num_windows: int) -> None:
        """Turn sums over all windows into the result."""
        del num_windows  # sums are the result, where there is nothing to turn

    def values(self) -> Iterable[tuple[str, Tensor | float]]:
        """What has to be finite, with what it is called in a message."""
        return ()

    def carry(self, keep: Keep | None, share: float) -> None:  # noqa: B027  (most carry nothing)
        """Forget the last pass. Where `keep` says which units of each axis stay, this `share` of
        their sums counts in the next pass; with None, nothing is carried over."""


class Loss(Observer):
    """The mean loss of the windows alone: `Statistics.loss`."""

    needs_loss = True


class UnitGradients(Observer):
    """Gradient of the loss to a gate on each unit's activation. Needs no weight gradients.

    A unit's activation is what it adds to the residual stream; where it does so at several sites,
    the gate is one for all of them.
    """

    needs_backward = True

    def __init__(self) -> None:
        self._before: tuple[float, dict[AxisKey, Tensor], dict[AxisKey, Tensor]] = 0.0, {}, {}

    def attach(self) -> Iterator[Any]:
        self.absolute: dict[AxisKey, Tensor] = {}
        """(U,), mean over windows of |sum over tokens of activation * dL/d(activation)|."""
        self.squared: dict[AxisKey, Tensor] = {}
        """(U,), mean over windows of the square of the same sum."""
        self._parts: dict[AxisKey, list[Tensor]] = {}
        for axis in self.axes:
            for site in axis.sites:
                yield watch(site, self._on_activation(axis, site))

    def _on_activation(self, axis: Axis, site: Site):
        def see(x_BTC: Tensor) -> None:
            if self.is_active():
                x_BTC.register_hook(self._on_gradient(axis, site, x_BTC.detach()))

        return see

    def _on_gradient(self, axis: Axis, site: Site, x_BTC: Tensor):
        def hook(gradient_BTC: Tensor) -> None:
            effect_BC = (x_BTC * gradient_BTC).sum(dim=1, dtype=torch.float32)
            self._add(axis, sum_units(effect_BC, site, axis.num_units))

        return hook

    def _add(self, axis: Axis, effect_BU: Tensor) -> None:
        parts = self._parts.setdefault(axis.key, [])
        parts.append(effect_BU)
        if len(parts) == len(axis.sites):
            device = parts[0].device
            for part in parts[1:]:
                parts[0] = parts[0] + part.to(device)
            self.add_effect(axis.key, parts[0])
            parts.clear()

    def add_effect(self, key: AxisKey, effect_BU: Tensor) -> None:
        """Take in what the gates do to the loss of each window of a micro-batch."""
        add_to(self.absolute, key, effect_BU.abs().sum(dim=0))
        add_to(self.squared, key, effect_BU.square().sum(dim=0))

    def sums(self) -> Iterable[Tensor]:
        return [*self.absolute.values(), *self.squared.values()]

    def finish(self, num_windows: int) -> None:
        windows_before, *before = self._before
        self.windows = num_windows + windows_before
        for now, earlier in zip((self.absolute, self.squared), before, strict=True):
            for key, value in now.items():
                if windows_before:
                    value.add_(earlier[key], alpha=windows_before)
                value.div_(self.windows)

    def carry(self, keep: Keep | None, share: float) -> None:
        self._before = 0.0, {}, {}
        if keep is not None and share:
            absolute, squared = (
                {key: v[keep[key].to(v.device)] if key in keep else v for key, v in table.items()}
                for table in (self.absolute, self.squared)
            )
            self._before = self.windows * share, absolute, squared

    def values(self):
        for key, value in self.absolute.items():
            yield f"a gradient in {_named(self.axes, key)}", value


class Gram(Observer):
    """X^T X of the inputs X of every output projection that an axis has units in."""

    def __init__(self, ridge: float = 0.01, carries: bool = False):
        self.ridge = ridge
        """Added to the diagonal before a matrix is inverted, relative to its mean."""
        self.carries = carries
        """Whether to hold on to the matrices for `carry`, in the machine's own memory."""
        self._before: dict[AxisKey, Tensor] = {}

    def attach(self) -> Iterator[Any]:
        self.matrix: dict[AxisKey, Tensor] = {}
        """(C, C) by `Axis.projection`, sum over tokens of the outer product of the input."""
        self._inverses: dict[AxisKey, InverseGram] = {}
        for key, site in projections(self.axes).items():
            yield watch(site, self._on_input(key))

    def _on_input(self, key: AxisKey):
        def see(x_BTC: Tensor) -> None:
            if self.is_active():
                x_NC = x_BTC.detach().flatten(0, -2).float()
                if key not in self.matrix:
                    self.matrix[key] = x_NC.new_zeros(2 * x_NC.shape[1:])
                add_to_gram(self.matrix[key], x_NC)

        return see

    def sums(self) -> Iterable[Tensor]:
        return self.matrix.values()

    def finish(self, num_windows: int) -> None:
        for key, matrix_CC in self.matrix.items():
            mirror(matrix_CC)
            if key in self._before:
                matrix_CC.add_(self._before.pop(key).to(matrix_CC.device))
        self._before.clear()
        if self.carries:
            self._before = {key: matrix.to("cpu", copy=True) for key, matrix in self.matrix.items()}

    def carry(self, keep: Keep | None, share: float) -> None:
        self._inverses.clear()
        if keep is None or not share:
            self._before.clear()
        kept = kept_columns(self.axes, keep or {})
        for key, matrix_CC in self._before.items():
            if key in kept:
                matrix_CC = matrix_CC[kept[key]][:, kept[key]]
            self._before[key] = matrix_CC.mul_(share)

    def values(self):
        for (layer, path), matrix_CC in self.matrix.items():
            yield f"the input of {path} in layer {layer}", matrix_CC

    def inverse(self, key: AxisKey) -> InverseGram:
        """Inverse of the Gram matrix plus ridge; at the first call it takes the matrix's place."""
        if key not in self._inverses:
            self._inverses[key] = invert_gram(self.matrix.pop(key), self.ridge)
        return self._inverses[key]


class WeightGradients(Observer):
    """Mean gradient of every matrix that an axis has units in, in its `.grad` while the statistics
    are open."""

    needs_backward = needs_weight_gradients = True

    def sums(self) -> Iterable[Tensor]:
        return [m.grad for m in matrices(self.axes) if m.grad is not None]

    def finish(self, num_windows: int) -> None:
        for gradient in self.sums():
            gradient.div_(num_windows)

    def values(self):
        for axis in self.axes:
            for slot in axis.slots:
                if slot.tensor.grad is not None:
                    yield f"a gradient in {axis}", slot.tensor.grad


class Fisher(WeightGradients):
    """Mean over windows of the squared gradient of the same matrices (the Fisher diagonal), beside
    the mean gradient."""

    sees_single_windows = True

    def attach(self) -> Iterator[Any]:
        self.squared: dict[nn.Parameter, Tensor] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        for parameter in matrices(self.axes):
            yield parameter.register_post_accumulate_grad_hook(self._on_window_gradient)

    def _on_window_gradient(self, parameter: Any) -> None:
        gradient = parameter.grad
        parameter.grad = None
        add_to(self.squared, parameter, gradient.float().square())
        add_to(self._gradients, parameter, gradient)

    def sums(self) -> Iterable[Tensor]:
        return [*self.squared.values(), *self._gradients.values()]

    def finish(self, num_windows: int) -> None:
        super().finish(num_windows)
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient


def watch(site: Site, see: Callable[[Tensor], None]) -> Any:
    """Call `see` with every activation that passes a site. Returns the handle of the hook."""

    def on_input(module, args, kwargs):
        see(args[0] if args else kwargs["hidden_states"])

    def on_output(module, args, output):
        see(output[0] if isinstance(output, tuple) else output)

    if site.at == "input":
        return site.module.register_forward_pre_hook(on_input, with_kwargs=True)
    return site.module.register_forward_hook(on_output)


def sum_units(values_BC: Tensor, site: Site, num_units: int) -> Tensor:
    """Sum over the columns of each unit. Returns (B, U)."""
    if site.index_UK is None:
        return values_BC.sum(dim=1, keepdim=True)
    return values_BC.unflatten(1, (num_units, -1)).sum(dim=2)  # units lie side by side


def projections(axes: Iterable[Axis]) -> dict[AxisKey, Site]:
    """The input of every output projection that axes have units in, each once."""
    return {axis.projection: axis.sites[0] for axis in axes if axis.output}


def matrices(axes: Iterable[Axis]) -> list[nn.Parameter]:
    """The matrices that units are cut from, each once."""
    slots = (slot for axis in axes for slot in axis.slots)
    return list(dict.fromkeys(slot.tensor for slot in slots if slot.tensor.dim() == 2))


def kept_columns(axes: Iterable[Axis], keep: Keep) -> dict[AxisKey, Tensor]:
    """(C,) bool for each output projection that units of axes go from: which columns stay."""
    kept: dict[AxisKey, Tensor] = {}
    for axis in axes:
        if axis.output is not None and axis.key in keep:
            width = axis.output.tensor.shape[1]
            kept_C = kept.setdefault(axis.projection, torch.ones(width, dtype=torch.bool))
            kept_C[entries_of(axis.output.index_UK, ~keep[axis.key])] = False
    return kept


def add_to(table: dict, key, value: Tensor) -> None:
    """Add to what is in a table under a key, in place."""
    if key in table:
        table[key].add_(value)
    else:
        table[key] = value


def _named(axes: Sequence[Axis], key: AxisKey) -> str:
    return str(next(axis for axis in axes if axis.key == key))
