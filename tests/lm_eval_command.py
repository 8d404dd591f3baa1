"""lm-eval's own command line, after `import adapt_pruner`."""

from lm_eval.__main__ import cli_evaluate

import adapt_pruner  # noqa: F401  (reads layers of different width)

if __name__ == "__main__":
    cli_evaluate()
