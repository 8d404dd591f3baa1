"""Draw windows from packed domains: without replacement, in exact proportions, resumable.

Shapes: n windows, T tokens.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError

if TYPE_CHECKING:
    from .packing import PackedData, PackedDomain

IGNORED = -100
"""Label of a token that has no loss, as in transformers."""


@dataclass(frozen=True)
class Batch:
    """Windows to train on."""

    input_ids: Tensor
    """(n, T) int64."""
    labels: Tensor
    """(n, T) int64, `input_ids` with -100 where there is no loss; the model shifts them."""
    domains: Tensor
    """(n,) int64, index into `data.domains`."""


class WindowSampler:
    """A sequence of windows that depends on data, seed and weights alone, not on batch sizes.

    Within a domain, windows come in a seeded random order, each once before any comes again. The
    domain of each window follows Tijdeman's solution of the chairman assignment problem (1980):
    after any number n of windows with constant weights w of k domains, the number of each
    domain's windows is within 1 - 1/(2k - 2) of n·w.

    All ranks of a run hold a sampler in the same state; each calls `next_indices` for the global
    batch and `gather` for its own share of it.
    """

    def __init__(self, data: PackedData, seed: int = 0):
        self.data, self.seed = data, seed
        self.num_windows = 0
        """Windows drawn so far."""
        self._weights = np.array([domain.weight for domain in data.domains], dtype=np.float64)
        self._drawn = np.zeros(len(data.domains), dtype=np.int64)
        # Windows due to each domain: what weights before the present ones gave, and since when.
        self._earned, self._since = np.zeros(len(data.domains)), 0
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def position(self) -> int:
        """Tokens drawn so far."""
        return self.num_windows * self.data.sequence_length

    @property
    def drawn(self) -> dict[str, int]:
        """Windows drawn so far from each domain."""
        names = [domain.name for domain in self.data.domains]
        return dict(zip(names, self._drawn.tolist(), strict=True))

    @property
    def weights(self) -> dict[str, float]:
        """Share of each domain in what is drawn next. Assign a mapping to change all of them."""
        names = [domain.name for domain in self.data.domains]
        return dict(zip(names, self._weights.tolist(), strict=True))

    @weights.setter
    def weights(self, weights: dict[str, float]) -> None:
        names = [domain.name for domain in self.data.domains]
        if set(weights) != set(names):
            raise DataError(
                f"Weights are needed for {', '.join(names)}; got {', '.join(map(str, weights))}."
            )
        new = np.array([weights[name] for name in names], dtype=np.float64)
        if not np.isfinite(new).all() or (new < 0).any() or not new.sum():
            raise DataError(f"Weights must be positive numbers; got {weights}.")
        self._earned, self._since = self._due(), self.num_windows
        self._weights = new / new.sum()

    def next(self, n: int) -> Batch:
        """Draw the next `n` windows."""
        return self.gather(self.next_indices(n))

    def next_indices(self, n: int) -> np.ndarray:
        """(n, 2) int64: domain and window of the next `n` windows. Reads no data.

        Raises:
            DataError: if a domain has none left and may not begin again.
        """
        indices = np.empty((n, 2), dtype=np.int64)
        drawn, position = self._drawn.copy(), self.num_windows
        try:
            for row in indices:
                row[0] = domain = self._choose()
                row[1] = self._window(domain, int(self._drawn[domain]))
                self._drawn[domain] += 1
                self.num_windows += 1
        except BaseException:
            self._drawn, self.num_windows = drawn, position
            raise
        return indices

    def gather(self, indices: np.ndarray) -> Batch:
        """Read windows named by `next_indices`, or any rows of its result."""
        shape = (len(indices), self.data.sequence_length)
        input_ids, labels = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        for row, (domain, window) in enumerate(indices.tolist()):
            packed = self.data.domains[domain]
            input_ids[row] = labels[row] = packed.tokens[window]
            if packed.answers is not None:
                labels[row][~packed.answers[window]] = IGNORED
        domains = torch.from_numpy(np.ascontiguousarray(indices[:, 0]))
        return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), domains)

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as numbers and names that JSON can hold."""
        names = [domain.name for domain in self.data.domains]
        return {
            "seed": self.seed,
            "fingerprint": self.data.fingerprint,
            "position": self.position,
            "drawn": self.drawn,
            "weights": self.weights,
            "earned": dict(zip(names, self._earned.tolist(), strict=True)),
            "since": self._since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the sampler that gave `state` stood.

        Raises:
            DataError: if it is the state of a sampler of other data.
        """
        if state["fingerprint"] != self.data.fingerprint:
            raise DataError(
                "The data are not those of the run to resume: a source, the tokenizer, the window "
                "length, the budget or the seed is another. Take what it had, or start anew."
            )
        names = [domain.name for domain in self.data.domains]
        self.seed, self._orders = state["seed"], {}
        self.num_windows = state["position"] // self.data.sequence_length
        self._drawn = np.array([state["drawn"][name] for name in names], dtype=np.int64)
        self._weights = np.array([state["weights"][name] for name in names])
        self._earned = np.array([state["earned"][name] for name in names])
        self._since = state["since"]

    def _due(self) -> np.ndarray:
        return self._earned + (self.num_windows - self._since) * self._weights

    def _choose(self) -> int:
        """Of the domains that may have the next window, the one that must have it soonest."""
        behind = self._due() + self._weights - self._drawn
        slack = 1 / max(2 * len(behind) - 2, 1)
        ready = np.flatnonzero((behind >= slack - 1e-9) & (self._weights > 0))
        if not len(ready):  # only after a change of weights
            return int(np.where(self._weights > 0, behind, -np.inf).argmax())
        time_left = (1 - slack - behind[ready]) / self._weights[ready]
        return int(ready[time_left.argmin()])

    def _window(self, domain: int, count: int) -> int:
        """The window that domain gives as its `count`-th, from 0."""
        packed = self.data.domains[domain]
        round_, place = divmod(count, packed.num_windows)
        if round_ and not self.data.may_repeat:
            raise _exhausted(packed, self.data.sequence_length)
        if self._orders.get(domain, (-1,))[0] != round_:
            name = zlib.crc32(packed.name.encode())
            generator = np.random.default_rng([self.seed, name, round_])
            self._orders[domain] = round_, generator.permutation(packed.num_windows)
        return int(self._orders[domain][1][place])


def _exhausted(domain: PackedDomain, sequence_length: int) -> DataError:
    return DataError(
        f"Domain '{domain.name}' has given all of its {domain.num_windows * sequence_length:,} "
        "prepared tokens. Prepare more tokens, give it more data, or pass --repeat."
    )


def updated_weights(
    weights: dict[str, float],
    losses: dict[str, float],
    reference_losses: dict[str, float],
    floor: float = 1e-4,
) -> dict[str, float]:
    """Weights of dynamic batch loading (Sheared-LLaMA, algorithm 1), from losses in nats per token.

    w ← softmax(log w + max(loss - reference, 0)), then mixed with the uniform distribution:
    (1 - floor)·w + floor / number of domains, so that no domain dies out.

    Raises:
        DataError: if a domain lacks a loss or reference, or has one that is not finite.
    """
    for kind, values in (("loss", losses), ("reference loss", reference_losses)):
        for name in weights:
            if not np.isfinite(values.get(name, np.nan)):
                raise DataError(f"Domain '{name}' needs a finite {kind}; got {values.get(name)}.")
    names = list(weights)
    excess = np.array([max(losses[name] - reference_losses[name], 0.0) for name in names])
    scaled = np.array([weights[name] for name in names]) * np.exp(excess - excess.max())
    mixed = (1 - floor) * scaled / scaled.sum() + floor / len(names)
    return dict(zip(names, (mixed / mixed.sum()).tolist(), strict=True))
