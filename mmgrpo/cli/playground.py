"""``build``: the playground's models and data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def build(
    task: Annotated[
        str,
        typer.Argument(help="A task of the playground, such as text, image or shapes; or all."),
    ] = "all",
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Each task gets a folder of its name in it.")
    ] = Path("playground"),
    seed: Annotated[int, typer.Option(min=0, help="Decides data and weights.")] = 0,
) -> None:
    """Build the playground's small models and data; they also ship with the package."""
    from mmgrpo.playground.build import build as build_playground

    for folder in build_playground(task, out, seed=seed, progress=typer.echo):
        typer.echo(folder)
