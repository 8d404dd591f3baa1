"""The command line: `adapt-pruner`, or `python -m adapt_pruner`."""

from .main import main as main
