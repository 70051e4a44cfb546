"""Rows of jsonl, csv and parquet files and of data sets on the hub; errors name file and row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotmole.errors import ConfigError, DataError, did_you_mean

SNIPPET_LENGTH = 100


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        source: the file or data set.
        number: counts from 1: the line in jsonl, the row below the header in csv.
        columns: column name -> value.
    """

    source: str
    number: int
    columns: dict[str, Any]

    @property
    def origin(self) -> str:
        """Source and row number, for messages."""
        return f"{self.source}: row {self.number}"


def snippet(value: object) -> str:
    """Return `value` in at most SNIPPET_LENGTH characters on one line."""
    if isinstance(value, dict | list):
        text = json.dumps(value, ensure_ascii=False, default=str)
    else:
        text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= SNIPPET_LENGTH else text[: SNIPPET_LENGTH - 3] + "..."


def row_error(row: Row, problem: str) -> DataError:
    """Return a DataError with the row's origin, the problem and the start of the row."""
    return DataError(f"{row.origin}: {problem}; the row begins: {snippet(row.columns)}")


def read_file(path: Path, source: str) -> list[Row]:
    """Return the rows of one file, at least one.

    Args:
        source: "jsonl", "csv" or "parquet".

    Raises:
        DataError: the file is missing, empty, not UTF-8, or a row cannot be read.
    """
    readers = {"jsonl": read_jsonl, "csv": read_csv, "parquet": read_parquet}
    rows = readers[source](path)
    if not rows:
        raise DataError(f"{path}: the file is empty; it needs at least one row")
    return rows


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, names)
        raise DataError(f"{path}: no such file{hint}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _utf8(path: Path, number: int, raw: bytes) -> str:
    """Decode one row; the error shows the invalid byte and the bytes around it."""
    try:
        return raw.decode("utf-8-sig" if number <= 1 else "utf-8")
    except UnicodeDecodeError as error:
        around = raw[max(0, error.start - 20) : error.start + 20]
        raise DataError(
            f"{path}: row {number} is not UTF-8: byte 0x{raw[error.start]:02x} at position "
            f"{error.start}, near {around!r}; save the file as UTF-8"
        ) from None


def read_jsonl(path: Path) -> list[Row]:
    """Return the rows of a file with one JSON object a line; blank lines are skipped."""
    rows = []
    for number, raw in enumerate(_bytes_of(path).split(b"\n"), start=1):
        line = _utf8(path, number, raw).strip()
        if not line:
            continue
        try:
            columns = json.loads(line)
        # ValueError also for numbers with too many digits, RecursionError for too deep nesting
        except (ValueError, RecursionError) as error:
            column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            reason = getattr(error, "msg", None) or f"{error}"
            raise DataError(
                f"{path}: row {number} is not JSON: {reason}{column}; "
                f"the row begins: {snippet(line)}"
            ) from None
        if not isinstance(columns, dict):
            raise DataError(
                f"{path}: row {number} is a JSON {_json_type(columns)}, not an object "
                f'such as {{"prompt": ..., "completion": ...}}: {snippet(line)}'
            )
        rows.append(Row(str(path), number, columns))
    return rows


def read_csv(path: Path) -> list[Row]:
    """Return the rows of a comma-separated file whose first line names the columns."""
    raw = _bytes_of(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw[: error.start].count(b"\n")  # 0 is the header, so this is the row's number
        start = raw.rfind(b"\n", 0, error.start) + 1
        text = _utf8(path, number, raw[start : error.start + 20])
    if not text.strip():
        return []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = next(reader)
        _check_header(path, header)
        for number, values in enumerate((v for v in reader if v), start=1):
            if len(values) != len(header):
                raise DataError(
                    f"{path}: row {number} (line {reader.line_num}) has {len(values)} values, but "
                    f"the header has {len(header)} columns ({', '.join(header)}); quote values "
                    f"that contain commas; the row begins: {snippet(','.join(values))}"
                )
            rows.append(Row(str(path), number, dict(zip(header, values, strict=True))))
    except csv.Error as error:
        raise DataError(
            f"{path}: row {len(rows) + 1} (line {reader.line_num}) is not CSV: {error}"
        ) from None
    return rows


def _check_header(path: Path, header: list[str]) -> None:
    names = [name.strip() for name in header]
    bad = sorted({name for name in names if not name or names.count(name) > 1})
    if bad:
        raise DataError(
            f"{path}: the header (line 1) must name every column once; empty or repeated: "
            f"{', '.join(repr(name) for name in bad)}"
        )


def read_parquet(path: Path) -> list[Row]:
    """Return the rows of a parquet file."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            f'{path}: parquet files need pyarrow; install it with: pip install "rotmole[train]"'
        ) from error
    raw = _bytes_of(path)
    if not raw:
        return []
    try:
        table = parquet.read_table(io.BytesIO(raw)).to_pylist()
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a readable parquet file: {reason}") from error
    return [Row(str(path), number, columns) for number, columns in enumerate(table, start=1)]


def read_hub(dataset: str, config: str | None, split: str) -> list[Row] | None:
    """Return the rows of one split of a data set on the hub, or in a local data-set folder.

    Returns:
        None if the data set exists but has no such split.

    Raises:
        ConfigError: the datasets library is not installed.
        DataError: the data set cannot be loaded, such as without a connection.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data set '{dataset}': source hub needs the datasets library; "
            'install it with: pip install "rotmole[train]"'
        ) from error
    try:
        table = datasets.load_dataset(dataset, config, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated classes
        if isinstance(error, ValueError) and str(error).startswith("Unknown split"):
            return None
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"data set '{dataset}' could not be loaded from the datasets hub "
            f"({type(error).__name__}: {snippet(reason)}); without a connection, or with "
            "HF_HUB_OFFLINE=1, only data sets in the local cache can be loaded: connect once, or "
            "use source: jsonl with files"
        ) from error
    name = f"{dataset}[{split}]"
    return [Row(name, number, dict(columns)) for number, columns in enumerate(table, start=1)]


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    return {"list": "list", "str": "string"}.get(type(value).__name__, "number")


def kind_of(value: object) -> str:
    """Return the type of a value as messages name it, such as "number"."""
    if hasattr(value, "isoformat"):
        return "date"
    if isinstance(value, dict):
        return "object"
    return _json_type(value)


def check_columns(rows: list[Row], used: Iterable[str]) -> None:
    """Check that every row has every used column, not null and of one type.

    Raises:
        DataError: a column is missing or null, or its type changes; names the row.
    """
    used = list(dict.fromkeys(used))
    first: dict[str, tuple[str, int]] = {}
    for row in rows:
        for name in used:
            if name not in row.columns:
                hint = did_you_mean(name, row.columns)
                columns = ", ".join(row.columns)
                raise row_error(row, f"no column '{name}' (the row has: {columns}){hint}")
            kind = kind_of(row.columns[name])
            if kind == "null":
                raise row_error(row, f"column '{name}' is null; fill it or remove the row")
            first_kind, number = first.setdefault(name, (kind, row.number))
            if kind != first_kind:
                raise row_error(
                    row,
                    f"column '{name}' mixes types: a {kind} here, a {first_kind} in row {number}; "
                    "use one type",
                )
