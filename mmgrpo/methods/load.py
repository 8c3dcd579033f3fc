"""From a preset file and overrides to a composed :class:`~mmgrpo.methods.method.Method`."""

from __future__ import annotations

import copy
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mmgrpo.errors import MethodError, nearest
from mmgrpo.methods.method import SLOTS, Method

HEADER = ("id", "title", "paper", "family", "modalities", "confidence", "notes", "requires")


def preset_folder() -> Path:
    """The folder of the packaged presets."""
    return Path(str(resources.files("mmgrpo.configs"))) / "methods"


def list_presets() -> list[str]:
    """Ids of all presets, sorted."""
    return sorted(path.stem for path in preset_folder().glob("*.yaml"))


def read_preset(method_id: str) -> dict[str, Any]:
    """Read one preset as a mapping, or raise :class:`MethodError` naming the nearest id."""
    path = preset_folder() / f"{method_id}.yaml"
    if not path.is_file():
        raise MethodError(f"unknown method '{method_id}'{nearest(method_id, list_presets())}")
    preset = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown = set(preset) - set(HEADER) - set(SLOTS)
    if unknown:
        name = sorted(unknown)[0]
        raise MethodError(f"{path.name}: unknown slot '{name}'{nearest(name, SLOTS)}")
    return preset


def load_method(method_id: str, **overrides: Any) -> Method:
    """Compose a published method.

    Args:
        method_id: a preset id, such as ``"dapo"``.
        **overrides: slots to change, nested (``advantage={"scale": "none"}``) or dotted
            (``**{"advantage.scale": "none"}``). Only the named options change.

    Raises:
        MethodError: unknown id, slot, component or option, with the nearest valid name.
    """
    preset = copy.deepcopy(read_preset(method_id))
    for key, value in overrides.items():
        slot, *path = key.split(".")
        if slot not in SLOTS:
            raise MethodError(f"method {method_id}: unknown slot '{slot}'{nearest(slot, SLOTS)}")
        preset[slot] = _merge(preset.get(slot), _nest(path, value), f"method.{key}")
    return Method.compose(preset)


def _nest(path: list[str], value: Any) -> Any:
    for name in reversed(path):
        value = {name: value}
    return value


def _merge(old: Any, new: Any, where: str) -> Any:
    """Merge options; naming another component drops the options of the one it replaces."""
    if not isinstance(new, dict):
        return new
    if isinstance(old, str):
        old = {"name": old}
    if not isinstance(old, dict) or new.get("name", old.get("name")) != old.get("name"):
        return new
    changed = {key: _merge(old.get(key), value, f"{where}.{key}") for key, value in new.items()}
    return {**old, **changed}
