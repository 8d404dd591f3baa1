"""Write what happened beside the result: for machines (run.json) and people (README.md)."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import pictures

if TYPE_CHECKING:
    from ..api import PruningResult

PACKAGES = ("adapt-pruner", "torch", "transformers", "datasets", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            found[package] = "unknown"
    return found


def run_record(result: PruningResult) -> dict[str, Any]:
    """Everything about a run in one JSON-compatible object."""
    return {
        "format": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source_model": getattr(result.model.config, "_name_or_path", "") or None,
        "target_parameters": result.target,
        "before": asdict(result.before),
        "after": asdict(result.after),
        "sparsity": result.sparsity,
        "settings": result.settings.model_dump(mode="json"),
        "widths_before": result.widths_before,
        "widths_after": result.widths_after,
        "steps": [asdict(step) for step in result.steps],
        "seconds": result.seconds,
        "measurements": result.measurements,
        **({"training": result.training} if result.training else {}),
        "versions": versions(),
    }


def write_account(directory: Path, name: str, result: PruningResult) -> None:
    """Write run.json, README.md and pictures/ into `directory`."""
    from ..checkpoint import write_json

    write_json(directory / "run.json", run_record(result))
    drawn = pictures.draw_all(directory / "pictures", result)
    (directory / "README.md").write_text(model_card(name, result, drawn), encoding="utf-8")


def model_card(name: str, result: PruningResult, drawn: Mapping[str, str]) -> str:
    """Return a model card in the hub's form. `drawn` maps picture files to their descriptions."""
    config, after, before = result.model.config, result.after, result.before
    source = getattr(config, "_name_or_path", "") or "a model in memory"
    on_hub = source.count("/") == 1 and not Path(source).exists()
    front = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([f"base_model: {source}", "base_model_relation: finetune"] if on_hub else []),
        "tags:",
        "- pruned",
        "- adapt-pruner",
        "---",
        "",
    ]
    shown = source if on_hub else Path(source).name
    need = "import adapt_pruner  # layers differ in width\n" if config.is_heterogeneous else ""
    body = [
        f"# {name}",
        "",
        f"`{shown}` made smaller by structured pruning with "
        "[adapt-pruner](https://arxiv.org/abs/2502.03460), without further training.",
        "",
        "| | before | after |",
        "| --- | --- | --- |",
        f"| parameters | {before.total:,} | {after.total:,} |",
        f"| in decoder layers | {before.decoder_layers:,} | {after.decoder_layers:,} "
        f"(−{result.sparsity:.2%}) |",
        f"| embeddings and others | {before.other:,} | {after.other:,} |",
        *(
            f"| {row} | {_figure(pair['before'])} | {_figure(pair['after'])} |"
            for row, pair in result.measurements.items()
        ),
        "",
        "## Load",
        "",
        "```python",
        f"{need}from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```",
        "",
        *(line for file, text in drawn.items() for line in (f"![{text}](pictures/{file})", "")),
        "## What is here",
        "",
        "| file | content |",
        "| --- | --- |",
        "| `config.json`, `*.safetensors`, tokenizer | the model, for transformers |",
        "| `pruning.json` | which units stayed, as indices into the original model |",
        "| `recipe.yaml` | repeats this run: `adapt-pruner prune -o DIR --recipe recipe.yaml` |",
        "| `run.json` | settings, every step in figures, versions |",
        "",
    ]
    return "\n".join([*front, *body])


def _figure(value: float) -> str:
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
