"""``compare``: several methods on one playground task, under equal conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    methods: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="METHOD",
            help='Presets; changes in quotes: "flow-grpo advantage.scale=group".',
        ),
    ] = None,
    task: Annotated[str, typer.Option(help="text, vision or image.")] = "text",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per method.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of every run.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change of every run.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every preset that fits the task.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the runs.")] = None,
) -> None:
    """Compare methods: same task, seeds, initial weights and budget; a table and a page."""
    from mmgrpo.compare.contest import Contest, parse_entries
    from mmgrpo.config import list_presets

    names = list_presets(task) if everything else methods or []
    budget = [*(changes or []), *([f"trainer.steps={steps}"] if steps else [])]
    folder = out or Path("runs") / f"compare-{task}"
    contest = Contest(task, parse_entries(names, task), seeds, tuple(budget), folder)

    from mmgrpo.compare import run_contest, summarise
    from mmgrpo.compare.page import table, write_page

    run_contest(contest, jobs=jobs, progress=typer.echo)
    rows = summarise(contest)
    _show(*table(rows))
    typer.echo(f"page: {write_page(contest, rows)}")


def _show(header: list[str], cells: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    grid = Table(*header)
    for line in cells:
        grid.add_row(*line)
    Console().print(grid)
