"""Minitron (arXiv:2407.14679): one cut, of width and depth, to a uniform shape; then distillation.

Scores come from forward passes alone. The shape is given, or it is the best of several of exactly
the target's size, by the loss on calibration text of the model cut to it. Where the paper is silent
this follows its authors' own implementation, `mcore_minitron` of NVIDIA's Model Optimizer.

Shapes: B windows, T tokens, U units of an axis, C columns of an output projection, D hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..allocate.chains import Scores
from ..allocate.shapes import Shape, keep_of
from ..errors import NonFiniteError
from ..limits import Rounds, Windows
from ..model.anatomy import Anatomy
from ..model.axes import HIDDEN, LAYERS, Axis, AxisKey
from ..model.edits import Cut, Keep
from ..precision import computing_in
from ..score.collect import Pass, collect
from ..score.distance import LayerDistance, normalise
from ..score.observers import Observer, projections, watch
from ..settings import with_defaults
from .base import Method, Outline, PruningStep, Work
from .shaped import CAN_CUT, ShapedSettings, shapes_for, size_of_shape


class MinitronSettings(with_defaults(ShapedSettings, "minitron", windows=1024)):
    """Settings of Minitron, with the published values as defaults."""

    candidates: Annotated[
        Rounds, Field(description="Shapes that are tried, spread over all that are possible.")
    ] = 10
    search_windows: Annotated[
        Windows, Field(description="Calibration windows on which each of them is measured.")
    ] = 128


class ActivationNorms(Observer):
    """The L2 norm, over windows, of the mean of |x| over the tokens of a window: one figure for
    every input of an output projection, and for every hidden dimension after every norm."""

    def attach(self) -> Iterator[Any]:
        self.inputs: dict[AxisKey, Tensor] = {}
        """(C,) by `Axis.projection`"""
        self.after_norm: dict[int, Tensor] = {}
        """(D,) by the number of the norm"""
        for key, site in projections(self.axes).items():
            yield watch(site, self._see(self.inputs, key))
        for i, norm in enumerate(_norms(self.anatomy)):
            see = self._see(self.after_norm, i)
            yield norm.register_forward_hook(lambda module, args, output, see=see: see(output))

    def _see(self, table: dict, key: Any):
        def see(x_BTC: Tensor) -> None:
            squares_C = x_BTC.detach().float().abs().mean(dim=1).square().sum(dim=0)
            table[key] = table[key] + squares_C if key in table else squares_C

        return see

    def sums(self) -> Iterable[Tensor]:
        return [*self.inputs.values(), *self.after_norm.values()]

    def finish(self, num_windows: int) -> None:
        for norm in self.sums():
            norm.sqrt_()

    def values(self):
        for (layer, path), norm_C in self.inputs.items():
            yield f"the input of {path} in layer {layer}", norm_C
        for i, norm_D in self.after_norm.items():
            yield f"the output of norm {i}", norm_D

    def of_axis(self, axis: Axis) -> Tensor:
        """(U,) float32, higher = keep: of a neuron its norm, of a head that of its channels
        together, of a hidden dimension the sum over all norms."""
        if axis.kind == HIDDEN:
            device = axis.device
            return torch.stack([norm_D.to(device) for norm_D in self.after_norm.values()]).sum(0)
        assert axis.output is not None
        norm_C = self.inputs[axis.projection]
        return norm_C[axis.output.index_UK.to(norm_C.device)].square().sum(dim=1).sqrt()


def _norms(anatomy: Anatomy) -> list[nn.Module]:
    """The norms of the decoder layers through which sublayers read the residual stream; where there
    are none, those through which they write to it."""
    architecture = anatomy.architecture
    found = []
    for layer in anatomy.layers:
        children = dict(layer.named_children())
        reading = architecture.reading_norms or [name for name in children if "norm" in name]
        there = [children[name] for name in reading if name in children]
        found += [norm for norm in there if not isinstance(norm, nn.Identity)]
    return found


@torch.no_grad()
def calibration_loss(model: Any, windows_BT: Tensor, how: Pass) -> float:
    """Mean loss of the windows, in nats per predicted token. Raises NonFiniteError."""
    device, total = model.get_input_embeddings().weight.device, 0.0
    model.eval()
    for batch_BT in windows_BT.split(how.micro_batch_size or 1):
        with computing_in(how.compute_dtype, device):
            logits_BTV = model(input_ids=batch_BT.to(device), use_cache=False).logits
        for logits_TV, tokens_T in zip(logits_BTV, batch_BT, strict=True):
            targets_T = tokens_T[1:].to(logits_TV.device)
            total += F.cross_entropy(logits_TV[:-1].float(), targets_T).item()
    loss = total / len(windows_BT)
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"The loss of a smaller model on the calibration text is {loss}. Try --dtype float32 "
            "(or bfloat16), and check that the model is sound."
        )
    return loss


def unit_scores(axes: Sequence[Axis], norms: ActivationNorms, distance: LayerDistance) -> Scores:
    """Importance of every unit, higher = keep. Of a layer it is its block influence, 1 - cos."""
    return {
        axis.key: torch.tensor([1 + distance.distance[axis.layer]])
        if axis.kind == LAYERS
        else norms.of_axis(axis)
        for axis in axes
    }


def minitron(work: Work) -> Iterator[PruningStep]:
    """Cut the model in place to a uniform shape of at most the target's parameters."""
    settings: MinitronSettings = work.settings
    anatomy, target = work.anatomy(), work.targets[-1]
    if anatomy.amount <= target:
        yield PruningStep(0, anatomy, target=target)
        return
    shapes = shapes_for(settings, anatomy, target)
    began = time.perf_counter()
    windows_BT = work.calibration.draw(0)
    axes = anatomy.of_kinds(shapes.whole)
    norms, distance = observers = _observers()
    with collect(
        work.model, anatomy, windows_BT, observers, axes=axes, how=work.how,
        on_progress=work.progress_of(len(windows_BT)),
    ):  # fmt: skip
        scores = unit_scores(axes, norms, distance)
    collected = time.perf_counter()
    order = sorted(range(len(anatomy.layers)), key=distance.distance.__getitem__)
    tried = _spread(shapes.fitting(target, order), settings.candidates)
    keeps = [keep_of(axes, scores, shapes.sizes(shape, order)) for shape in tried]
    losses = [
        _loss_after(work, keep, windows_BT[: settings.search_windows]) for keep in keeps
    ] if len(keeps) > 1 else [0.0]  # fmt: skip
    searched = time.perf_counter()
    anatomy = work.apply(Cut(work.decide(keeps[losses.index(min(losses))])))
    yield PruningStep(
        step=1,
        anatomy=anatomy,
        layer_importance=normalise(distance.distance),
        layer_distance=distance.distance,
        seconds={
            "collect": collected - began,
            "search": searched - collected,
            "cut": time.perf_counter() - searched,
        },
        target=target,
    )


def _loss_after(work: Work, keep: Keep, windows_BT: Tensor) -> float:
    """Calibration loss of a copy of the model that is cut."""
    model = deepcopy(work.model)
    Cut(keep).apply(model)
    return calibration_loss(model, windows_BT, work.how)


def _spread(shapes: list[Shape], count: int) -> list[Shape]:
    """At most `count` of them, evenly spaced."""
    if len(shapes) <= count:
        return shapes
    return [shapes[i * (len(shapes) - 1) // max(count - 1, 1)] for i in range(count)]


def _observers() -> tuple[ActivationNorms, LayerDistance]:
    return ActivationNorms(), LayerDistance()


def outline(settings: MinitronSettings, anatomy: Anatomy, target: int) -> Outline:
    """One step, whose forward passes the plan counts; those of the search come on top."""
    if anatomy.amount <= target:
        return Outline([])
    shapes_for(settings, anatomy, target)
    return Outline([target], list(_observers()))


METHOD = Method(
    run=minitron,
    settings=MinitronSettings,
    summary="One cut of width and depth to a uniform shape, by the size of activations.",
    paper="arXiv:2407.14679",
    cuts=CAN_CUT,
    needs="forward",
    outline=outline,
    size=size_of_shape,
)
