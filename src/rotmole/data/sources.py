"""Rows and where they come from: their origin in messages, faults of their columns, the hub."""

from __future__ import annotations

import datetime
import json
import math
import numbers
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rotmole.errors import ConfigError, DataError, did_you_mean

SNIPPET_LENGTH = 100
LISTED_FAULTS = 5  # of one source


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
    return DataError(
        f"{row.origin}: {problem}; the row begins: {snippet(row.columns)}",
        source=row.source,
        kind=re.sub(r"\d+", "", problem),
    )


def together(errors: Sequence[DataError]) -> DataError:
    """Return one error that says all of `errors`, at most LISTED_FAULTS of a source.

    Rows of a source with the same fault are said once, with their number.
    """
    faults = [fault for error in errors for fault in error.faults]
    if len(faults) == 1:
        return faults[0]
    sources: dict[str, dict[str, list[DataError]]] = {}
    for fault in faults:
        sources.setdefault(fault.source, {}).setdefault(fault.kind, []).append(fault)
    lines = []
    for source, kinds in sources.items():
        listed = list(kinds.values()) if not source else list(kinds.values())[:LISTED_FAULTS]
        for same in listed:
            more = len(same) - 1
            rows = f" (and {more:,} more row{'s' * (more > 1)} like it)" if more else ""
            lines.append(f"{same[0]}{rows}")
        rest = sum(map(len, kinds.values())) - sum(map(len, listed))
        if rest:
            lines.append(f"{source}: {rest:,} more row{'s' * (rest > 1)} with other faults")
    if len(lines) == 1:
        return DataError(lines[0], source=faults[0].source, faults=faults)
    text = "".join(f"\n  - {line}" for line in lines)
    return DataError(f"{len(lines)} problems in the data:{text}", faults=faults)


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
            "use source: jsonl with files",
            source=dataset,
        ) from error
    name = f"{dataset}[{split}]"
    return [Row(name, number, dict(columns)) for number, columns in enumerate(table, start=1)]


KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "boolean"),
    (str, "string"),
    ((list, tuple), "list"),
    (dict, "object"),
    ((bytes, bytearray, memoryview), "binary"),
    ((datetime.date, datetime.time, datetime.timedelta), "date"),
    (numbers.Number, "number"),
)


def kind_of(value: object) -> str:
    """Return the type of a value as messages name it, such as "number"."""
    if value is None:
        return "null"
    named = next((name for type_, name in KINDS if isinstance(value, type_)), None)
    return named or type(value).__name__


def column_faults(rows: Sequence[Row], used: Iterable[str]) -> dict[int, DataError]:
    """Check that every row has every used column, neither null nor NaN, and of one type.

    Returns:
        Index of a row -> what is wrong with it; rows without faults are left out.
    """
    used = list(dict.fromkeys(used))
    first: dict[str, tuple[str, int]] = {}
    faults = {}
    for index, row in enumerate(rows):
        for name in used:
            problem = _column_problem(row, name, first)
            if problem:
                faults[index] = row_error(row, problem)
                break
    return faults


def _column_problem(row: Row, name: str, first: dict[str, tuple[str, int]]) -> str | None:
    if name not in row.columns:
        hint = did_you_mean(name, row.columns)
        return f"no column '{name}' (the row has: {', '.join(row.columns)}){hint}"
    value = row.columns[name]
    text = type(value) is str  # by far the most, and never missing
    missing = "" if text else _missing(value)
    if missing:
        return f"column '{name}' is {missing}; fill it or remove the row"
    kind = "string" if text else kind_of(value)
    first_kind, number = first.setdefault(name, (kind, row.number))
    if kind != first_kind:
        return (
            f"column '{name}' mixes types: a {kind} here, a {first_kind} in row {number}; "
            "use one type"
        )
    if isinstance(value, list | tuple):
        for place, item in enumerate(value, start=1):
            if _missing(item):
                return f"item {place} of column '{name}' is {_missing(item)}; fill or remove it"
    return None


def _missing(value: object) -> str:
    """Return "null", "NaN" or "infinite" for a value that means none, else ""."""
    if value is None:
        return "null"
    if type(value) in (str, int, bool):
        return ""
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return "NaN" if math.isnan(value) else "infinite" if math.isinf(value) else ""
    if type(value).__name__ in ("NaTType", "Decimal") and value != value:  # noqa: PLR0124 NaN's mark
        return "NaN"
    return ""
