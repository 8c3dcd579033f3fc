"""Group-relative reinforcement learning of any generative model, with one loop.

The public names are imported when they are first used, so that ``import mmgrpo`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmgrpo import core as core
    from mmgrpo.api import Trainer as Trainer
    from mmgrpo.methods import load_method as load_method

__version__ = "0.1.0"

_LAZY = {
    "Trainer": "mmgrpo.api:Trainer",
    "core": "mmgrpo.core",
    "load_method": "mmgrpo.methods:load_method",
}

__all__ = ["Trainer", "__version__", "core", "load_method"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mmgrpo' has no attribute '{name}'")
    module, _, attribute = _LAZY[name].partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return __all__
