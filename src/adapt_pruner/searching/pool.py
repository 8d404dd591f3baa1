"""The pool of samples, scored once, and what any choice of them would have given.

Two of AdaPruner's three terms are linear in the samples before a last step: the vector-wise one in
the sums of w g along each row and column, the second-order one altogether. They are kept window by
window and put together again for each trial. The first-order element-wise term |w g| is not; it
takes a pass over the chosen windows.

Shapes: P windows of the pool, T tokens, D hidden size, U units of an axis, K entries of a unit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..allocate.chains import Scores
from ..errors import InvalidSettings, shown
from ..model.anatomy import Anatomy
from ..model.axes import Axis, AxisKey, Slot
from ..score.collect import Pass, collect
from ..score.importance import taylor
from ..score.observers import Observer, WeightGradients

STARTS = 8
"""Of k-means, which can end in a poor grouping."""


class ByWindow(Observer):
    """What each window alone adds to the vector-wise and the second-order term."""

    needs_backward = needs_weight_gradients = sees_single_windows = True

    def attach(self) -> Iterator[Any]:
        self.sums_of: dict[tuple[AxisKey, int], list[Tensor]] = {}
        """Axis and number of its slot -> per window (U, K), sums of w dL/dw along each row."""
        self.squares_of: dict[AxisKey, list[Tensor]] = {}
        """Per window (U,), sum of w^2 (dL/dw)^2."""
        slots: dict[Any, list[tuple[Axis, int, Slot]]] = {}
        for axis in self.axes:
            for i, slot in enumerate(axis.slots):
                if slot.tensor.dim() == 2:
                    slots.setdefault(slot.tensor, []).append((axis, i, slot))
        self._open: dict[AxisKey, tuple[int, Tensor]] = {}
        for parameter, found in slots.items():
            yield parameter.register_post_accumulate_grad_hook(self._on_gradient(found))

    def _on_gradient(self, slots: list[tuple[Axis, int, Slot]]):
        def hook(parameter: Any) -> None:
            product = parameter.detach().float() * parameter.grad.float()
            parameter.grad = None
            square = product.square()
            for axis, i, slot in slots:
                along = product.sum(dim=1 - slot.dim)
                rows_UK = along[slot.index_UK.to(along.device)].cpu()
                self.sums_of.setdefault((axis.key, i), []).append(rows_UK)
                self._add_square(axis, slot.per_unit(square).cpu())

        return hook

    def _add_square(self, axis: Axis, square_U: Tensor) -> None:
        """Slots of one window follow each other; the last one completes it."""
        count, total_U = self._open.pop(axis.key, (0, torch.zeros(axis.num_units)))
        count, total_U = count + 1, total_U + square_U
        if count < sum(slot.tensor.dim() == 2 for slot in axis.slots):
            self._open[axis.key] = count, total_U
        else:
            self.squares_of.setdefault(axis.key, []).append(total_U)

    def values(self):
        for key, squares in self.squares_of.items():
            yield f"a gradient in layer {key[0]} {key[1]}", torch.stack(squares)


@dataclass
class Pool:
    """The samples, what each of them adds to the scores, and what they are like."""

    windows_PT: Tensor
    sums: dict[tuple[AxisKey, int], Tensor]
    """(P, U, K) per axis and slot."""
    squares: dict[AxisKey, Tensor]
    """(P, U)"""
    loss_P: Tensor
    """Of the dense model, nats per token."""
    hidden_PD: Tensor
    """Mean over tokens of what the head reads."""

    def __len__(self) -> int:
        return len(self.windows_PT)

    def terms(self, samples: Sequence[int]) -> dict[str, dict[AxisKey, Tensor]]:
        """The coarse and the second-order term, as a pass over these samples would give them."""
        chosen = torch.tensor(samples)
        coarse: dict[AxisKey, Tensor] = {}
        for (key, _), sums_PUK in self.sums.items():
            score_U = sums_PUK[chosen].mean(dim=0).abs().sum(dim=1)
            coarse[key] = coarse[key] + score_U if key in coarse else score_U
        second = {key: squares_PU[chosen].mean(dim=0) for key, squares_PU in self.squares.items()}
        return {"coarse": coarse, "second": second}

    def tensors(self) -> dict[str, Tensor]:
        """All of it under names, to be stored."""
        named = {"windows": self.windows_PT, "loss": self.loss_P, "hidden": self.hidden_PD}
        named.update({f"sums/{k[0]}/{k[1]}/{i}": v for (k, i), v in self.sums.items()})
        named.update({f"squares/{k[0]}/{k[1]}": v for k, v in self.squares.items()})
        return {name: tensor.contiguous() for name, tensor in named.items()}

    @classmethod
    def of_tensors(cls, named: dict[str, Tensor]) -> Pool:
        """From what `tensors` gave."""
        sums, squares = {}, {}
        for name, tensor in named.items():
            what, *where = name.split("/")
            if what == "sums":
                sums[(int(where[0]), where[1]), int(where[2])] = tensor
            elif what == "squares":
                squares[int(where[0]), where[1]] = tensor
        return cls(named["windows"], sums, squares, named["loss"], named["hidden"])


def score_pool(
    model: Any,
    anatomy: Anatomy,
    axes: Sequence[Axis],
    windows_PT: Tensor,
    how: Pass,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Pool:
    """One forward and backward pass per sample. Raises NonFiniteError as `collect`."""
    by_window = ByWindow()
    with collect(
        model, anatomy, windows_PT, [by_window], axes=axes, how=how,
        on_progress=lambda done: on_progress(done / len(windows_PT)),
    ):  # fmt: skip
        sums = {key: torch.stack(found) for key, found in by_window.sums_of.items()}
        squares = {key: torch.stack(found) for key, found in by_window.squares_of.items()}
    loss_P, hidden_PD = _describe(model, windows_PT)
    return Pool(windows_PT, sums, squares, loss_P, hidden_PD)


def first_order(
    model: Any, anatomy: Anatomy, axes: Sequence[Axis], windows_BT: Tensor, how: Pass
) -> Scores:
    """The term that is not linear in the samples, by a pass over the chosen ones."""
    with collect(model, anatomy, windows_BT, [WeightGradients()], axes=axes, how=how) as statistics:
        return {axis.key: taylor(axis, statistics) for axis in axes}


@torch.no_grad()
def _describe(model: Any, windows_PT: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and mean hidden state of each sample."""
    device = model.get_input_embeddings().weight.device
    training, losses, states = model.training, [], []
    model.eval()
    try:
        for tokens_BT in windows_PT.split(8):
            tokens_BT = tokens_BT.to(device)
            out = model(input_ids=tokens_BT, use_cache=False, output_hidden_states=True)
            logits = out.logits[:, :-1].float().flatten(0, 1)
            loss = F.cross_entropy(logits, tokens_BT[:, 1:].flatten(), reduction="none")
            losses.append(loss.view(len(tokens_BT), -1).mean(dim=1).cpu())
            states.append(out.hidden_states[-1].float().mean(dim=1).cpu())
    finally:
        model.train(training)
    return torch.cat(losses), torch.cat(states)


def by_source(sources: Sequence[str], groups: int) -> Tensor:
    """(P,) int64, the group of each sample: 0 is the source with the most; the rarest share one.

    Raises:
        InvalidSettings: if there is only one source.
    """
    found = [source for source, _ in Counter(sources).most_common()]
    if len(found) == 1:
        raise InvalidSettings(
            f"describe: all samples come from {shown(found[0])}, so sources do not tell them "
            "apart; got source. Take hidden or loss, or text with a column `source` or of several "
            "files."
        )
    return torch.tensor([min(found.index(source), groups - 1) for source in sources])


def grouped(pool: Pool, describe: str, groups: int, seed: int) -> Tensor:
    """(P,) int64, the group of each sample: 0 has the lowest mean loss.

    Raises:
        InvalidSettings: if there are fewer samples than groups.
    """
    if groups > len(pool):
        raise InvalidSettings(f"groups: the pool has {len(pool)} samples; got {groups}.")
    if describe == "loss":
        rank = torch.argsort(torch.argsort(pool.loss_P, stable=True), stable=True)
        return rank * groups // len(pool)
    group_P = _clusters(pool.hidden_PD, groups, seed)
    means = [pool.loss_P[group_P == g].mean() for g in range(groups)]
    return torch.argsort(torch.argsort(torch.stack(means).nan_to_num(torch.inf)))[group_P]


def _clusters(x_PD: Tensor, count: int, seed: int) -> Tensor:
    """k-means on standardised dimensions, the best of `STARTS` starts by k-means++."""
    x_PD = (x_PD - x_PD.mean(dim=0)) / x_PD.std(dim=0, correction=0).clamp(min=1e-6)
    generator = torch.Generator().manual_seed(seed)
    found = [_k_means(x_PD, count, generator) for _ in range(STARTS)]
    return min(found, key=lambda one: one[1])[0]


def _k_means(x_PD: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """The nearest centre of each point, and the sum of squared distances to them."""
    first = int(torch.randint(len(x_PD), (1,), generator=generator))
    centre_GD = x_PD[first][None]
    while len(centre_GD) < count:
        far_P = torch.cdist(x_PD, centre_GD).min(dim=1).values.square() + 1e-12
        chosen = int(torch.multinomial(far_P, 1, generator=generator))
        centre_GD = torch.cat([centre_GD, x_PD[chosen][None]])
    group_P = torch.full((len(x_PD),), -1)
    for _ in range(50):
        distance = torch.cdist(x_PD, centre_GD).min(dim=1)
        if torch.equal(distance.indices, group_P):
            break
        group_P = distance.indices
        for g in group_P.unique().tolist():
            centre_GD[g] = x_PD[group_P == g].mean(dim=0)
    return group_P, float(distance.values.square().sum())


def choose(group_P: Tensor, weights: Sequence[float], draw: int, number: int) -> tuple[int, ...]:
    """As many samples of each group as its weight says, in whole numbers; of each the
    first ones of order number `draw`. Ascending.

    With weights 1, 1, 0 and 5 samples there are 3, 2 and 0, if the groups have so many.
    """
    members = [(group_P == g).nonzero().flatten() for g in range(len(weights))]
    counts = _shares(weights, [len(found) for found in members], number)
    chosen: list[int] = []
    for g, (found, count) in enumerate(zip(members, counts, strict=True)):
        generator = torch.Generator().manual_seed(draw * 1_009 + g)
        chosen += found[torch.randperm(len(found), generator=generator)[:count]].tolist()
    return tuple(sorted(chosen))


def _shares(weights: Sequence[float], most: Sequence[int], number: int) -> list[int]:
    """Whole numbers that add up to `number`, in proportion to weights, none above its `most`."""
    counts = [0] * len(weights)
    for _ in range(number):
        open_ = [g for g in range(len(counts)) if counts[g] < most[g]]
        # Where all weights are 0, all groups count alike. This is Sainte-Laguë's rule.
        best = max(open_, key=lambda g: ((weights[g] or 1e-9) / (2 * counts[g] + 1), -g))
        counts[best] += 1
    return counts
