"""``compare``: several methods on one playground task, under equal conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(  # noqa: PLR0913, PLR0917 - each is an option of the command
    methods: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="METHOD",
            help='Presets; changes in quotes: "flow-grpo advantage.scale=group".',
        ),
    ] = None,
    task: Annotated[str, typer.Option(help="text, vision, image, ...: quickstart/TASK.")] = "text",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per method.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of every run.")] = None,
    decisions: Annotated[
        int | None, typer.Option(min=1, help="Generated decisions of every run, in place of steps.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Seconds of training of every run.")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change of every run.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every preset that fits the task.")
    ] = False,
    published: Annotated[
        bool, typer.Option(help="Settings as published, not as the task's scale needs them.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the runs.")] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Markdown file to put the table into.")
    ] = None,
) -> None:
    """Compare methods: same task, seeds, initial weights and budget; a table and a page."""
    from mmgrpo.compare.contest import Budget, Contest, parse_entries, task_modality
    from mmgrpo.config import list_presets

    names = list_presets(task_modality(task)) if everything else methods or []
    contest = Contest(
        task,
        parse_entries(names, task, published=published),
        seeds,
        Budget(steps, decisions, seconds),
        out or Path("runs") / f"compare-{task}",
        tuple(changes or ()),
    )

    from mmgrpo.compare import run_contest, summarise
    from mmgrpo.compare.page import insert, table, write_page

    run_contest(contest, jobs=jobs, progress=typer.echo)
    rows = summarise(contest)
    _show(*table(rows))
    if write is not None:
        insert(write, contest, rows)
    typer.echo(f"page: {write_page(contest, rows)}")


def _show(header: list[str], cells: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    count = columns_that_fit([header, *cells], console.width)
    grid = Table(*header[:count])
    for line in cells:
        grid.add_row(*line[:count])
    console.print(grid)
    if count < len(header):
        console.print(f"The page also has: {', '.join(header[count:])}.")


def columns_that_fit(lines: list[list[str]], width: int) -> int:
    """How many leading columns of a table stand side by side unbroken; at least one."""
    needed = [max(map(len, column)) + 3 for column in zip(*lines, strict=True)]
    fitting = sum(1 for end in range(1, len(needed) + 1) if sum(needed[:end]) < width)
    return max(fitting, 1)
