"""Silence parts of a full model without cutting it, by means that share nothing with the library.

    mask(model, {(0, "neurons"): keep_U, (-1, "hidden"): keep_U, (1, "attention"): keep_U})

Where things are is told by transformers' own reading of its tensors, not by the anatomy's slots: a
KV group is silent if its value head is zero, a query head if o_proj ignores it, a sublayer if its
output projection is zero, a layer if it returns its input. Hidden dimensions are silent if no norm
counts them and none lets them through: where a norm runs over what is cut, the mean (and, in a
LayerNorm, the variance) is that over the dimensions that stay.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from adapt_pruner.model.architectures import ARCHITECTURES


@torch.no_grad()
def mask(model, keep):
    """Silence the units whose entry in `keep` is False. Mutates the model, whose shapes stay."""
    names = ARCHITECTURES[model.config.model_type]
    layers = model.get_submodule(names.layers)
    for (i, kind), keep_U in keep.items():
        if kind == "hidden":
            _mask_hidden(model, names, keep_U)
            continue
        layer = layers[i]
        if kind == "layers":
            if not keep_U.any():
                layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
        elif kind in ("attention", "mlp"):
            if not keep_U.any():
                _silence(layer, names, kind)
        elif kind == "neurons":
            layer.get_submodule(names.mlp_output).weight[:, ~keep_U] = 0
        elif kind == "query-heads":
            attention = layer.get_submodule(names.attention)
            weight = attention.get_submodule(names.attention_output).weight
            weight.unflatten(1, (len(keep_U), -1))[:, ~keep_U] = 0
            if names.wide_norms:
                groups = keep.get((i, "kv-groups"))
                size = len(keep_U) // len(groups) if groups is not None else 1
                alive = groups.repeat_interleave(size) if groups is not None else None
                _leave_out_of_wide_norm(attention, "q", keep_U if alive is None else keep_U & alive)
        else:
            _mask_groups(layer.get_submodule(names.attention), names, keep_U)
            if names.wide_norms:
                attention = layer.get_submodule(names.attention)
                _leave_out_of_wide_norm(attention, "k", keep_U)
                if (i, "query-heads") not in keep:
                    _leave_out_of_wide_norm(attention, "q", keep_U)


def _mask_groups(attention, names, keep_U):
    """The value rows come last in a fused projection."""
    num_kv, head_dim = len(keep_U), attention.head_dim
    values = attention.get_submodule(names.qkv[-1])
    for tensor in (values.weight, values.bias):
        if tensor is not None:
            tensor[-num_kv * head_dim :].unflatten(0, (num_kv, head_dim))[~keep_U] = 0


def _leave_out_of_wide_norm(attention, which, keep_U):
    """q_norm and k_norm of OLMo 2 and 3 divide by the root mean square over all heads. With masked
    heads at zero that mean still counts them, so it is kept / total of the mean over the heads
    that stay; weights of sqrt(kept / total) times their size make up for it."""
    linear = getattr(attention, f"{which}_proj")
    for tensor in (linear.weight, linear.bias):
        if tensor is not None:
            tensor.unflatten(0, (len(keep_U), -1))[~keep_U] = 0
    getattr(attention, f"{which}_norm").weight.mul_(keep_U.double().mean().sqrt())


def _silence(layer, names, kind):
    path = names.mlp_output
    if kind == "attention":
        path = f"{names.attention}.{names.attention_output}"
    output = layer.get_submodule(path)
    for tensor in (output.weight, output.bias):
        if tensor is not None:
            tensor.zero_()


def _mask_hidden(model, names, keep_D):
    model.get_input_embeddings().weight[:, ~keep_D] *= 0
    trunk = model.get_submodule(names.layers.rpartition(".")[0])
    for parent in (trunk, *model.get_submodule(names.layers)):
        for name, module in list(parent.named_children()):
            if "Norm" in type(module).__name__:
                setattr(parent, name, NormOverSome(module, keep_D))
        convolution = getattr(parent, "conv", None)
        if convolution is not None:
            convolution.out_proj.weight[:, ~keep_D] = 0
            convolution.out_proj.weight[~keep_D] = 0


class NormOverSome(nn.Module):
    """A norm that sees only some dimensions, and gives zeros for the others."""

    def __init__(self, norm, keep_D):
        super().__init__()
        self.norm, self.keep_D = deepcopy(norm), keep_D
        for name, tensor in norm.named_parameters():
            setattr(self.norm, name, nn.Parameter(tensor[keep_D]))
        if hasattr(norm, "normalized_shape"):
            self.norm.normalized_shape = (int(keep_D.sum()),)

    def forward(self, x_BTD):
        y_BTD = torch.zeros_like(x_BTD)
        y_BTD[..., self.keep_D] = self.norm(x_BTD[..., self.keep_D])
        return y_BTD
