"""``train``, ``eval`` and ``sample``: a configuration in, a run, numbers or samples out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="A YAML file, or a packaged one such as quickstart/text."
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes, such as method=dapo method.advantage.scale=batch trainer.steps=50.",
    ),
]
CheckpointOption = Annotated[
    Path, typer.Option(metavar="DIR", help="A checkpoint folder, or its hf/ folder.")
]


def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show configuration, plan and cost; write nothing.")
    ] = False,
) -> None:
    """Train a model; continue the run if its folder holds one."""
    from mmgrpo.config import dump_config, load_config

    loaded = load_config(config, overrides or ())
    from mmgrpo import build

    if not dry_run:
        build.train(loaded)
        return
    plan = build.plan(loaded)
    typer.echo(dump_config(loaded))
    typer.echo(plan)


def evaluate(
    config: ConfigArgument, checkpoint: CheckpointOption, overrides: OverridesArgument = None
) -> None:
    """Evaluate a checkpoint on the held-out prompts; show the numbers."""
    from mmgrpo.config import load_config

    loaded = load_config(config, overrides or ())
    from mmgrpo import build

    show_metrics(build.evaluate(loaded, checkpoint))


def sample(
    config: ConfigArgument,
    checkpoint: CheckpointOption,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the samples.")],
    overrides: OverridesArgument = None,
) -> None:
    """Sample from a checkpoint; write transcripts or images."""
    from mmgrpo.config import load_config

    loaded = load_config(config, overrides or ())
    from mmgrpo import build

    build.sample(loaded, checkpoint, out)
    typer.echo(out)


def show_metrics(metrics: dict[str, float]) -> None:
    """Print a table of metrics."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value")
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.4g}")
    Console().print(table)
