"""Models with a history, and all that a pass must leave as it was."""

from __future__ import annotations

import torch

# --- the model is left as it was --------------------------------------------------------------


def checkpoints(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def state_of(model):
    """Whatever scoring could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "parameters": [
            (p, p.grad, p.requires_grad, bool(p._backward_hooks), p._post_accumulate_grad_hooks)
            for p in model.parameters()
        ],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "values": [p.detach().clone() for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(getattr(m, name)) for m in model.modules() for name in hooks],
        "checkpointing": checkpoints(model),
        "grad mode": torch.is_grad_enabled(),
    }
