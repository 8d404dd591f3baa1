"""Pruning methods, one file each, and the table of them."""

from .adapt_pruner import PruningStep as PruningStep
from .adapt_pruner import adapt_pruner

METHODS = {
    "adapt-pruner": adapt_pruner,  # https://arxiv.org/abs/2502.03460
}
