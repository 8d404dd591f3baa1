"""Write checkpoints, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from .claims import check_replaceable, write_record
from .files import atomic_directory, check_output, write_json
from .model import older_readers
from .model import portable as portable_file
from .result import PRUNING_FILE, PruningResult

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
        overwrite: replace a directory that a run wrote.
        recipe: what to store as the recipe; default: the settings and target.
        name: what the model card calls the model; default: the directory's name.

    Raises:
        WritingError: if the directory exists, or holds what may not be replaced, or cannot be
            written.
    """
    from .report import write_account

    directory = Path(directory).expanduser()
    model = result.model
    check_place(
        directory, overwrite, sources=[getattr(model.config, "_name_or_path", None) or None]
    )
    with atomic_directory(directory, overwrite) as partial:
        _save_model(result, partial, portable)
        write_json(partial / PRUNING_FILE, result.record())
        recipe = recipe or {
            **result.resource.goal(result.target),
            **result.settings.model_dump(mode="json", exclude_defaults=True),
        }
        (partial / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")
        write_account(partial, name or directory.name, result)
        write_record(partial)
    return directory


def _save_model(result: PruningResult, partial: Path, portable: bool) -> None:
    """Weights, configuration and tokenizer, with what other readers need."""
    model = result.model
    model.save_pretrained(partial, max_shard_size=MAX_SHARD_SIZE)
    for weights in partial.glob("*.safetensors"):  # written for their owner alone
        weights.chmod((partial / "config.json").stat().st_mode)
    is_sliced = getattr(model.config, "sliced_hidden_size", None)
    if portable and (model.config.is_heterogeneous or is_sliced):
        portable_file.add_modeling_file(partial, model)
    else:
        portable_file.drop_remote_code(partial, model)
    older_readers.add_old_keys(partial)
    if result.tokenizer is not None:
        result.tokenizer.save_pretrained(partial)
        source = getattr(result.tokenizer, "name_or_path", None)
        older_readers.tidy_tokenizer(partial, source)


def check_place(
    directory: Path,
    overwrite: bool,
    needed_bytes: int = 0,
    sources: Iterable[str | Path | None] = (),
) -> None:
    """Raise WritingError now if a model could not be written to `directory` later. What is replaced
    must be what a run wrote and no other file, whatever `overwrite` says.

    Args:
        sources: names of what the run reads; those that are files must not be in `directory`.
    """
    check_output(directory, overwrite, needed_bytes)
    check_replaceable(directory, sources)
