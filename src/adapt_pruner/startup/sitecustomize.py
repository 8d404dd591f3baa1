"""Python imports a module of this name when it starts. `adapt-pruner with` puts this one first.

It imports adapt_pruner, so that the program, and every Python that it starts (workers, launchers),
builds models whose layers differ. A sitecustomize that it hides is run as well.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec


def _run_hidden() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    places = [place for place in sys.path if os.path.abspath(place) != here]
    hidden = PathFinder.find_spec(__name__, places)
    if hidden is not None and hidden.loader is not None:
        hidden.loader.exec_module(module_from_spec(hidden))


def _import_package() -> None:
    try:
        import adapt_pruner  # noqa: F401
    except ImportError as error:
        sys.stderr.write(
            f"adapt-pruner: error: {sys.executable} runs this program and cannot import "
            f"adapt_pruner ({error}). Install the package there: "
            f"{sys.executable} -m pip install adapt-pruner\n"
        )
        sys.stderr.flush()
        if os.environ.get("ADAPT_PRUNER_WITH") == str(os.getpid()):  # the program, not a helper
            os._exit(1)


if __name__ == "sitecustomize":
    _run_hidden()
    _import_package()
