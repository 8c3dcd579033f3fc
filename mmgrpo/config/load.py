"""From a file and ``key=value`` overrides to a checked configuration, or all errors at once."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmgrpo.config.explain import Origins, explain, origin
from mmgrpo.config.modalities import MODALITIES
from mmgrpo.config.paths import find_config
from mmgrpo.config.presets import check_preset
from mmgrpo.config.schema import Config
from mmgrpo.config.yaml_file import dump_yaml, parse_yaml
from mmgrpo.errors import ConfigError, MethodError, nearest

COMMAND_LINE = "command line"


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read, override and check a configuration.

    Args:
        source: a YAML file, the short name of a packaged one (``quickstart/text``), or a mapping.
        overrides: ``key.sub=value``; values are YAML. ``method=dapo`` swaps the method,
            ``method.advantage.scale=batch`` changes one of its options.

    Returns:
        A configuration in which every key has a value and every path that exists is absolute.

    Raises:
        ConfigError: with one line per error, each naming where it was written.
    """
    if isinstance(source, Mapping):
        data, origins, base = copy.deepcopy(dict(source)), Origins(), None
    else:
        file = find_config(source)
        data, origins = _read(file)
        base = file.parent
        data.setdefault("run_dir", f"runs/{file.stem}")
    for override in sorted(overrides, key=lambda item: item.partition("=")[0].count(".")):
        path, value = parse_override(override)
        apply_override(data, path, value)
        key = tuple(path)
        origins = {at: where for at, where in origins.items() if at[: len(key)] != key}
        origins[key] = COMMAND_LINE
    return _validate(data, origins, base)


def dump_config(config: Config) -> str:
    """Write a configuration as YAML that :func:`load_config` reads back unchanged."""
    return dump_yaml(config.model_dump())


def parse_override(text: str) -> tuple[list[str | int], Any]:
    """Split ``key.sub=value`` into a path and a YAML value."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{COMMAND_LINE}: '{text}' should have the form key.sub=value")
    path: list[str | int] = [int(part) if part.isdigit() else part for part in key.split(".")]
    return path, parse_yaml(value, f"{COMMAND_LINE}: {key}")[0]


def apply_override(data: dict[str, Any], path: Sequence[str | int], value: Any) -> None:
    """Set one value in place, making the mappings on its way.

    A method given by its id becomes a mapping as soon as one of its options is set.
    """
    target: Any = data
    for depth, key in enumerate(path[:-1]):
        inner = _get(target, key, path[: depth + 1])
        if depth == 0 and key == "method" and isinstance(inner, str):
            inner = {"id": inner}
        target[key] = {} if inner is None else inner
        target = target[key]
    _get(target, path[-1], path)
    target[path[-1]] = value


def _get(target: Any, key: str | int, path: Sequence[str | int]) -> Any:
    """Return ``target[key]`` (None if a mapping has none) or say why there is no such place."""
    if isinstance(target, dict):
        return target.get(key)
    shown = ".".join(map(str, path))
    if not isinstance(target, list):
        raise ConfigError(f"{COMMAND_LINE}: {shown} leads into {target!r}, which has no keys")
    if not isinstance(key, int) or key >= len(target):
        raise ConfigError(f"{COMMAND_LINE}: {shown} is not one of the {len(target)} list items")
    return target[key]


def _read(file: Path) -> tuple[dict[str, Any], Origins]:
    name = _display(file)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: cannot be read: {error}") from None
    data, lines = parse_yaml(text, name)
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: should be a mapping of keys to values, got {data!r:.60}")
    return data, {(): name, **{path: f"{name}:{line}" for path, line in lines.items()}}


def _display(file: Path) -> str:
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


def _validate(data: dict[str, Any], origins: Origins, base: Path | None) -> Config:
    modality = data.get("modality")
    if not isinstance(modality, str) or modality not in MODALITIES:
        where = origin(("modality",), origins)
        if modality is None:
            raise ConfigError(f"{where}modality is required: {', '.join(MODALITIES)}.")
        raise ConfigError(f"{where}unknown modality {modality!r}{nearest(modality, MODALITIES)}")
    schema, config = MODALITIES[modality], None
    errors = _method_errors(data.get("method", "grpo"), modality, origins)
    try:
        config = schema.model_validate(data, context=base)
    except ValidationError as error:
        errors = [*explain(error, schema, origins), *errors]
    if errors or config is None:
        raise ConfigError("\n".join(errors))
    return config


def _method_errors(method: Any, modality: str, origins: Origins) -> list[str]:
    name = method.get("id", "grpo") if isinstance(method, dict) else method
    if not isinstance(name, str):
        return []  # a wrong type, which the schema reports
    try:
        check_preset(name, modality)
    except MethodError as error:
        path = ("method", "id") if ("method", "id") in origins else ("method",)
        return [f"{origin(path, origins)}{error}"]
    return []
