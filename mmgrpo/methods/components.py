"""From a preset's plain values to bound components and typed options, everything checked."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from mmgrpo.errors import MethodError, nearest
from mmgrpo.registry import names, resolve

Options = TypeVar("Options")

SUPPLIED = {"collective", "ddof", "divergence", "eps", "segment", "step_std", "trust_region"}
"""Keyword parameters that the method passes itself."""


def spec_of(value: Any, default: str | None, *, where: str) -> dict[str, Any]:
    """A component spec as a mapping: None, a bare name, or ``{name: ..., **options}``.

    Raises:
        MethodError: neither, or a mapping that names no component where there is no default.
    """
    value = default if value is None else value
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, Mapping) or (default is None and "name" not in value):
        raise MethodError(
            f"{where}: expected a component's name or {{name: ..., options}}, got {value!r}."
        )
    return {"name": default, **value}


def specs_of(value: Any, *, where: str) -> list[dict[str, Any]]:
    """The specs of a slot that takes several components in order, or one, or none."""
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return [spec_of(item, None, where=where) for item in values]


def bind(slot: str, spec: Mapping[str, Any], *, where: str) -> Callable[..., Any]:
    """Return the function that ``spec = {"name": ..., **options}`` names, options bound.

    Raises:
        MethodError: the component or one of its options does not exist, or has a wrong type.
    """
    options = dict(spec)
    name = options.pop("name", None)
    known = names(slot)
    if name not in known:
        raise MethodError(f"{where}: unknown {slot} '{name}'{nearest(str(name), known)}")
    function = resolve(slot, name)
    hints = _hints(function)
    types = {key: hints[key] for key in options_of(function)}
    checked = check_options(options, types, where=f"{where}: {slot} {name}")
    return functools.partial(function, **checked) if checked else function


def options_of(function: Callable[..., Any]) -> set[str]:
    """The names a preset may set: keyword-only parameters that the caller does not supply."""
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in SUPPLIED
    }


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a component has the parameter ``name``, bound or not."""
    return name in inspect.signature(function).parameters


def with_default(function: Callable[..., Any], **values: Any) -> Callable[..., Any]:
    """Bind the values that are parameters of ``function`` and that no preset has set."""
    bound = function.keywords if isinstance(function, functools.partial) else {}
    missing = {k: v for k, v in values.items() if accepts(function, k) and k not in bound}
    return functools.partial(function, **missing) if missing else function


def make_options(kind: type[Options], values: Any, *, where: str) -> Options:
    """Build an options dataclass from a mapping, refusing unknown keys and wrong types."""
    if values is not None and not isinstance(values, Mapping):
        raise MethodError(f"{where}: expected a mapping of options, got {values!r}.")
    checked = check_options(values or {}, _hints(kind), where=where)
    try:
        return kind(**checked)
    except ValueError as error:
        raise MethodError(f"{where}: {error}") from None


def check_options(
    options: Mapping[str, Any], types: Mapping[str, Any], *, where: str
) -> dict[str, Any]:
    """Return the options as their types (name -> annotation) want them.

    Raises:
        MethodError: the first option that is not known or has a wrong type.
    """
    for key in options:
        if key not in types:
            raise MethodError(f"{where}: unknown option '{key}'{nearest(str(key), types)}")
    return {key: _typed(value, types[key], f"{where}.{key}") for key, value in options.items()}


def _hints(target: Any) -> dict[str, Any]:
    return typing.get_type_hints(target, include_extras=True)


def _typed(value: Any, annotation: Any, where: str) -> Any:
    if is_dataclass(annotation):
        return make_options(typing.cast("type[Any]", annotation), value, where=where)
    value = tuple(value) if isinstance(value, list) else value
    try:
        return TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError as error:
        raise MethodError(f"{where}: {error.errors()[0]['msg']}; got {value!r}.") from None
