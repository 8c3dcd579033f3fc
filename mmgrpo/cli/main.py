"""The ``mmgrpo`` command and what it ends with.

Exit codes: 0 done, 2 wrong input (one sentence on stderr, nothing written), 1 failure,
130 interrupted after a finished, saved step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from mmgrpo import __version__
from mmgrpo.cli import compare, listing, playground, quickstart, runs, serve
from mmgrpo.errors import MmgrpoError

app = typer.Typer(
    name="mmgrpo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(runs.train)
app.command("eval")(runs.evaluate)
app.command()(runs.sample)
app.command()(listing.methods)
app.command()(compare.compare)
app.command()(serve.serve)
app.command()(playground.build)
app.command()(quickstart.quickstart)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"mmgrpo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show it.")
    ] = False,
) -> None:
    """Group-relative reinforcement learning of text, vision-language and image models."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: what follows ``mmgrpo``; None takes it from the process.

    Raises:
        Exception: whatever this package did not raise on purpose, with its traceback.
    """
    try:
        app(arguments, prog_name="mmgrpo")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except MmgrpoError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the one place that prints errors
        return error.exit_code
    return 0


def run() -> None:
    """Entry point of the installed ``mmgrpo`` script."""
    sys.exit(main())
