"""How much goes at each step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..model.anatomy import Anatomy
from ..model.axes import WHOLE_MODEL
from .chains import Removal
from .ranking import remove_ranked, tighten


def sizes_after_steps(anatomy: Anatomy, target: int, steps: int) -> list[int]:
    """What is left after each step of what the target limits, such as parameters: every step leaves
    the decoder layers the same share of what they had, and the last one meets `target`.

    With 400 parameters, all of them in decoder layers, 100 are reached in two steps by 200, 100.
    """
    other = anatomy.cost.outside
    start = anatomy.amount - other
    if target <= other:  # what is outside the decoder layers shrinks too
        start, other = anatomy.amount, 0
    share = (target - other) / start
    return [other + round(start * share ** (i / steps)) for i in range(1, steps)] + [target]


class AdaptiveSchedule:
    """Sparsity per layer, raised step by step (Adapt-Pruner, eq. 6 and algorithm 1).

    Each step adds 1 / steps to the sparsity of every layer, minus amplitude * layer importance; so
    less important layers lose more. Sparsities refer to the original widths, and all axes of a
    layer share theirs. Only what fits whole into a sparsity goes: of W KV heads of size h,
    ceil(int(W h (1 - s)) / h) stay, as in the official code. The step that would pass the target
    is shortened to meet it.
    """

    def __init__(self, anatomy: Anatomy, steps: int, amplitude: float):
        self.increment, self.amplitude = 1 / steps, amplitude
        self.sparsity = [0.0] * len(anatomy.layers)
        self.original_sizes = anatomy.sizes
        self.steps_left = 10 * steps

    def advance(
        self, removal: Removal, target: int, importance: Sequence[float], uniform: bool
    ) -> bool:
        """Set what the chains remove in this step. Returns whether `target` is met, exactly."""
        start = self.sparsity
        end = [
            min(max(s + self.increment - self.amplitude * value, 0.0), 0.99)
            for s, value in zip(start, importance, strict=True)
        ]
        if uniform:
            end = [math.fsum(end) / len(end)] * len(end)
        self.steps_left -= 1
        self._apply(removal, end)
        self.sparsity = end
        if removal.amount > target:
            if self.steps_left > 0 and end != start and any(s < 0.99 for s in end):
                return False
            remove_ranked(removal, target)  # every layer is as sparse as the rule can make it
            return True
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            self._apply(removal, _between(start, end, middle))
            low, high = (middle, high) if removal.amount > target else (low, middle)
        self.sparsity = _between(start, end, high)
        self._apply(removal, self.sparsity)
        tighten(removal, target)
        return True

    def _apply(self, removal: Removal, sparsity: Sequence[float]) -> None:
        for chain in removal.chains:
            layer, _ = key = chain.keys[0]
            share = sparsity[layer] if layer != WHOLE_MODEL else math.fsum(sparsity) / len(sparsity)
            entries = self.original_sizes[key] * chain.members[0].grain
            chain.remove_whole(math.floor(entries * (1 - share) + 1e-9))


def _between(start: Sequence[float], end: Sequence[float], t: float) -> list[float]:
    return [a + t * (b - a) for a, b in zip(start, end, strict=True)]
