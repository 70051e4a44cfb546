"""Rows of jsonl, json, csv, parquet and arrow files; faults name file and row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rotmole.data.sources import Row, kind_of, snippet
from rotmole.errors import ConfigError, DataError, did_you_mean

Rows = Iterator[Row | DataError]
DELIMITERS = (",", ";", "\t", "|")
NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
UTF16 = (b"\xff\xfe", b"\xfe\xff")
# the first bytes of files that are no text -> what they are, and what to do
BINARY = {
    b"PAR1": "a parquet file; set source: parquet",
    b"ARROW1": "an arrow file; set source: arrow",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; save it as CSV UTF-8",
    b"%PDF": "a PDF; rotmole reads jsonl, json, csv, parquet and arrow files",
    b"version https://git-lfs": "a pointer of Git LFS and not the data; run: git lfs pull",
}


def read_bytes(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        DataError: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, names)
        raise _error(path, f"no such file{hint}") from None
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror}") from error


def rows_of(raw: bytes, name: str, source: str, delimiter: str | None = None) -> Rows:
    """Yield the rows of a file's content, and an error for each row that cannot be read.

    Args:
        raw: the content, decompressed.
        name: of the file, for messages and origins.
        source: jsonl, json, csv, parquet or arrow.
        delimiter: between the values of a csv file; None finds it.

    Raises:
        DataError: nothing can be read, such as from an empty file.
    """
    if source in ("parquet", "arrow"):
        rows = _table_rows(raw, name, source)
    else:
        _refuse_binary(raw, name)
        rows = _csv_rows(raw, name, delimiter) if source == "csv" else _json_rows(raw, name)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        below = " below its header" if source == "csv" and raw.strip(b"\xef\xbb\xbf\r\n ") else ""
        raise _error(name, f"the file is empty{below}; it needs at least one row")


def _error(name: str | Path, problem: str, kind: str = "") -> DataError:
    return DataError(f"{name}: {problem}", source=str(name), kind=kind)


def _refuse_binary(raw: bytes, name: str) -> None:
    what = next((what for start, what in BINARY.items() if raw.startswith(start)), None)
    if what is None and b"\0" in raw[:1000] and not raw.startswith(UTF16):
        what = "no text: it has zero bytes; save it as UTF-8"
    if what:
        raise _error(name, f"this is {what}")


def _utf8(raw: bytes) -> bytes:
    """Return the text as UTF-8 without byte order mark; UTF-16 is known by its mark."""
    if raw.startswith(UTF16):
        raw = raw.decode("utf-16", "replace").encode("utf-8", "surrogatepass")
    return raw.removeprefix(b"\xef\xbb\xbf")


def _decoded(name: str, number: int, raw: bytes) -> str:
    """Decode one row; the error shows the invalid byte and the bytes around it."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        around = raw[max(0, error.start - 20) : error.start + 20]
        raise _error(
            name,
            f"row {number} is not UTF-8: byte 0x{raw[error.start]:02x} at position "
            f"{error.start}, near {around!r}; save the file as UTF-8 (in Excel: CSV UTF-8)",
            "not UTF-8",
        ) from None


# ---- JSON


def _json_rows(raw: bytes, name: str) -> Rows:
    """Yield one object a line, the objects of one list, or a single object over many lines."""
    raw = _utf8(raw)
    lines = raw.split(b"\n")
    first = next((line.strip() for line in lines if line.strip()), b"")
    if first[:1] == b"[" or _goes_on(first):
        yield from _json_document(raw, name)
        return
    alone = sum(map(bool, map(bytes.strip, lines))) == 1
    for number, line in enumerate(lines, start=1):
        try:
            text = _decoded(name, number, line).strip()
            if not text:
                continue
            row = _json_row(name, number, _parsed(name, number, text))
            if alone:
                _refuse_frame(row.columns, name)
            yield row
        except DataError as error:
            yield error


def _goes_on(line: bytes) -> bool:
    """Return whether a line is the beginning of an object that the next lines end."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return line[:1] == b"{" and error.pos >= len(error.doc.rstrip())
    except (ValueError, RecursionError):
        pass
    return False


def _parsed(name: str, number: int, text: str) -> Any:
    try:
        return DECODER.decode(text)
    # ValueError also for numbers with too many digits, RecursionError for too deep nesting
    except (ValueError, RecursionError) as error:
        raise _error(
            name,
            f"row {number} is not JSON: {_reason(error)}; the row begins: {snippet(text)}",
            f"not JSON: {getattr(error, 'msg', '')}",
        ) from None


def _reason(error: ValueError | RecursionError) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return f"{error}"
    line = f"line {error.lineno}, " if error.lineno > 1 else ""
    return f"{error.msg} at {line}column {error.colno}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{doubled}' is there twice")
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _json_row(name: str, number: int, columns: Any) -> Row:
    if isinstance(columns, dict):
        return Row(name, number, columns)
    raise _error(
        name,
        f"row {number} is a JSON {kind_of(columns)}, not an object "
        f'such as {{"prompt": ..., "completion": ...}}: {snippet(columns)}',
        "not an object",
    )


def _json_document(raw: bytes, name: str) -> Rows:
    """Yield the objects of a list, numbered from 1, or objects written over several lines."""
    text = _decoded(name, 1, raw)
    try:
        whole = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _json_sequence(text, name)
            return
        raise _error(
            name, f"the file is not JSON: {_reason(error)}; it begins: {snippet(text[:1000])}"
        ) from None
    if isinstance(whole, dict):
        _refuse_frame(whole, name)
    for number, columns in enumerate(whole if isinstance(whole, list) else [whole], start=1):
        try:
            yield _json_row(name, number, columns)
        except DataError as error:
            yield error


def _refuse_frame(columns: dict[str, Any], name: str) -> None:
    """Refuse an object that is no row, but a frame around the list of all rows."""
    if any(isinstance(value, str) and " " in value for value in columns.values()):
        return
    lengths = [len(value) if isinstance(value, list) else 0 for value in columns.values()]
    if len(lengths) > 1 and lengths[0] > 1 and len(set(lengths)) == 1:
        raise _error(
            name,
            f"the file is one JSON object of columns ({', '.join(columns)}), each a list of "
            f"{lengths[0]} values; write one object a row",
        )
    for key, value in columns.items():
        objects = value if isinstance(value, list) and value else [None]
        rows = all(isinstance(v, dict) and not {"role", "from", "type"} & set(v) for v in objects)
        if rows:
            raise _error(
                name,
                f"the file is one JSON object, whose key '{key}' holds a list of {len(objects)} "
                "objects; save that list alone",
            )


def _json_sequence(text: str, name: str) -> Rows:
    """Yield values that follow each other, each over one or more lines; numbered by their line."""
    place, line = 0, 1
    while True:
        start = len(text) - len(text[place:].lstrip())
        line += text.count("\n", place, start)
        if start == len(text):
            return
        try:
            value, place = DECODER.raw_decode(text, start)
            yield _json_row(name, line, value)
        except DataError as error:
            yield error
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            begins = snippet(text[start : start + 1000])
            raise _error(name, f"row {line} is not JSON: {reason}; it begins: {begins}") from None
        line += text.count("\n", start, place)


# ---- CSV


def _csv_rows(raw: bytes, name: str, delimiter: str | None) -> Rows:
    """Yield the rows below a header. Values stay text; an empty value is an empty text.

    Left out are pandas' column of row numbers, which has no name, and empty columns without one.
    """
    raw = _utf8(raw)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        number = raw[: error.start].count(b"\n")  # 0 is the header, so this is the row's number
        start = raw.rfind(b"\n", 0, error.start) + 1
        text = _decoded(name, number, raw[start : error.start + 20])
    if not text.strip():
        return
    skipped = 0
    head, _, rest = text.partition("\n")
    if head.strip().lower().startswith("sep=") and len(head.strip()) <= len("sep=") + 1:
        # Excel's own line before the header
        delimiter, text, skipped = delimiter or head.strip()[4:] or "\t", rest, 1
    lines, fault = _split(text, delimiter) if delimiter else _found(text, name)
    if not lines:
        if fault:
            raise _error(name, f"the header is not CSV: {fault[1]}")
        return
    header = lines[0][1]
    kept = _columns(name, header, lines[1:])
    for number, (line, values) in enumerate(lines[1:], start=1):
        spare = values[len(header) :]
        if len(values) < len(header) or any(spare):
            yield _error(
                name,
                f"row {number} (line {line + skipped}) has {len(values)} values, but "
                f"the header has {len(header)} columns ({', '.join(header)}); quote values "
                f"that contain {_plural(delimiter, text)}; the row begins: "
                f"{snippet(','.join(values))}",
                "number of values",
            )
            continue
        yield Row(name, number, {header[i]: values[i] for i in kept})
    if fault:
        line, reason = fault
        yield _error(name, f"row {len(lines)} (line {line + skipped}) is not CSV: {reason}")


def _plural(delimiter: str | None, text: str) -> str:
    name = NAMES.get(delimiter or _delimiter(text), repr(delimiter))
    return f"{name}s" if name in NAMES.values() else name


Lines = list[tuple[int, list[str]]]


def _split(text: str, delimiter: str) -> tuple[Lines, tuple[int, str] | None]:
    """Return each line that is not blank with its number, and where reading stopped by a fault."""
    limit = csv.field_size_limit(max(len(text), 131_072))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines: Lines = []
    try:
        for values in reader:
            if values:
                lines.append((reader.line_num, values))
    except csv.Error as error:
        return lines, (reader.line_num, str(error))
    finally:
        csv.field_size_limit(limit)
    return lines, None


def _regular(lines: Lines) -> bool:
    """Return whether every line has as many values as the first, or fills up with empty ones."""
    width = len(lines[0][1])
    return all(len(values) >= width and not any(values[width:]) for _, values in lines)


def _delimiter(text: str) -> str:
    """Return the delimiter of most columns in the header; the comma before all others."""
    counts = {}
    for delimiter in DELIMITERS:
        lines, _ = _split(text.lstrip("\r\n").partition("\n")[0], delimiter)
        counts[delimiter] = len(lines[0][1]) if lines else 1
    return "," if counts[","] > 1 else max(counts, key=lambda d: counts[d])


def _found(text: str, name: str) -> tuple[Lines, tuple[int, str] | None]:
    """Split the text by the delimiter that gives every line the same number of values, over one.

    The comma is tried first, and is kept if no delimiter does.
    """
    fitting = {}
    for delimiter in DELIMITERS:
        lines, fault = _split(text, delimiter)
        if not fault and lines and len(lines[0][1]) > 1 and _regular(lines):
            fitting[delimiter] = lines
            if delimiter == ",":
                return lines, None
    if len(fitting) == 1:
        return next(iter(fitting.values())), None
    if fitting:
        names = " and ".join(NAMES[delimiter] for delimiter in fitting)
        raise _error(name, f"the columns can be separated by {names}; set `delimiter`")
    return _split(text, _delimiter(text))


def _columns(name: str, header: list[str], lines: Lines) -> list[int]:
    """Return the places of the columns that have a name, after a check of the header."""
    names = [column.strip() for column in header]
    doubled = sorted({column for column in names if column and names.count(column) > 1})
    unnamed = []
    for place in (i for i, column in enumerate(names) if not column):
        values = [line[1][place] for line in lines if len(line[1]) > place]
        index = place == 0 and len(names) > 1 and all(value.isdecimal() for value in values)
        if not index and any(values):
            unnamed.append(f"column {place + 1} has no name")
    if doubled or unnamed:
        bad = [*(f"{column!r} is there twice" for column in doubled), *unnamed]
        raise _error(name, f"the header must name every column once: {'; '.join(bad)}")
    return [i for i, column in enumerate(names) if column]


# ---- tables


def _table_rows(raw: bytes, name: str, source: str) -> Rows:
    try:
        import pyarrow as arrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise ConfigError(
            f'{name}: {source} files need pyarrow; install it with: pip install "rotmole[train]"'
        ) from error
    if not raw:
        return
    buffer = io.BytesIO(raw)
    try:
        if source == "parquet":
            table = parquet.read_table(buffer)
        elif raw.startswith(b"ARROW1"):
            table = ipc.open_file(buffer).read_all()
        else:  # as the datasets library saves it
            table = ipc.open_stream(buffer).read_all()
        doubled = _doubled(table.column_names)
        rows = table.to_pylist()
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _error(name, f"not a readable {source} file: {reason}") from error
    if doubled:
        raise _error(name, f"the column '{doubled}' is there twice; name every column once")
    for number, columns in enumerate(rows, start=1):
        yield Row(name, number, columns)


def _doubled(names: Sequence[str]) -> str:
    return next((name for name in names if names.count(name) > 1), "")
