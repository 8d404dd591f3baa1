"""The command line on the tiny Llama."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from adapt_pruner.cli import main

TINY = ("--windows", 8, "--window-length", 12, "--steps", 2, "--tuning-steps", 1)
"""Settings with which a picomodel is pruned in no time."""
DENSE, IN_LAYERS, OTHER = 110_336, 93_888, 16_448
"""Parameters of the tiny Llama: 3 layers, hidden 64, 8 query / 4 KV heads, 96 neurons, biases."""


def run(*args: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "adapt_pruner", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )


class Fork:
    """The command line in a fork of this process, which need not import anything again.

    Args:
        prepare: called in the fork before the command.
        arguments: of the command.
    """

    def __init__(self, prepare: Callable[[], None], *arguments: object):
        readers, writers = zip(os.pipe(), os.pipe(), strict=True)
        self.id = os.fork()
        if self.id == 0:
            self._run(prepare, [str(argument) for argument in arguments], writers)
        for writer in writers:
            os.close(writer)
        self.out, self.err = (os.fdopen(reader) for reader in readers)

    def _run(self, prepare: Callable[[], None], arguments: list[str], writers: Any) -> None:
        status = 1
        try:
            for number, writer in enumerate(writers, 1):
                os.dup2(writer, number)
                os.close(writer)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            prepare()
            main(arguments)
            status = 0
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def end(self) -> tuple[int, str]:
        """Wait for it. Returns its status, as subprocess has it, and what it said to stderr."""
        with self.out, self.err:
            self.out.read()
            messages = self.err.read()
        _, status = os.waitpid(self.id, 0)
        return os.waitstatus_to_exitcode(status), messages


def read(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


def recipe_of(directory: Path) -> dict:
    return yaml.safe_load((directory / "recipe.yaml").read_text(encoding="utf-8"))


def size_of(directory: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(directory / "model.safetensors").values())


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def prune(cli, llama, text_file, tmp_path):
    """Prune the tiny Llama into `tmp_path / "out"`; returns that directory."""

    def command(*more: object, target=("--sparsity", 0.3), output: str = "out") -> Path:
        done = cli(
            "prune", llama, "-o", tmp_path / output, *target, *TINY, "--calibration", text_file,
            *more,
        )  # fmt: skip
        assert (done.status, done.err) == (0, ""), done.err
        return tmp_path / output

    return command
