"""Write what happened beside the result: for machines (run.json) and people (README.md)."""

from __future__ import annotations

import platform
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import pictures

if TYPE_CHECKING:
    from ..result import PruningResult

REPORT_FILE = "report.html"
PACKAGES = ("adapt-pruner", "torch", "transformers", "datasets", "safetensors", "tokenizers")


def versions_used() -> dict[str, str]:
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
    source = getattr(result.model.config, "_name_or_path", "")
    return {
        "format": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source_model": source or None,
        "base_model": _hub_name(source),
        **result.target_record(),
        "before": asdict(result.before),
        "after": asdict(result.after),
        "sparsity": result.sparsity,
        "settings": result.settings.model_dump(mode="json"),
        "widths_before": result.widths_before,
        "widths_after": result.widths_after,
        "layers_left": result.layers,
        "steps": [asdict(step) for step in result.steps],
        "seconds": result.seconds,
        "measurements": result.measurements,
        "protocol": result.protocol or None,
        **({"training": result.training} if result.training else {}),
        "versions": versions_used(),
    }


def _hub_name(source: str) -> str | None:
    return source if source.count("/") == 1 and not Path(source).exists() else None


def write_account(directory: Path, name: str, result: PruningResult) -> None:
    """Write run.json, README.md, report.html and pictures/ beside the other files of a run."""
    from ..files import write_json
    from .card import model_card
    from .record import RUN_FILE, read_run

    write_json(directory / RUN_FILE, run_record(result))
    drawn = pictures.draw_all(directory / "pictures", result)
    run = read_run(directory, name)
    (directory / "README.md").write_text(model_card(run, drawn), encoding="utf-8")
    write_page(directory, name)


def write_page(directory: Path, name: str | None = None) -> None:
    """Write report.html from what the directory of a run holds."""
    from .page import render
    from .record import read_run

    page = render([read_run(directory, name)])
    (directory / REPORT_FILE).write_text(page, encoding="utf-8")
