"""The run folder: what may be in it before a run, what opens it, and where its checkpoints are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmgrpo.config import Config
from mmgrpo.config.compare import first_difference
from mmgrpo.config.yaml_file import parse_yaml
from mmgrpo.errors import ConfigError


def check_run_folder(config: Config) -> None:
    """Refuse a folder that holds something else. Reads only.

    Hidden files are nobody's run: the system's, or what a process that was killed had not named.

    Raises:
        ConfigError: the folder holds another run, the checkpoint of another configuration, or
            files that are no run.
    """
    run_dir = Path(config.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir {run_dir} is a file; expected a folder or a new path.")
    if not run_dir.exists() or all(path.name.startswith(".") for path in run_dir.iterdir()):
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
    _compare(f"run_dir {run_dir} holds another run", saved, config)
    for path in checkpoints(run_dir)[-1:]:
        _compare(f"{path} is of another configuration", read_state(path)["config"], config)


def open_run_folder(run_dir: Path, config_text: str) -> None:
    """Make the folder and write the fully resolved configuration, atomically."""
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / ".config.yaml.partial"
    temporary.write_text(config_text, encoding="utf-8")
    temporary.replace(run_dir / "config.yaml")


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = run_dir.glob("checkpoints/step_*/state.json")
    return sorted((file.parent for file in found), key=lambda path: int(path.name[5:]))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the ``state.json`` of a checkpoint: ``state`` and ``config``.

    Raises:
        ConfigError: it cannot be read.
    """
    file = checkpoint / "state.json"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        found = {"state": dict(document["state"]), "config": dict(document["config"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not the state of a checkpoint: {error!r}.") from None
    return found


def _compare(what: str, saved: Any, config: Config) -> None:
    difference = first_difference(saved, config.model_dump())
    if difference:
        raise ConfigError(f"{what}: {difference}; use the same value, or another run_dir.")
