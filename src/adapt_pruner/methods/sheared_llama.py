"""Sheared-LLaMA (arXiv:2310.06694): train masks towards a uniform shape, cut to it, train on.

`prune` trains masks and weights together on calibration windows, and then cuts. In `accel` a first
share of the tokens does that, on the training data, and the rest trains the model that is left.
Where the paper is silent this follows its published code (princeton-nlp/LLM-Shearing).

Shapes: B windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..allocate.masks import BETAS, Masks
from ..allocate.shapes import Shape, Shapes
from ..errors import NonFiniteError
from ..limits import LearningRate, LearningRateOrZero, PartBelowOne, Steps
from ..model.anatomy import Anatomy
from ..model.axes import HIDDEN, KV_GROUPS, LAYERS, NEURONS, QUERY_HEADS
from ..model.edits import Cut
from ..precision import computing_in
from ..processes import add_up, copy_from_first, share_of
from ..score.collect import micro_batch_size, prepared
from ..settings import with_defaults
from .base import Method, Outline, PruningStep, Work
from .shaped import CAN_CUT, ShapedSettings, shapes_for, size_of_shape

LARGEST_NORM = 1.0
"""That gradients are clipped to, as published."""


class ShearedLlamaSettings(
    with_defaults(
        ShapedSettings,
        "sheared-llama",
        windows=32,
        cut=("neurons", "kv-groups", "query-heads", "hidden", "layers"),
        max_width_pruning=0.5,
        max_depth_pruning=0.25,
    )
):
    """Settings of Sheared-LLaMA, with the published values as defaults."""

    steps: Annotated[Steps, Field(description="Steps that train masks (not in accel).")] = 3200
    mask_learning_rate: Annotated[
        LearningRate, Field(description="Learning rate of masks and multipliers, at its highest.")
    ] = 1.0
    weight_learning_rate: Annotated[
        LearningRateOrZero,
        Field(description="That of the weights, which train along (not in accel); 0: they stay."),
    ] = 1e-4
    mask_share: Annotated[
        PartBelowOne, Field(description="In accel: share of the tokens that trains masks.")
    ] = 0.1


def make_masks(anatomy: Anatomy, settings: Any, target: int) -> Masks:
    """Masks that have yet to be trained, for the shape that the settings name or find.

    Raises:
        InvalidSettings, InvalidTarget: if there is no such shape of the target's size.
    """
    shape = chosen_shape(shapes_for(settings, anatomy, target), target)
    return Masks(anatomy, shape, settings.mask_learning_rate)


def chosen_shape(shapes: Shapes, target: int) -> Shape:
    """Of the shapes of exactly the target's size the one whose widths shrink most alike; of those
    that hardly differ in that, the one with most layers."""
    first, *others = shapes.fitting(target, range(shapes.whole[LAYERS]))

    def rank(shape: Mapping[str, int]) -> tuple[float, int]:
        heads = {KV_GROUPS, QUERY_HEADS} & shape.keys()
        shares = [shape[kind] / shapes.whole[kind] for kind in {HIDDEN, NEURONS} & shape.keys()]
        shares.append(math.prod(shape[kind] / shapes.whole[kind] for kind in heads))
        return round(10 * (max(shares) - min(shares))) / 10, -shape[LAYERS]

    return min([first, *others], key=rank)


def sheared_llama(work: Work) -> Iterator[PruningStep]:
    """Train masks, unless `work` brings some that are, and cut the model in place by them."""
    settings: ShearedLlamaSettings = work.settings
    anatomy, target = work.anatomy(), work.targets[-1]
    if anatomy.amount <= target:
        yield PruningStep(0, anatomy, target=target)
        return
    began, loss, masks = time.perf_counter(), 0.0, work.masks
    if masks is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            masks = make_masks(anatomy, settings, target)
            torch.manual_seed(settings.seed + share_of(work.group)[0])
            loss = _train(work, anatomy, masks)
        masks.check(settings.steps)
    trained = time.perf_counter()
    copy_from_first([*work.model.parameters(), *masks.parameters()], work.group)
    anatomy = work.apply(Cut(masks.fold(anatomy)))
    seconds = {"masks": trained - began, "cut": time.perf_counter() - trained}
    yield PruningStep(step=1, anatomy=anatomy, loss=loss, seconds=seconds, target=target)


def _train(work: Work, anatomy: Anatomy, masks: Masks) -> float:
    """Train masks and weights on calibration windows. Returns the loss of the last step."""
    settings: ShearedLlamaSettings = work.settings
    model, loss = work.model, 0.0
    weights = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": weights, "lr": settings.weight_learning_rate},
        *masks.parameter_groups(),
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
    trained = [parameter for group in groups for parameter in group["params"]]
    with prepared(model, anatomy, [], [], settings.gradient_checkpointing):
        for parameter in weights:
            parameter.requires_grad_(settings.weight_learning_rate > 0)
        masks.attach(anatomy)
        try:
            for step in range(settings.steps):
                masks.share = step / settings.steps
                for group in optimizer.param_groups:
                    if group.get("of_masks"):
                        group["lr"] = masks.rate
                loss = _gradients(work, masks, work.calibration.draw(step))
                torch.nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                work.on_progress((step + 1) / settings.steps)
        finally:
            masks.detach(model)
    return loss


def _gradients(work: Work, masks: Masks, windows_BT: Tensor) -> float:
    """Leave those of the mean loss and the penalty in `.grad`. Returns the loss, in nats."""
    model: Any = work.model
    group = work.group if share_of(work.group)[1] <= len(windows_BT) else None
    rank, processes = share_of(group)
    own_BT, device = windows_BT[rank::processes], model.get_input_embeddings().weight.device
    size = micro_batch_size(work.how.micro_batch_size, windows_BT.shape[1], device.type, [])
    num_labels = len(windows_BT) * (windows_BT.shape[1] - 1)
    total = torch.zeros(1, device=device)
    with torch.enable_grad():
        for tokens_BT in own_BT.to(device).split(size):
            with computing_in(work.compute_dtype, device):
                logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits[:, :-1]
            targets_N = tokens_BT[:, 1:].flatten()
            loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_N, reduction="sum")
            (loss / num_labels).backward()
            total += loss.detach() / num_labels
        (masks.penalty() / processes).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    add_up([total, *found], group)
    if not math.isfinite(float(total)) or not all(torch.isfinite(g).all() for g in found):
        raise NonFiniteError(
            f"The loss of the masked model or its gradient is NaN or infinite ({float(total):g}) "
            f"in step {1 + round(masks.share * work.settings.steps)}. Lower --weight-learning-rate "
            f"({work.settings.weight_learning_rate:g}) or --mask-learning-rate "
            f"({work.settings.mask_learning_rate:g}), or try --dtype float32."
        )
    return float(total)


def outline(settings: ShearedLlamaSettings, anatomy: Anatomy, target: int) -> Outline:
    """One cut, after a training that the plan counts."""
    if anatomy.amount <= target:
        return Outline([])
    shapes_for(settings, anatomy, target)
    tokens = settings.steps * settings.windows * settings.window_length
    return Outline([target], tuned_tokens=tokens, trains_weights=settings.weight_learning_rate > 0)


METHOD = Method(
    run=sheared_llama,
    settings=ShearedLlamaSettings,
    summary="Masks trained towards a uniform shape, then the cut; and training that goes on.",
    paper="arXiv:2310.06694",
    cuts=CAN_CUT,
    needs="training",
    outline=outline,
    size=size_of_shape,
)
