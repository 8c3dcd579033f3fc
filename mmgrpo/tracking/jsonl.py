"""``metrics.jsonl``: one JSON object per step, on disk before the next step starts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmgrpo.errors import DataError


class JsonlTracker:
    """Appends one line per step; NaN and infinity become null.

    A line that a crash or a full disk cut short is removed before the next one is written.

    Args:
        path: the file; its folder is made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Append the step's line and wait until it is on disk.

        Raises:
            OSError: it could not be written; the file is as before.
        """
        values = {name: _plain(value) for name, value in metrics.items()}
        line = json.dumps({"step": step} | values | {"step": step})
        with self.path.open("ab") as stream:
            start = _whole_length(self.path)
            stream.truncate(start)
            try:
                stream.write(line.encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
            except OSError:
                os.truncate(self.path, start)
                raise

    def truncate_after(self, step: int) -> None:
        """Remove the lines of later steps and a half-written last one; the others stay as they are.

        Raises:
            DataError: a line before the last is not a JSON object with a step.
        """
        if not self.path.exists():
            return
        kept = b"".join(line for line, row in _rows(self.path) if row["step"] <= step)
        partial = self.path.with_suffix(".partial")
        with partial.open("wb") as stream:
            stream.write(kept)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self.path)

    def close(self) -> None:
        """Nothing is left open."""


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a ``metrics.jsonl``, without a half-written last line.

    Raises:
        DataError: a line before the last is not a JSON object with a step.
    """
    return [row for _, row in _rows(Path(path))]


def _rows(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    lines = path.read_bytes().splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            complete = isinstance(row["step"], int) and line.endswith(b"\n")
        except (ValueError, TypeError, KeyError):
            complete = False
        if complete:
            rows.append((line, row))
        elif number < len(lines):
            raise DataError(f"{path}:{number}: expected a JSON object with an integer 'step'.")
    return rows


def _whole_length(path: Path) -> int:
    """Bytes up to and including the last line break."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        position = size
        while position > 0:
            block = min(4096, position)
            stream.seek(position - block)
            found = stream.read(block).rfind(b"\n")
            if found >= 0:
                return position - block + found + 1
            position -= block
    return 0


def _plain(value: Any) -> Any:
    """A JSON value; tensors of one element and NumPy numbers become numbers."""
    if isinstance(value, str | bool) or value is None:
        return value
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
