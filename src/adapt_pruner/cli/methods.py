"""`adapt-pruner methods`"""

from __future__ import annotations

import json
from typing import Any

import click


@click.command("methods")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(name: str | None, as_json: bool) -> None:
    """List the pruning methods: paper, what each cuts and needs; of NAME, its settings too.

    \b
    adapt-pruner methods
    adapt-pruner methods adapt-pruner
    """
    from ..methods import METHODS, method_named

    found = {name: method_named(name)} if name else dict(METHODS.loaded())
    rows = {each: _described(method, with_settings=bool(name)) for each, method in found.items()}
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        _show(rows)


def _described(method: Any, with_settings: bool) -> dict[str, Any]:
    from ..settings import PruneSettings

    row = {
        "summary": method.summary,
        "paper": method.paper,
        "cuts": sorted(method.cuts),
        "needs": method.needs,
        "presets": list(method.presets),
    }
    if with_settings:
        row["settings"] = {
            name: {
                "default": _plain(field.get_default()),
                "description": field.description,
            }
            for name, field in method.settings.model_fields.items()
            if name != "method" and not _is_shared(field, PruneSettings.model_fields.get(name))
        }
    return row


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else getattr(value, "value", value)


def _is_shared(field: Any, of_all: Any) -> bool:
    return of_all is not None and field.default == of_all.default


def _show(rows: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    from .console import out

    table = Table(box=None, pad_edge=False)
    for column in ("method", "cuts", "needs", "paper", ""):
        table.add_column(column, overflow="fold")
    for name, row in rows.items():
        presets = f" Presets: {', '.join(row['presets'])}." if row["presets"] else ""
        table.add_row(
            name, ", ".join(row["cuts"]), row["needs"], row["paper"], row["summary"] + presets
        )
    out.print(table)
    for name, row in rows.items():
        for setting, told in row.get("settings", {}).items():
            default = told["default"]
            flag = setting.replace("_", "-")
            out.print(f"  --{flag} [dim]\\[{default}][/]  {told['description']}", soft_wrap=True)
        if "settings" in row:
            out.print(f"All settings: adapt-pruner prune --method {name} --help", soft_wrap=True)
