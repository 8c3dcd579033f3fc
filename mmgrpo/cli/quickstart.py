"""``quickstart``: the three playground runs through the ordinary ``train`` path, and one table."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mmgrpo.config import Config

TASKS = ("text", "vision", "image")
SUCCESS = "eval/success"
PICTURES = ("before_after.*", "curve.svg")


@dataclass(frozen=True)
class Outcome:
    """What a finished run shows for itself.

    Attributes:
        task: the modality.
        before, after: first and last success on the held-out prompts, in [0, 1].
        seconds: wall time of this command's part of the run.
        run_dir: the run's folder.
    """

    task: str
    before: float
    after: float
    seconds: float
    run_dir: Path


def quickstart(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to all three.")
    ] = None,
) -> None:
    """Train the three playground tasks and show what they learned."""
    from mmgrpo.config import load_config

    configs = [load_config(f"quickstart/{task}", overrides or ()) for task in TASKS]
    show([run(config) for config in configs])


def run(config: Config) -> Outcome:
    """Train one configuration and read its outcome from the run folder."""
    from mmgrpo import build

    start = time.perf_counter()
    build.train(config)
    seconds = time.perf_counter() - start
    run_dir = Path(config.run_dir)
    success = read_metric(run_dir, SUCCESS) or [math.nan]  # an override switched it off
    return Outcome(config.modality, success[0], success[-1], seconds, run_dir)


def read_metric(run_dir: Path, name: str) -> list[float]:
    """The values of a metric in the order of the steps that have it."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


def find_pictures(run_dir: Path) -> list[Path]:
    """What a finished run shows: samples before and after, and its curve."""
    return [file for pattern in PICTURES for file in sorted(run_dir.glob(pattern))]


def show(outcomes: list[Outcome]) -> None:
    """Print the table, and the pictures of each run under it."""
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "success before", "success after", "seconds", "run directory")
    for outcome in outcomes:
        rates = (f"{rate:.2f}" for rate in (outcome.before, outcome.after))
        table.add_row(outcome.task, *rates, f"{outcome.seconds:.0f}", str(outcome.run_dir))
    console = Console()
    console.print(table)
    for outcome in outcomes:
        for picture in find_pictures(outcome.run_dir):
            console.print(f"picture: {picture}", soft_wrap=True, highlight=False)
