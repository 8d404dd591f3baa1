"""`adapt-pruner with`"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from ..errors import InvalidSettings, LoadingError

STARTUP = Path(__file__).parents[1] / "startup"
"""Directory of the sitecustomize.py that imports this package."""


@click.command(
    "with",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND...")
def command(program: tuple[str, ...]) -> None:
    """Run COMMAND, a Python program, with this package imported in it.

    For programs that build a model by the name of its class and read no remote code. COMMAND is a
    program on the PATH or beside this one, a script, or -m and a module; all that follows is its
    own. Its workers import the package as well.

    \b
    adapt-pruner with transformers serve ./smaller
    adapt-pruner with trl sft --model_name_or_path ./smaller --dataset_name ./data
    adapt-pruner with -m my_package.train --config run.yaml
    """
    arguments = resolve(program)
    environment = {**os.environ, "PYTHONPATH": _with_startup(os.environ.get("PYTHONPATH", ""))}
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        # It takes this process's place: signals reach it, and its exit status is ours.
        environment["ADAPT_PRUNER_WITH"] = str(os.getpid())
        try:
            os.execve(arguments[0], arguments, environment)
        except OSError as error:
            raise LoadingError(
                f"'{arguments[0]}' cannot be run: {error.strerror}. Name a Python program."
            ) from error
    sys.exit(subprocess.run(arguments, env=environment, check=False).returncode)


def resolve(program: Sequence[str]) -> list[str]:
    """Return what to execute: the path of a program, and its arguments.

    Raises:
        InvalidSettings: if there is no such program or script.
    """
    name, *rest = program
    if name == "-m":
        if not rest:
            raise InvalidSettings("with: -m needs the name of a module.")
        return [sys.executable, "-m", *rest]
    if name.startswith("-"):
        raise InvalidSettings(
            f"with: expected a program, a script, or -m and a module; got '{name}'. Options of "
            "the program stand after its name."
        )
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise InvalidSettings(f"with: there is no script '{name}'.")
        return [sys.executable, name, *rest]
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        raise InvalidSettings(
            f"with: there is no program '{name}' on the PATH or in '{beside}'. Install the package "
            "that has it, or name a script ending in .py, or -m and a module."
        )
    return [found, *rest]


def _with_startup(path: str) -> str:
    return os.pathsep.join([str(STARTUP), *([path] if path else [])])
