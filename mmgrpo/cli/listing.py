"""``methods``: what can be trained with."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

HEADER = ("id", "title", "paper", "family", "modalities", "confidence", "notes")


def methods(
    method_id: Annotated[
        str | None, typer.Argument(metavar="ID", help="Show only this method, in full.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list of objects.")] = False,
) -> None:
    """List the methods, or show one."""
    from mmgrpo.config import list_presets

    records = [describe(name) for name in ([method_id] if method_id else list_presets())]
    if as_json:
        typer.echo(json.dumps(records, indent=2))
    elif method_id:
        _show_one(records[0])
    else:
        _show_table(records)


def describe(method_id: str) -> dict[str, Any]:
    """Return id, title, paper, family, modalities, needs and components of a method.

    The method is composed, so what is listed runs.

    Raises:
        MethodError: no such preset.
    """
    from mmgrpo.config import read_preset

    preset = read_preset(method_id)
    from mmgrpo.methods import load_method

    record = {key: preset[key] for key in ("id", "title", "paper", "family", "modalities")}
    record["needs"] = sorted(load_method(method_id).needs)
    record["components"] = {key: value for key, value in preset.items() if key not in HEADER}
    return record


def _show_table(records: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "title", "paper", "family", "modalities", "needs")
    for record in records:
        cells = (record[key] for key in ("id", "title", "paper", "family", "modalities", "needs"))
        table.add_row(*(", ".join(cell) if isinstance(cell, list) else cell for cell in cells))
    Console().print(table)


def _show_one(record: dict[str, Any]) -> None:
    from mmgrpo.config.yaml_file import dump_yaml

    typer.echo(dump_yaml(record), nl=False)
