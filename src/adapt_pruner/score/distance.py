"""How far each decoder layer moves the residual stream.

Shapes: B windows, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import in_float64
from .observers import Observer


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


class LayerDistance(Observer):
    """How far each decoder layer moves its input. The result is `distance`, a float per layer."""

    def __init__(self, metric: Distance = Distance.COSINE):
        self.metric = metric

    def attach(self) -> Iterator[Any]:
        self.distance: list[float] = []
        self.found: list[list[Tensor]] = [[] for _ in self.anatomy.layers]
        for i, layer in enumerate(self.anatomy.layers):
            yield layer.register_forward_hook(self._on_layer(i), with_kwargs=True)

    def _on_layer(self, i: int):
        def hook(module, args, kwargs, output):
            if self.is_active():
                x_BTD = (args[0] if args else kwargs["hidden_states"]).detach()
                y_BTD = (output[0] if isinstance(output, tuple) else output).detach()
                if hasattr(module, "carry"):  # a sliced layer puts out another basis
                    x_BTD = module.carry(x_BTD).detach()
                distance = self.metric.between(x_BTD, y_BTD.to(x_BTD.device))
                self.found[i].append(distance * len(x_BTD))

        return hook

    def sums(self) -> Iterable[Tensor]:
        self.found = [[torch.stack(layer).sum()] for layer in self.found]
        return [distance for (distance,) in self.found]

    def finish(self, num_windows: int) -> None:
        self.distance = [
            math.fsum(distance.item() for distance in layer) / num_windows for layer in self.found
        ]

    def values(self):
        for i, distance in enumerate(self.distance):
            yield f"the output of decoder layer {i}", distance


def normalise(distances: Sequence[float], without: Collection[int] = ()) -> list[float]:
    """Layer importance: distances shifted to mean 0 and scaled to max |.| 1 (eq. 4 and 5), over the
    layers that may be cut; those `without` get 0."""
    among = [d for i, d in enumerate(distances) if i not in without] or list(distances)
    mean = math.fsum(among) / len(among)
    largest = max(abs(distance - mean) for distance in among)
    return [
        (distance - mean) / largest if largest > 0 and i not in without else 0.0
        for i, distance in enumerate(distances)
    ]
