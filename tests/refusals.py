"""Runs of the command line that must be refused, and changed copies of the tiny Llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def workplace(llama, text_file, tmp_path, monkeypatch) -> Path:
    """The current directory, with `llama` and `text.txt` in it."""
    (tmp_path / "llama").symlink_to(llama)
    (tmp_path / "text.txt").symlink_to(text_file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refuse(cli, workplace) -> Callable[..., None]:
    """Run `adapt-pruner prune llama -o out` with more arguments, and look at its refusal.

    The message must hold `says`; nothing may be created, and the output directory must not be.
    """

    def check(
        *more: object,
        says: str | tuple[str, ...],
        model: object = "llama",
        target: tuple[object, ...] = ("--sparsity", 0.2),
        calibration: object = "text.txt",
        output: object = "out",
        status: int = 1,
    ) -> None:
        before = snapshot(workplace)
        done = cli(
            "prune", model, "-o", output, *target, "--calibration", calibration,
            "--windows", 4, "--window-length", 12, "--steps", 1, *more,
        )  # fmt: skip
        message = done.err
        assert message.startswith("adapt-pruner: error: "), message
        assert message.count("\n") == 1, message
        assert len(message) < 600, message
        assert done.out == ""
        assert done.status == status
        for part in (says,) if isinstance(says, str) else says:
            assert part in message, message
        for word in ("Traceback", "Unexpected", "site-packages", "None"):
            assert word not in message
        assert message.endswith((".\n", "?\n", "mobilellm.\n")), message
        assert snapshot(workplace) == before

    return check


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, and every directory, by name."""
    paths = sorted(directory.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths}
