"""Write checkpoints, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from . import portable as portable_file
from .api import PRUNING_FILE, PruningResult
from .errors import AdaptPrunerError, WritingError

MAX_SHARD_SIZE = "5GB"


def save_result(
    result: PruningResult,
    directory: str | Path,
    portable: bool = False,
    overwrite: bool = False,
    recipe: dict[str, Any] | None = None,
    name: str | None = None,
) -> Path:
    """Write the pruned model so that `AutoModelForCausalLM.from_pretrained(directory)` loads it.

    The directory gets config, sharded safetensors, generation config, tokenizer, `pruning.json`
    (what was cut), `recipe.yaml`, `run.json`, a model card and pictures. It appears whole or not
    at all.

    Args:
        portable: add a modelling file and `auto_map` for readers who do not import this package
            (not needed, and not written, where all layers are equal).
        overwrite: replace a directory that exists.
        recipe: what to store as the recipe; default: the settings and target.
        name: what the model card calls the model; default: the directory's name.

    Raises:
        WritingError: if the directory exists, or cannot be written.
    """
    from .report import write_account

    directory = Path(directory).expanduser()
    model = result.model
    with atomic_directory(directory, overwrite) as partial:
        model.save_pretrained(partial, max_shard_size=MAX_SHARD_SIZE)
        for weights in partial.glob("*.safetensors"):  # written for their owner alone
            weights.chmod((partial / "config.json").stat().st_mode)
        if portable and model.config.is_heterogeneous:
            portable_file.add_modeling_file(partial, model)
        else:
            portable_file.drop_remote_code(partial, model)
        if result.tokenizer is not None:
            result.tokenizer.save_pretrained(partial)
        write_json(partial / PRUNING_FILE, result.record())
        recipe = recipe or {
            "params": result.target,
            **result.settings.model_dump(mode="json", exclude_defaults=True),
        }
        (partial / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")
        write_account(partial, name or directory.name, result)
    return directory


def check_output(directory: Path, overwrite: bool, needed_bytes: int = 0) -> None:
    """Raise WritingError now if `directory` could not be written later."""
    place = directory.expanduser().resolve()
    if place.exists() and not place.is_dir():
        raise WritingError(f"'{directory}' is a file; name a directory.")
    if place.exists() and any(place.iterdir()) and not overwrite:
        raise WritingError(
            f"'{directory}' exists and is not empty. Name another directory, or pass --overwrite."
        )
    if os.path.ismount(place):
        raise WritingError(f"'{directory}' is a mount point; name a directory inside it.")
    parent = next(parent for parent in place.parents if parent.exists())
    if not parent.is_dir():
        raise WritingError(f"'{directory}' lies below '{parent}', a file; name another directory.")
    if not os.access(parent, os.W_OK):
        raise WritingError(f"'{parent}' cannot be written to; name a directory elsewhere.")
    free = shutil.disk_usage(parent).free
    if needed_bytes > free:
        raise WritingError(
            f"The result needs about {needed_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are "
            f"free at '{parent}'. Free some space, or name a directory on another disk."
        )


@contextmanager
def atomic_directory(directory: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden directory beside `directory` that takes its place when the block succeeds.

    If the block fails, or the process is killed, what was there before is still there.

    Raises:
        WritingError: for whatever the disk refuses.
    """
    check_output(directory, overwrite)
    place = directory.expanduser().resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(place, "partial")
    try:
        partial.mkdir()
        yield partial
        _take_place(partial, place)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, AdaptPrunerError) or not isinstance(error, (OSError, SafetensorError)):
            raise
        why = "the disk is full" if is_full_disk(error) else str(error)
        raise WritingError(
            f"'{directory}' could not be written: {why}. What was there is unchanged; free some "
            "space or name another directory, and run again."
        ) from error


def _beside(place: Path, what: str) -> Path:
    return place.with_name(f".{place.name}.{what}-{secrets.token_hex(4)}")


def _take_place(new: Path, place: Path) -> None:
    """Rename `new` to `place`; if that fails, what is there is put back."""
    if not place.exists():
        os.replace(new, place)
        return
    old = _beside(place, "old")
    os.replace(place, old)
    try:
        os.replace(new, place)
    except BaseException:
        os.replace(old, place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed for lack of space; safetensors says so only in its message."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (
        "No space left on device" in str(error)
    )


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
