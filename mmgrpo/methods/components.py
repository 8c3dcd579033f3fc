"""Binding a component: a registered function with its options checked and filled in."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from mmgrpo.errors import MethodError, nearest
from mmgrpo.registry import component_names, resolve_component


def options_of(function: Callable[..., Any]) -> set[str]:
    """The names a preset may set: keyword-only parameters that the caller does not supply."""
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in SUPPLIED
    }


SUPPLIED = {"collective", "trust_region"}
"""Keyword parameters that the method passes itself."""


def bind(slot: str, spec: Mapping[str, Any], *, where: str) -> Callable[..., Any]:
    """Return the function that ``spec = {"name": ..., **options}`` names, options bound.

    Raises:
        MethodError: the component or one of its options does not exist.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name not in component_names(slot):
        known = component_names(slot)
        raise MethodError(f"{where}: unknown {slot} '{name}'{nearest(str(name), known)}")
    function = resolve_component(slot, name)
    check_options(options, options_of(function), where=f"{where} ({name})")
    return functools.partial(function, **options) if options else function


def check_options(options: Mapping[str, Any], known: set[str], *, where: str) -> None:
    """Raise :class:`MethodError` for the first option that is not known."""
    for key in options:
        if key not in known:
            raise MethodError(f"{where}: unknown option '{key}'{nearest(key, known)}")
