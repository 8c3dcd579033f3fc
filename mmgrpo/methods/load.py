"""From a preset file and overrides to a composed :class:`~mmgrpo.methods.method.Method`."""

from __future__ import annotations

from typing import Any

from mmgrpo.config.presets import read_preset
from mmgrpo.errors import MethodError, nearest
from mmgrpo.methods.method import SLOTS, Method


def load_method(method_id: str, **overrides: Any) -> Method:
    """Compose a published method.

    Args:
        method_id: a preset id, such as ``"dapo"``.
        **overrides: slots to change, nested (``advantage={"scale": "none"}``) or dotted
            (``**{"advantage.scale": "none"}``). Only the named options change; None is a slot's
            default.

    Raises:
        MethodError: unknown id, slot, component or option, with the nearest valid name; a wrong
            type; choices that contradict each other.
    """
    preset = read_preset(method_id)
    for key, value in overrides.items():
        slot, *path = key.split(".")
        if slot not in SLOTS:
            raise MethodError(f"method {method_id}: unknown slot '{slot}'{nearest(slot, SLOTS)}")
        preset[slot] = _merge(preset.get(slot), _nest(path, value))
    return Method.compose(preset)


def _nest(path: list[str], value: Any) -> Any:
    for name in reversed(path):
        value = {name: value}
    return value


def _merge(old: Any, new: Any) -> Any:
    """Merge options; naming another component drops the options of the one it replaces."""
    if not isinstance(new, dict):
        return new
    if isinstance(old, str):
        old = {"name": old}
    if not isinstance(old, dict) or new.get("name", old.get("name")) != old.get("name"):
        return new
    return {**old, **{key: _merge(old.get(key), value) for key, value in new.items()}}
