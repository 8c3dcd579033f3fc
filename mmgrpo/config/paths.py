"""Where the files that a configuration names lie."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from mmgrpo.errors import ConfigError, nearest

PLAYGROUND = "playground:"
"""Prefix of paths inside the playground that ships with the package."""

_NO_RUNS = ("methods", "compare")
"""Folders of presets, and of what presets need on the playground."""
_MARKS = (PLAYGROUND, "./", "../", "~/", "/")


def packaged_folder(package: str) -> Path:
    """The folder of a package of ours, such as ``mmgrpo.configs``."""
    return Path(str(resources.files(package)))


def locate(value: str, base: Path | None = None) -> str:
    """Make a path absolute if it exists, else return it as it is: it may be a hub id.

    Args:
        value: ``playground:...``, or a path relative to the current folder or to ``base``.
        base: folder of the configuration file.

    Raises:
        ValueError: the playground has no such file.
    """
    if value.startswith(PLAYGROUND):
        return str(_in_playground(value.removeprefix(PLAYGROUND)))
    path = Path(value).expanduser()
    for candidate in (path, *([base / path] if base else [])):
        if value and candidate.exists():
            return str(candidate.resolve())
    return value


def locate_callable(name: str, base: Path | None = None) -> str:
    """Locate the file of ``file.py:function``; other names are returned as they are."""
    file, colon, function = name.rpartition(":")
    return f"{locate(file, base)}:{function}" if colon and file.endswith(".py") else name


def locate_marked(value: Any, base: Path | None = None) -> Any:
    """Locate the strings inside ``value`` that say that they are paths.

    They start with ``playground:``, ``./``, ``../``, ``~/`` or ``/``.
    """
    if isinstance(value, dict):
        return {key: locate_marked(item, base) for key, item in value.items()}
    if isinstance(value, list):
        return [locate_marked(item, base) for item in value]
    is_path = isinstance(value, str) and value.startswith(_MARKS)
    return locate(value, base) if is_path else value


def find_config(name: str | Path) -> Path:
    """Find a configuration file: a path, or the name of a packaged one.

    ``quickstart/text`` and ``configs/quickstart/text.yaml`` name the same packaged file.

    Raises:
        ConfigError: there is no such file; the message ends with the nearest packaged name.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path.resolve()
    short = str(name).removeprefix("configs/").removesuffix(".yaml")
    packaged = {config_name(file): file for file in packaged_configs()}
    if short in packaged:
        return packaged[short]
    raise ConfigError(f"no configuration file '{name}'{nearest(short, packaged)}")


def packaged_configs() -> list[Path]:
    """All packaged run configurations (not what stands beside them), sorted."""
    folder = packaged_folder("mmgrpo.configs")
    return [file for file in sorted(folder.glob("*/*.yaml")) if file.parent.name not in _NO_RUNS]


def config_name(file: Path) -> str:
    """The short name of a packaged configuration, such as ``quickstart/text``."""
    return f"{file.parent.name}/{file.stem}"


def _in_playground(inner: str) -> Path:
    assets = packaged_folder("mmgrpo.playground") / "assets"
    if not (assets / inner).exists():
        have = [file.relative_to(assets).as_posix() for file in assets.glob("*/*")]
        raise ValueError(f"the playground has no '{inner}'{nearest(inner, have)}")
    return assets / inner
