"""The run folder: what may be in it before a run, and what opens it."""

from __future__ import annotations

import os
from pathlib import Path

from mmgrpo.config import Config
from mmgrpo.config.compare import first_difference
from mmgrpo.config.yaml_file import parse_yaml
from mmgrpo.errors import ConfigError


def check_run_folder(config: Config) -> None:
    """Refuse a folder that holds something else. Reads only.

    Raises:
        ConfigError: the folder holds another run, or files that are no run.
    """
    run_dir = Path(config.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir {run_dir} is a file; expected a folder or a new path.")
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise ConfigError(
            f"run_dir {run_dir} is not empty and holds no run (no config.yaml); choose a new path."
        )
    if config.resume == "never":
        raise ConfigError(
            f"run_dir {run_dir} already holds a run and resume is 'never'; choose a new path, "
            "or resume=auto to continue it."
        )
    saved = parse_yaml(file.read_text(encoding="utf-8"), str(file))[0]
    difference = first_difference(saved, config.model_dump())
    if difference:
        raise ConfigError(
            f"run_dir {run_dir} holds another run: {difference}; use the same value, or another "
            "run_dir."
        )


def open_run_folder(run_dir: Path, config_text: str) -> None:
    """Make the folder and write the fully resolved configuration, atomically."""
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / ".config.yaml.partial"
    temporary.write_text(config_text, encoding="utf-8")
    os.replace(temporary, run_dir / "config.yaml")
