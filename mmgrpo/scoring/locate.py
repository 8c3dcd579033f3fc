"""Find a reward by name: in the package's table, in a module, or in a file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from mmgrpo.errors import ConfigError, UsageError, nearest


def locate(name: str) -> Any:
    """Return the function or class that a reward's name stands for.

    Args:
        name: one of the package's own, ``"module:function"`` or ``"path/file.py:function"``.

    Raises:
        ConfigError: nothing of that name, or its module does not import; the nearest is named.
    """
    if ":" not in name:
        table: Mapping[str, str] = importlib.import_module("mmgrpo.rewards").REWARDS
        if name not in table:
            raise ConfigError(
                f"unknown reward '{name}' (your own: 'module:function' or 'file.py:function')"
                f"{nearest(name, table)}"
            )
        name = table[name]
    place, _, attribute = name.rpartition(":")
    module = _import_file(place) if place.endswith(".py") else _import_module(place, attribute)
    target = getattr(module, attribute, None)
    if not callable(target):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ConfigError(
            f"reward: '{place}' has no function '{attribute}'{nearest(attribute, public)}"
        )
    return target


def _import_module(name: str, attribute: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except UsageError:
        raise
    except Exception as error:  # whatever the user's module raises while it is imported
        file = Path(name.replace(".", "/") + ".py")
        hint = f"; did you mean '{file}:{attribute}'?" if file.is_file() else "."
        raise ConfigError(
            f"reward: cannot import module '{name}' ({cause_of(error)}){hint}"
        ) from error


def _import_file(name: str) -> ModuleType:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigError(f"reward: file '{name}' does not exist{nearest(path.name, beside)}")
    module_name = f"mmgrpo_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"reward: '{name}' is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises while it is imported
        del sys.modules[module_name]
        raise ConfigError(f"reward: cannot import '{name}' ({cause_of(error)}).") from error
    return module


def cause_of(error: BaseException) -> str:
    """Return ``Type: message`` of an exception, on one line."""
    return " ".join(f"{type(error).__name__}: {error}"[:400].split())
