"""Let the units that stay make up for those that go."""

from __future__ import annotations

import torch
from torch import Tensor

from .anatomy import Group
from .slicing import kept_entries


@torch.no_grad()
def refit_output(group: Group, keep_U: Tensor, gram_CC: Tensor, ridge: float) -> None:
    """Refit the output projection so that its kept inputs reproduce its output. Mutates it.

    Minimises ||X W^T - X_keep W'^T||^2 + lambda ||W' - W_keep||^2 over W', in closed form

        W' = (W H[:, keep] + lambda W[:, keep]) (H[keep, keep] + lambda I)^-1,   H = X^T X,

    with lambda = ridge * mean(diag H). The ridge pulls towards the weights that stay, not towards
    zero. The columns that go are left as they are: cut the group afterwards.

    Args:
        gram_CC: H, (C, C) with C the input width of the projection.
        ridge: relative strength of the pull, > 0.
    """
    kept = kept_entries(group.output.index_UK, keep_U).to(gram_CC.device)
    weight = group.output.tensor
    weight_DC = weight.to(gram_CC.device, torch.float64)
    gram_CK = gram_CC[:, kept].double()
    strength = ridge * gram_CC.diagonal().double().mean()
    if not strength > 0:
        return  # the projection never saw a non-zero input
    system_KK = gram_CK[kept]
    system_KK.diagonal().add_(strength)
    right_DK = weight_DC @ gram_CK + strength * weight_DC[:, kept]
    solution_KD = torch.cholesky_solve(right_DK.T, torch.linalg.cholesky(system_KK))
    weight[:, kept.to(weight.device)] = solution_KD.T.to(weight)
