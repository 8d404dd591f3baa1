"""Let the units that stay make up for those that go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.axes import Axis
from ..model.edits import Keep
from ..precision import in_float64
from ..score.gram import InverseGram, factorise
from ..score.observers import Gram, kept_columns


def refit_outputs(axes: Sequence[Axis], keep: Keep, gram: Gram) -> None:
    """Refit every output projection that is about to lose columns. Mutates the weights; the columns
    that go are left as they are: cut afterwards."""
    slots = {axis.projection: axis.output for axis in axes if axis.output is not None}
    for projection, kept_C in kept_columns(axes, keep).items():
        refit_output(slots[projection].tensor, kept_C, gram.inverse(projection))


@torch.no_grad()
def refit_output(weight: Tensor, kept_C: Tensor, inverse: InverseGram) -> None:
    """Refit an output projection so that its kept inputs reproduce its output. Mutates it.

    Minimises ||X W^T - X_keep W'^T||^2 + lambda ||W' - W_keep||^2 over W', in closed form

        W' = (W H[:, keep] + lambda W[:, keep]) (H[keep, keep] + lambda I)^-1,   H = X^T X,

    with lambda = ridge * mean(diag H). The ridge pulls towards the weights that stay, not towards
    zero. With P = (H + lambda I)^-1 and block elimination of what goes, that is the update

        W' = W[:, keep] - W[:, gone] P[gone, gone]^-1 P[gone, keep],

    which costs little when little goes. The columns that go are left as they are.

    Args:
        weight: (D, C)
        kept_C: bool, False for the columns that go.
        inverse: P but for a factor, which cancels, of the projection's C inputs.
    """
    matrix_CC = inverse.matrix_CC
    kept = kept_C.nonzero().flatten().to(matrix_CC.device)
    gone = (~kept_C).nonzero().flatten().to(matrix_CC.device)
    gone_RC = in_float64(matrix_CC[gone])
    place = gone_RC.device
    factor_RR = factorise(gone_RC[:, gone.to(place)])
    weight_DR = in_float64(weight[:, gone.to(weight.device)]).to(place)
    update_DK = torch.cholesky_solve(weight_DR.T, factor_RR).T @ gone_RC[:, kept.to(place)]
    kept = kept.to(weight.device)
    refitted_DK = weight[:, kept].to(place) - update_DK
    weight[:, kept] = refitted_DK.to(weight.dtype).to(weight.device)
