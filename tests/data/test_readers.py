"""Files as people have them: each is read right, or refused in one sentence with its row."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path

import datasets
import pyarrow as arrow
import pytest
from pyarrow import parquet

from rotmole.config.schema import DataSection
from rotmole.data import load_examples
from rotmole.data.load import read_file
from rotmole.errors import DataError


def task(tmp_path, name: str, content: bytes | str, **more) -> DataSection:
    raw = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(raw)
    return DataSection(root=str(tmp_path), tasks={"t": {"files": {"train": name}, **more}})


def load(data: DataSection):
    return load_examples(data, "train", seed=0)["t"]


def message(data: DataSection) -> str:
    with pytest.raises(DataError) as caught:
        load(data)
    return str(caught.value)


def read(path, source: str = "files", delimiter: str | None = None) -> list:
    return list(read_file(path, source, delimiter))


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["t.jsonl", "empty"]),
        ("\n \n", ["t.jsonl", "empty"]),
        (GOOD + "{'prompt': 1}\n", ["t.jsonl", "row 2", "not JSON", "{'prompt': 1}"]),
        (GOOD + "\n[1, 2]\n", ["row 3", "JSON list, not an object", "[1, 2]"]),
        (GOOD + "null\n", ["row 2", "JSON null"]),
        (GOOD + '{"prompt": "a"}\n', ["row 2", "no column 'completion'", '{"prompt": "a"}']),
        (GOOD + '{"prompt": 7, "completion": "b"}\n', ["row 2", "mixes types", "a number here"]),
        (GOOD + '{"prompt": null, "completion": "b"}\n', ["row 2", "'prompt' is null"]),
        (GOOD + '{"prompt": true, "completion": "b"}\n', ["row 2", "a boolean here"]),
        ('{"prompt": "a", "completion": " "}\n', ["row 1", "answer is empty"]),
        ('{"prompt": {"x": 1}, "completion": "b"}\n', ["row 1", "is an object"]),
        (GOOD.encode() + b'{"prompt": "caf\xe9"}\n', ["row 2", "not UTF-8", "0xe9", "caf"]),
        (GOOD.encode("utf-16-le"), ["t.jsonl", "zero bytes", "save it as UTF-8"]),
    ],
)
def test_broken_jsonl(tmp_path, content, words):
    said = message(task(tmp_path, "t.jsonl", content))
    for word in words:
        assert word in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["t.csv", "empty"]),
        ("prompt,completion\n", ["t.csv", "empty"]),
        ("prompt,completion\na,b\na,b,c\n", ["row 2", "line 3", "3 values", "2 columns", "a,b,c"]),
        ("prompt,completion\na\n", ["row 1", "1 values"]),
        ("prompt,prompt\na,b\n", ["header", "'prompt'"]),
        ("prompt,answer\na,b\n", ["row 1", "no column 'completion'", "prompt, answer"]),
        ('prompt,completion\na,"b\n', ["row 1", "not CSV"]),
        (b"prompt,completion\na,b\nc,\xe9\n", ["row 2", "not UTF-8", "0xe9"]),
    ],
)
def test_broken_csv(tmp_path, content, words):
    said = message(task(tmp_path, "t.csv", content))
    for word in words:
        assert word in said


def test_csv_with_quotes_commas_newlines_and_bom(tmp_path):
    text = '\ufeffprompt,completion\r\n"a, ""b""\nc",d\r\n\r\ne,f\r\n'
    (tmp_path / "x.csv").write_bytes(text.encode())
    rows = read(tmp_path / "x.csv")
    assert [row.columns for row in rows] == [
        {"prompt": 'a, "b"\nc', "completion": "d"},
        {"prompt": "e", "completion": "f"},
    ]
    assert [row.number for row in rows] == [1, 2]


def test_jsonl_keeps_line_numbers_and_unicode_line_ends(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('\ufeff{"a": "x\u2028y"}\r\n\n{"a": "z"}', encoding="utf-8", newline="")
    rows = read(path)
    assert [(row.number, row.columns["a"]) for row in rows] == [(1, "x\u2028y"), (3, "z")]


def test_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    parquet.write_table(arrow.table({"prompt": ["a", "b"], "choices": [["x"], ["y", "z"]]}), path)
    rows = read(path)
    assert rows[1].columns == {"prompt": "b", "choices": ["y", "z"]}
    assert rows[1].number == 2
    with pytest.raises(DataError, match=r"t\.parquet: the file is empty"):
        load(task(tmp_path, "t.parquet", b""))
    with pytest.raises(DataError, match=r"t\.parquet: not a readable parquet file"):
        load(task(tmp_path, "t.parquet", b"nonsense " * 9))


def test_a_parquet_file_whose_pages_are_damaged(tmp_path):
    """Arrow raises OSError here, not an error of its own."""
    file = tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist([{"prompt": "a"}]), file, compression="none")
    content = bytearray(file.read_bytes())
    content[4:12] = b"\xff" * 8
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable parquet file"):
        read(file)


PAIR = [("a", "b"), ("c, d", "007")]
TWO = [{"prompt": p, "completion": c} for p, c in PAIR]
JSONL = "".join(json.dumps(row) + "\n" for row in TWO)


def columns(path: Path, source: str = "files", delimiter: str | None = None) -> list[dict]:
    rows = read(path, source, delimiter)
    assert not [row for row in rows if isinstance(row, DataError)]
    return [row.columns for row in rows]


def table(delimiter: str = ",", **more: str) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, **more)
    writer.writerows([("prompt", "completion"), *PAIR])
    return text.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", JSONL),
        ("x.json", JSONL),
        ("x.jsonl", JSONL.replace("\n", "\r\n").encode("utf-8-sig")),
        ("x.jsonl", JSONL.encode("utf-16")),
        ("x.ndjson", b"\xfe\xff" + JSONL.encode("utf-16-be")),
        ("x.json", json.dumps(TWO)),
        ("x.jsonl", json.dumps(TWO, indent=2)),
        ("x.jsonl", "\n".join(json.dumps(row, indent=2) for row in TWO)),
        ("x.csv", table()),
        ("x.csv", table(";")),
        ("x.csv", table("\t")),
        ("x.tsv", table("\t")),
        ("x.csv", table("|")),
        ("x.csv", table(";").replace("\r\n", "\n").encode("utf-8-sig")),
        ("x.csv", table("\t").encode("utf-16")),  # Excel's "Unicode text"
        ("x.csv", "sep=;\r\n" + table(";")),
        ("x.csv", '\ufeff"sep=,"\r\n'.replace('"', "") + table()),
        ("x.csv", table().replace("\r\n", "\r")),
        ("x.csv", ',prompt,completion\n0,a,b\n1,"c, d",007\n'),  # pandas
        ("x.csv", 'prompt,completion,\na,b,\n"c, d",007,\n'),
        ("x.csv", 'prompt,completion\na,b,,\n"c, d",007\n'),
        ("x.csv", 'prompt;completion\na;b\n"c, d";"007"\n'),
        ("x.jsonl.gz", gzip.compress(JSONL.encode(), mtime=0)),
        ("x.json", gzip.compress(json.dumps(TWO).encode(), mtime=0)),  # known by its content
        ("x.csv.bz2", bz2.compress(table(";").encode())),
        ("x.csv.xz", lzma.compress(table().encode())),
    ],
)
def test_the_same_rows_however_they_are_written(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert columns(tmp_path / name) == TWO


def test_tables_and_archives(tmp_path):
    made = arrow.Table.from_pylist(TWO)
    parquet.write_table(made, tmp_path / "x.parquet")
    (tmp_path / "y.parquet.gz").write_bytes(gzip.compress((tmp_path / "x.parquet").read_bytes()))
    for name, writer in (("x.arrow", arrow.ipc.new_stream), ("x.feather", arrow.ipc.new_file)):
        with writer(tmp_path / name, made.schema) as file:
            file.write_table(made)
    for name in ("x.parquet", "y.parquet.gz", "x.arrow", "x.feather"):
        assert columns(tmp_path / name) == TWO
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("data/1.jsonl", json.dumps(TWO[0]))
        archive.writestr("data/2.csv.gz", gzip.compress(b"prompt;completion\nc, d;007\n", mtime=0))
        archive.writestr("__MACOSX/data/._1.jsonl", b"\0\0")
        archive.writestr("README.md", "rows")
    assert columns(tmp_path / "x.zip") == TWO
    assert read(tmp_path / "x.zip")[1].origin == f"{tmp_path}/x.zip/data/2.csv.gz: row 1"
    datasets.Dataset.from_list(TWO).save_to_disk(tmp_path / "saved")
    data = DataSection(root=str(tmp_path), tasks={"t": {"files": "saved"}})
    assert [row.completion for row in load(data)] == ["b", "007"]


def test_long_lines_and_the_csv_modules_own_limit(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "x.csv").write_text("prompt,completion\n" + "x" * 300_000 + ",b\n")
    assert len(columns(tmp_path / "x.csv")[0]["prompt"]) == 300_000
    assert csv.field_size_limit() == limit


def test_a_delimiter_that_is_set(tmp_path):
    content = "prompt^completion\na;1,5^b\n"
    data = task(tmp_path, "x.csv", content, delimiter="^")
    assert (load(data)[0].prompt, load(data)[0].completion) == ("a;1,5", "b")
    data = task(tmp_path, "x.csv", table("\t"), delimiter="tab")
    assert len(load(data)) == 2
    (tmp_path / "y.csv").write_text("a;b|c\n1;2|3\n")
    with pytest.raises(DataError, match="separated by semicolon and bar; set `delimiter`"):
        read(tmp_path / "y.csv")
    with pytest.raises(ValueError, match="one character, such as ; or tab"):
        task(tmp_path, "x.csv", content, delimiter=";;")


def test_commas_in_texts_do_not_look_like_columns(tmp_path):
    (tmp_path / "x.csv").write_text("frage;antwort\nja, oder;1,5\nnein, oder;2,5\n")
    assert columns(tmp_path / "x.csv")[0] == {"frage": "ja, oder", "antwort": "1,5"}
    (tmp_path / "y.csv").write_text("text\na; b\nc; d\n")
    assert columns(tmp_path / "y.csv") == [{"text": "a; b"}, {"text": "c; d"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", ",a,b\nk,1,2\nl,3,4\n", "column 1 has no name"),
        ("x.csv", "a,b,\n1,2,3\n", "column 3 has no name"),
        ("x.csv", "a;a;b\n1;2;3\n", "'a' is there twice"),
        ("x.csv", "a;b\n1;2;3\n", "row 1 (line 2) has 3 values, but the header has 2 columns"),
        ("x.csv", "a;b\n1;2;3\n", "that contain semicolons"),
        ("x.csv", b"PAR1....", "this is a parquet file; set source: parquet"),
        ("x.csv", b"\xd0\xcf\x11\xe0", "this is an Excel workbook; save it as CSV UTF-8"),
        ("x.jsonl", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("x.jsonl", '{"a": 1, "a": 2}', "row 1 is not JSON: the key 'a' is there twice"),
        ("x.json", '{"version": 1, "data": [{"a": 1}, {"a": 2}]}', "key 'data' holds a list of 2"),
        ("x.json", '{"n": 2,\n"rows": [{"a": 1}, {"a": 2}]}', "key 'rows' holds a list of 2"),
        ("x.json", '{"a": ["x", "y"], "b": ["z", "w"]}', "one JSON object of columns (a, b)"),
        ("x.json", '{"a": "\\ud83d", "b": "c"}', "half a character, '\\ud83d'"),
        ("x.csv", "a,b\n", "the file is empty below its header"),
        ("x.json", '[{"a": 1}, 5]', "row 2 is a JSON number, not an object"),
        ("x.json", '[{"a": 1},\n {"a": }]', "the file is not JSON: Expecting value at line 2, "),
        ("x.json", '{\n "a": 1\n}\n{\n "a": }\n', "row 4 is not JSON: Expecting value"),
        ("x.json", "[]", "the file is empty"),
        ("x.csv", "\ufeff", "the file is empty"),
        ("x.csv", "a,b\n1,caf\xe9\n".encode("latin-1"), "(in Excel: CSV UTF-8)"),
        ("x.jsonl.gz", b"\x1f\x8bnonsense", "cannot be decompressed"),
        ("x.jsonl.gz", gzip.compress(b"", mtime=0), "the file is empty"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\nno\n', mtime=0), "x.jsonl.gz: row 2 is not JSON"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    data = DataSection(
        root=str(tmp_path), tasks={"t": {"files": name, "prompt": "{a}", "completion": "{b}"}}
    )
    said = message(data)
    assert words in said
    assert name in said


def test_a_conversation_alone_in_its_file_is_a_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for indent in (None, 2):
        (tmp_path / "x.json").write_text(json.dumps(row, indent=indent))
        assert columns(tmp_path / "x.json") == [row]


def test_workbooks_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.csv", "w") as archive:
        archive.writestr("[Content_Types].xml", "")
    with pytest.raises(DataError, match="this is a workbook; save it as CSV UTF-8"):
        read(tmp_path / "x.csv")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("README.md", "")
    with pytest.raises(DataError, match=r"has no file that ends in \.jsonl"):
        read(tmp_path / "x.zip")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("NaN", "row 1: column 'completion' is NaN; fill it or remove the row"),
        ("Infinity", "column 'completion' is infinite"),
        ("-Infinity", "column 'completion' is infinite"),
        ("null", "column 'completion' is null"),
        ("[1, NaN]", "item 2 of column 'completion' is NaN"),
        ('["a", null]', "item 2 of column 'completion' is null"),
    ],
)
def test_nothing_is_learnt_from_a_value_that_is_missing(tmp_path, value, words):
    data = task(tmp_path, "x.jsonl", f'{{"prompt": "a", "completion": {value}}}\n')
    assert words in message(data)


@pytest.mark.parametrize("values", [[1.0, None], [1.0, float("nan")], [1.0, float("inf")]])
def test_missing_values_of_tables_are_refused(tmp_path, values):
    made = arrow.table({"prompt": ["a", "b"], "completion": values})
    parquet.write_table(made, tmp_path / "x.parquet")
    with arrow.ipc.new_stream(tmp_path / "x.arrow", made.schema) as file:
        file.write_table(made)
    for name in ("x.parquet", "x.arrow"):
        data = DataSection(root=str(tmp_path), tasks={"t": {"files": name}})
        assert f"{name}: row 2: column 'completion' is " in message(data)


def test_empty_cells_of_csv_are_empty_texts(tmp_path):
    said = message(task(tmp_path, "x.csv", "prompt,completion\na,b\nc,\n,d\n"))
    assert "row 2: the answer is empty" in said
    assert "row 3: nothing is in the prompt's column 'prompt'" in said
