"""Rows of a data set, whatever its format, each with the place to name in an error message."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmgrpo.errors import DataError, MissingExtraError, nearest

BATCH_ROWS = 256


@dataclass(frozen=True)
class Row:
    """One row: where it stands (``file:line`` or ``file row N``), its values, its folder."""

    where: str
    values: dict[str, Any]
    folder: Path


def read_rows(path: Path) -> Iterator[Row]:
    """Iterate over the rows of a file or folder.

    Args:
        path: a ``.jsonl`` or ``.json`` file (one object per line, or one array of objects), a
            ``.parquet`` file, a folder written by ``Dataset.save_to_disk``, or a folder with
            shards of one split in the formats above.

    Raises:
        DataError: missing, of another format, or a line that is not a JSON object.
        MissingExtraError: a format that needs the ``data`` extra.
    """
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"data '{path}' does not exist{nearest(path.name, beside)}")
    if path.is_dir():
        yield from _folder(path)
        return
    if path.suffix not in _READERS:
        raise DataError(
            f"data file '{path}' has the suffix '{path.suffix}'{nearest(path.suffix, _READERS)}"
        )
    yield from _READERS[path.suffix](path)


def _folder(path: Path) -> Iterator[Row]:
    if (path / "dataset_dict.json").is_file():
        splits = [p.name for p in path.iterdir() if p.is_dir()]
        raise DataError(
            f"data folder '{path}' holds several splits; name one of them, e.g. "
            f"'{path / min(splits, default='train')}'."
        )
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        yield from _saved_dataset(path)
        return
    files = sorted(p for p in path.iterdir() if p.suffix in _READERS)
    if not files:
        raise DataError(
            f"data folder '{path}' holds no {', '.join(_READERS)} file and no saved data set."
        )
    splits = sorted({word for p in files for word in _SPLITS if word in p.stem.lower()})
    if len(splits) > 1:
        raise DataError(
            f"data folder '{path}' mixes the splits {', '.join(splits)}; name one file, e.g. "
            f"'{files[0]}'."
        )
    for file in files:
        yield from _READERS[file.suffix](file)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield _row(where, _parse(line, where), path.parent)


def _json(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        first = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first != b"[":
        yield from _json_lines(path)
        return
    for number, value in enumerate(_parse(path.read_bytes(), str(path)), start=1):
        yield _row(f"{path} row {number}", value, path.parent)


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: expected UTF-8 text; byte {error.start} is not.") from None
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else error.colno
        raise DataError(f"{where}: not valid JSON: {error.msg} at {at}.") from None
    except RecursionError:
        raise DataError(f"{where}: the JSON is nested too deeply.") from None


def _row(where: str, value: Any, folder: Path) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: expected a JSON object with the row's columns; got {type(value).__name__}."
        )
    return Row(where, value, folder)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "data") from None
    try:
        batches = parquet.ParquetFile(path).iter_batches(BATCH_ROWS)
        yield from _arrow_rows(batches, path, path.parent)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


def _saved_dataset(path: Path) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "data") from None
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # noqa: BLE001 - a damaged folder surfaces as any of a dozen types
        raise DataError(f"{path}: not a readable data set folder: {error}") from None
    # The arrow format hands out images as stored, compressed bytes instead of decoded ones.
    yield from _arrow_rows(data.with_format("arrow").iter(BATCH_ROWS), path, path)


def _arrow_rows(batches: Iterable[Any], path: Path, folder: Path) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield Row(f"{path} row {number}", values, folder)


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}
_SPLITS = ("train", "test", "eval", "valid", "dev")
