"""SliceGPT (arXiv:2401.15024): rotate the residual stream to its principal components and drop the
last ones.

The published form has a basis for each stretch of the stream, found layer by layer on the model
sliced so far, and shortcut matrices from one to the next. A model sliced so far is the original one
whose stream is projected onto the basis, x Q Q^T, wherever it has one; so nothing has to be cut
before all bases are known. Beyond the paper, `shared_rotation` takes one basis for all, which makes
the result a plain model of a smaller hidden size.

Shapes: B windows, T tokens, D hidden size, K dimensions that are left, N tokens in all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

import torch
from accelerate.utils import send_to_device
from pydantic import Field
from torch import Tensor, nn

from ..errors import InvalidSettings, InvalidTarget, NonFiniteError
from ..limits import Amplitude, Length, Width, Windows
from ..model.anatomy import Anatomy
from ..model.axes import heads_fit
from ..model.rotation import Rotate, check_rotatable, parameters_after, stream_norms
from ..score.collect import collect
from ..score.gram import add_to_gram, mirror
from ..score.observers import Observer
from ..settings import CutName, PruneSettings
from .base import Method, Outline, PruningStep, Work, check_counts_parameters


class SliceGPTSettings(PruneSettings):
    """Settings of SliceGPT, with the published values as defaults."""

    method: Annotated[Literal["slicegpt"], Field(description="Pruning method.")] = "slicegpt"
    cut: Annotated[
        tuple[CutName, ...], Field(min_length=1, description="Hidden dimensions alone.")
    ] = ("hidden",)
    layout: Annotated[Literal["uniform"], Field(description="All layers are cut alike.")] = (
        "uniform"
    )
    multiple: Annotated[Width, Field(description="The hidden size becomes a multiple of this.")] = 8
    windows: Annotated[Windows, Field(description="Calibration windows.")] = 128
    window_length: Annotated[Length, Field(description="Tokens per calibration window.")] = 2048
    damping: Annotated[
        Amplitude,
        Field(description="Added to the diagonal of X^T X, relative to its mean."),
    ] = 0.01
    shared_rotation: Annotated[
        bool,
        Field(
            description="One basis for the whole residual stream, without shortcut matrices: the "
            "result is a plain model of a smaller hidden size (not in the paper)."
        ),
    ] = False


class StreamGram(Observer):
    """X^T X of what all norms read, each token scaled to length 1 as its norm is going to: so every
    norm, and every token, counts alike, whatever the size of the stream there."""

    def attach(self) -> Iterator[Any]:
        size, device = self.anatomy.hidden_size, self.anatomy.axes[0].device
        self.matrix_DD = torch.zeros(size, size, dtype=torch.float64, device=device)
        for norm in stream_norms(self.anatomy):
            yield norm.register_forward_pre_hook(self._on_norm)

    def _on_norm(self, module, args) -> None:
        x_ND = args[0].detach().flatten(0, -2).to(self.matrix_DD)
        add_to_gram(self.matrix_DD, nn.functional.normalize(x_ND, dim=1))

    def sums(self) -> Iterable[Tensor]:
        return [self.matrix_DD]

    def values(self):
        yield "the residual stream", self.matrix_DD


class Stream:
    """The residual stream of all calibration windows at one place of a model."""

    def __init__(self, work: Work, anatomy: Anatomy, windows_BT: Tensor):
        self.group, self.damping = work.group, work.settings.damping
        size, total = work.settings.micro_batch_size, windows_BT.shape[1]
        rank, processes = 0, 1
        if self.group is not None:
            rank = torch.distributed.get_rank(self.group)
            processes = torch.distributed.get_world_size(self.group)
        own_BT = windows_BT[rank::processes]
        self.dtype = torch.promote_types(next(work.model.parameters()).dtype, torch.float32)
        self.batches: list[Tensor] = []
        """(B, T, D), in main memory"""
        self.arguments: dict[int, list[dict[str, Any]]] = {}
        """By number of windows: what the model gives each of its layers besides the stream."""
        self._gram: Tensor | None = None
        for batch_BT in own_BT.split(size or max(1, 2048 // total)):
            self._enter(work.model, anatomy, batch_BT)

    def _enter(self, model: Any, anatomy: Anatomy, batch_BT: Tensor) -> None:
        """Keep what enters the first layer."""
        is_known = len(batch_BT) in self.arguments
        seen: list[dict[str, Any]] = []

        def on_layer(module, args, kwargs):
            kwargs = {**kwargs}
            x_BTD = args[0] if args else kwargs.pop("hidden_states")
            if not seen:
                self.batches.append(x_BTD.cpu())
            seen.append(kwargs)
            if is_known:
                raise _Enough

        layers = anatomy.layers[:1] if is_known else anatomy.layers
        handles = [layer.register_forward_pre_hook(on_layer, with_kwargs=True) for layer in layers]
        try:
            model(input_ids=batch_BT.to(model.get_input_embeddings().weight.device),
                  use_cache=False)  # fmt: skip
        except _Enough:
            return
        finally:
            for handle in handles:
                handle.remove()
        self.arguments[len(batch_BT)] = seen

    def advance(self, run: Callable[[Tensor, list[dict[str, Any]]], Tensor]) -> None:
        """Replace the stream by what `run` makes of it."""
        for j, x_BTD in enumerate(self.batches):
            self.batches[j] = run(x_BTD, self.arguments[len(x_BTD)]).cpu()

    def project(self, basis_DK: Tensor) -> None:
        """Keep the part of the stream that lies in a basis."""
        for j, x_BTD in enumerate(self.batches):
            basis = basis_DK.to(x_BTD)
            self.batches[j] = x_BTD @ basis @ basis.T

    def principal(self, width: int, device: torch.device) -> Tensor:
        """(D, width), the directions that hold most of the stream."""
        size = self.batches[0].shape[-1] if self.batches else 0
        gram_DD = torch.zeros(size, size, dtype=torch.float64, device=device)
        for x_BTD in self.batches:
            add_to_gram(gram_DD, x_BTD.flatten(0, 1).to(gram_DD))
        if self.group is not None:
            torch.distributed.all_reduce(gram_DD, group=self.group)
        mirror(gram_DD)
        return principal_directions(gram_DD, width, self.damping, self.group).to(self.dtype)


class _Enough(Exception):
    """Nothing behind the first layer has to run."""


def principal_directions(gram_DD: Tensor, width: int, damping: float, group: Any) -> Tensor:
    """(D, width) float64 in main memory: eigenvectors of the largest eigenvalues, largest first.
    Where several processes share the work, those that the first of them found."""
    if not torch.isfinite(gram_DD).all():
        raise NonFiniteError(
            "The residual stream is NaN or infinite on the calibration text. Try --dtype float32 "
            "(or bfloat16), and check that the model is sound."
        )
    gram_DD.diagonal().add_(damping * gram_DD.diagonal().mean())
    basis_DD = torch.linalg.eigh(gram_DD).eigenvectors.flip(1).contiguous()
    if group is not None:
        torch.distributed.broadcast(basis_DD, group=group, group_src=0)
    return basis_DD[:, :width].cpu()


def slicegpt(work: Work) -> Iterator[PruningStep]:
    """Rotate and slice the model in place to at most the target."""
    settings: SliceGPTSettings = work.settings
    anatomy, target = work.anatomy(), work.targets[-1]
    if anatomy.amount <= target:
        yield PruningStep(0, anatomy, target=target)
        return
    width = width_for(settings, anatomy, target)
    began = time.perf_counter()
    windows_BT = work.calibration.draw(0)
    find = _shared_basis if settings.shared_rotation else _bases
    bases = find(work, anatomy, windows_BT, width)
    found = time.perf_counter()
    anatomy = work.apply(Rotate(width, settings.shared_rotation, bases))
    seconds = {"calibrate": found - began, "cut": time.perf_counter() - found}
    yield PruningStep(step=1, anatomy=anatomy, seconds=seconds, target=target)


def _shared_basis(work: Work, anatomy: Anatomy, windows_BT: Tensor, width: int) -> list[Tensor]:
    observer = StreamGram()
    with collect(
        work.model, anatomy, windows_BT, [observer], how=work.how,
        on_progress=work.progress_of(len(windows_BT)),
    ):  # fmt: skip
        mirror(observer.matrix_DD)
    basis = principal_directions(observer.matrix_DD, width, work.settings.damping, work.group)
    return [basis.to(torch.promote_types(next(work.model.parameters()).dtype, torch.float32))]


@torch.no_grad()
def _bases(work: Work, anatomy: Anatomy, windows_BT: Tensor, width: int) -> list[Tensor]:
    """One of the embeddings, then one behind the attention and one behind the MLP of each layer."""
    architecture, model = anatomy.architecture, work.model
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        stream = Stream(work, anatomy, windows_BT)
        bases = [stream.principal(width, anatomy.axes[0].device)]
        for i, layer in enumerate(anatomy.layers):
            norm, mlp_norm = (getattr(layer, name) for name in architecture.reading_norms)
            attention, mlp = (
                getattr(layer, architecture.attention),
                getattr(layer, architecture.mlp),
            )
            device = next(layer.parameters()).device
            scale = getattr(layer, "residual_multiplier", 1.0)

            def attend(x_BTD, arguments, i=i, norm=norm, attention=attention, scale=scale,
                       device=device):  # fmt: skip
                x_BTD = x_BTD.to(device)
                given = send_to_device(arguments[i], device)
                return x_BTD + attention(hidden_states=norm(x_BTD), **given)[0] * scale

            def widen(x_BTD, arguments, norm=mlp_norm, mlp=mlp, scale=scale, device=device):
                x_BTD = x_BTD.to(device)
                return x_BTD + mlp(norm(x_BTD)) * scale

            for run in (attend, widen):
                stream.project(bases[-1])
                stream.advance(run)
                is_last = run is widen and i == len(anatomy.layers) - 1
                left = anatomy.hidden_size if is_last else width
                bases.append(stream.principal(left, device))
            work.on_progress((i + 1) / len(anatomy.layers))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return bases


def width_for(settings: SliceGPTSettings, anatomy: Anatomy, target: int) -> int:
    """The largest hidden size, of the multiple asked for, that meets the target.

    Raises:
        InvalidSettings: for settings that the method cannot follow.
        InvalidTarget: if no size does.
        UnsupportedModel: if the residual stream cannot be rotated.
    """
    if settings.cut != ("hidden",):
        raise InvalidSettings(f"cut: slicegpt cuts hidden; got {', '.join(settings.cut)}.")
    if settings.protect_layers:
        raise InvalidSettings(
            "slicegpt cuts the hidden size of all layers, so protect_layers must be empty; got "
            f"{list(settings.protect_layers)}."
        )
    check_counts_parameters(anatomy, "slicegpt", "take another method")
    check_rotatable(anatomy)
    step, shared = settings.multiple, settings.shared_rotation
    if shared:  # head counts of the whole model have to divide its hidden size
        heads = {widths["num_attention_heads"] for widths in anatomy.widths}
        whole = anatomy.hidden_size
        step = math.lcm(step, *(count for count in heads if heads_fit(whole, count)))
    for width in range(anatomy.hidden_size // step * step, 0, -step):
        if parameters_after(anatomy, width, shared) <= target:
            return width
    smallest = parameters_after(anatomy, min(step, anatomy.hidden_size), shared)
    raise InvalidTarget(
        f"The target of {target:,} parameters is below what is possible: with a hidden size of "
        f"{step} the model has {smallest:,}. Name a larger target, or a smaller --multiple."
    )


def outline(settings: SliceGPTSettings, anatomy: Anatomy, target: int) -> Outline:
    """One step; the published form runs every layer once, and holds the stream of all windows."""
    if anatomy.amount <= target:
        return Outline([])
    width_for(settings, anatomy, target)
    return Outline([target], [StreamGram()] if settings.shared_rotation else [])


METHOD = Method(
    run=slicegpt,
    settings=SliceGPTSettings,
    summary="Rotates the residual stream to its principal components and drops the last ones.",
    paper="arXiv:2401.15024",
    cuts=frozenset({"hidden"}),
    needs="forward",
    outline=outline,
)
