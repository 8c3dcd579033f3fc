"""``serve``: vLLM as a server that a training run samples from and sends its weights to."""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from mmgrpo.cli.runs import ConfigArgument, OverridesArgument
from mmgrpo.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from mmgrpo.config import Config

DEFAULT_URL = "http://127.0.0.1:8000"


def serve(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show vLLM's command; start nothing.")
    ] = False,
) -> None:
    """Start the vLLM server that rollout.engine.url of a run names; Ctrl-C ends it."""
    from mmgrpo.config import load_config

    command, environment = server_command(load_config(config, overrides or ()))
    if dry_run:
        typer.echo(" ".join(f"{name}={value}" for name, value in environment.items()))
        typer.echo(shlex.join(command))
        return
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm")
    # vLLM takes this process over, so that signals reach it.
    os.execve(command[0], command, {**os.environ, **environment})  # noqa: S606 - no shell


def server_command(config: Config) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts vLLM for a run, and what it adds to the environment.

    Raises:
        ConfigError: the run has no tokens to sample, or its URL has no port.
    """
    from mmgrpo.modalities.tokens import vllm_model
    from mmgrpo.rollout.vllm_arguments import SERVER_ENVIRONMENT, engine_arguments, server_flags

    engine = getattr(config.rollout, "engine", None)
    if engine is None:
        raise ConfigError(
            f"vLLM samples text, and the modality is '{config.modality}'; expected text or vision."
        )
    place = urlsplit(engine.url or DEFAULT_URL)
    if place.hostname is None or place.port is None:
        raise ConfigError(f"rollout.engine.url is '{engine.url}'; expected http://host:port.")
    model = vllm_model(config)  # type: ignore[arg-type]
    arguments = engine_arguments(
        model["model"],
        dtype=model["dtype"],
        lora_rank=model["lora_rank"],
        options=model["options"],
    )
    flags = server_flags(arguments, host=place.hostname, port=place.port)
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags], SERVER_ENVIRONMENT
