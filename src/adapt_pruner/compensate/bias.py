"""Let a bias stand for what the units that go gave on average (FLAP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..model.axes import Axis, AxisKey
from ..model.edits import Keep, entries_of
from ..precision import in_float64


def without_bias(axes: Sequence[Axis]) -> dict[AxisKey, int]:
    """The output projections of the axes that have no bias, and the parameters of one."""
    linears = {axis.projection: axis.output.module for axis in axes if axis.output}
    return {
        projection: linear.weight.shape[0]
        for projection, linear in linears.items()
        if isinstance(linear, nn.Linear) and linear.bias is None
    }


@torch.no_grad()
def add_means(axes: Sequence[Axis], keep: Keep, mean: Mapping[AxisKey, Tensor]) -> None:
    """Add to the bias of every output projection what its columns that are about to go give for
    the mean of their inputs: exact where these inputs are constant. Mutates the biases.

    Args:
        mean: (C,) of the inputs of each projection, by `Axis.projection`.
    """
    for axis in axes:
        if axis.output is not None and axis.key in keep:
            weight, bias = axis.output.tensor, axis.output.module.bias
            assert isinstance(bias, Tensor), f"{axis} has no bias to add to"
            gone = entries_of(axis.output.index_UK, ~keep[axis.key]).to(weight.device)
            mean_R = in_float64(mean[axis.projection].to(weight.device)[gone])
            bias.copy_(in_float64(bias) + in_float64(weight[:, gone]) @ mean_R)
