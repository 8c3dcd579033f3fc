"""Turning what pydantic found into one line per error: where, what, and the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mmgrpo.config.modalities import MODALITIES
from mmgrpo.errors import nearest

Path = tuple[str | int, ...]
Origins = dict[Path, str]

_SILENT = {"default_factory_not_called"}  # the field it depends on has its own line


def explain(error: ValidationError, schema: type[BaseModel], origins: Origins) -> list[str]:
    """Return one line per error, in the order of the schema.

    Args:
        error: what validation raised.
        schema: the class that was validated.
        origins: path of a key -> where it was written (``file:line``).
    """
    return [
        f"{origin(item['loc'], origins)}{_describe(item, schema)}"
        for item in error.errors()
        if item["type"] not in _SILENT
    ]


def origin(path: Path, origins: Origins) -> str:
    """Where a key, or what should contain it, was written: ``"file:line: "`` or nothing."""
    for length in range(len(path), -1, -1):
        if path[:length] in origins:
            return f"{origins[path[:length]]}: "
    return ""


def known_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted paths of all keys of a schema, sections included."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from known_keys(inner, f"{prefix}{name}.")


def _describe(item: Any, schema: type[BaseModel]) -> str:
    key, kind = ".".join(map(str, item["loc"])), item["type"]
    if kind == "extra_forbidden":
        return f"{key} is not a known key{_nearest_key(key, schema)}"
    if kind == "missing":
        return f"{key} is required"
    if kind == "value_error":
        return f"{key}: {item['ctx']['error']}"
    message = item["msg"].replace("Input should", "should")
    hint = nearest(str(item["input"]), _choices(item)) if kind == "literal_error" else ""
    return f"{key} {message}, got {_show(item['input'])}{hint if 'did you mean' in hint else ''}"


def _nearest_key(key: str, schema: type[BaseModel]) -> str:
    """Name the modalities that have the key, or suggest one of this modality's keys.

    A key of the same section goes before the same name in another section.
    """
    section, _, name = key.rpartition(".")
    inside = {
        k.rpartition(".")[2]: k for k in known_keys(schema) if k.rpartition(".")[0] == section
    }
    anywhere = {k.rpartition(".")[2]: k for k in reversed(list(known_keys(schema)))}
    owners = [mode for mode, other in MODALITIES.items() if key in known_keys(other)]
    if owners:
        return f" of this modality (only of {' and '.join(owners)}){_list(inside)}"
    for table, cutoff in ((inside, 0.6), (anywhere, 0.7)):
        close = difflib.get_close_matches(name, table, n=1, cutoff=cutoff)
        if close:
            return f"; did you mean '{table[close[0]]}'?"
    return _list(inside)


def _list(keys: Mapping[str, str]) -> str:
    return f"; valid: {', '.join(sorted(keys))}." if keys else ""


def _choices(item: Any) -> list[str]:
    return item["ctx"]["expected"].split("'")[1::2]


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
