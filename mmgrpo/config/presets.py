"""The method presets as data: what validation and listings need, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmgrpo.config.paths import packaged_folder
from mmgrpo.config.yaml_file import parse_yaml
from mmgrpo.errors import MethodError, nearest


def preset_folder() -> Path:
    """The folder of the packaged presets."""
    return packaged_folder("mmgrpo.configs") / "methods"


def list_presets(modality: str | None = None) -> list[str]:
    """Sorted ids of all presets, or of those that fit a modality."""
    ids = sorted(path.stem for path in preset_folder().glob("*.yaml"))
    if modality is None:
        return ids
    return [name for name in ids if modality in read_preset(name)["modalities"]]


def read_preset(method_id: str) -> dict[str, Any]:
    """Read one preset as a mapping: header fields and slots.

    Raises:
        MethodError: no such preset; the message ends with the nearest id.
    """
    path = preset_folder() / f"{method_id}.yaml"
    if "/" in method_id or not path.is_file():
        raise MethodError(f"unknown method '{method_id}'{nearest(method_id, list_presets())}")
    preset, _ = parse_yaml(path.read_text(encoding="utf-8"), path.name)
    return dict(preset)


def check_preset(method_id: str, modality: str) -> None:
    """Raise :class:`MethodError` if there is no such preset or it does not fit the modality."""
    preset = read_preset(method_id)
    if modality not in preset["modalities"]:
        fits = ", ".join(preset["modalities"])
        others = ", ".join(list_presets(modality))
        raise MethodError(
            f"method '{method_id}' is for {fits}, not for {modality}; for {modality}: {others}"
        )
