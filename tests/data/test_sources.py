from __future__ import annotations

import json
import sys

import datasets
import pyarrow as arrow
import pytest
from pyarrow import parquet

from rotmole.config.schema import DataSection
from rotmole.data import load_examples
from rotmole.data.load import read_file
from rotmole.errors import ConfigError, DataError


def task(tmp_path, name: str, content: bytes | str, **more) -> DataSection:
    raw = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(raw)
    source = name.rsplit(".", 1)[1]
    section = {"source": source, "files": {"train": name}, **more}
    return DataSection(root=str(tmp_path), tasks={"t": section})


def load(data: DataSection):
    return load_examples(data, "train", seed=0)["t"]


def read(path, source: str = "files", delimiter: str | None = None) -> list:
    return list(read_file(path, source, delimiter))


def message(data: DataSection) -> str:
    with pytest.raises(DataError) as caught:
        load(data)
    return str(caught.value)


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


def test_missing_file_is_said_with_the_nearest_name(tmp_path):
    data = task(tmp_path, "t.jsonl", GOOD)
    data.tasks["t"].files["validation"] = "t.jsnol"
    with pytest.raises(ConfigError, match=r"no file .*t\.jsnol .*did you mean 't\.jsonl'"):
        load(data)
    with pytest.raises(DataError, match=r"no such file; did you mean 't\.jsonl'"):
        read(tmp_path / "tt.jsonl")


def test_hub_without_a_connection_is_one_sentence(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    data = DataSection(tasks={"t": {"source": "hub", "dataset": "someone/no-such-set"}})
    said = message(data)
    assert "'someone/no-such-set' could not be loaded from the datasets hub" in said
    assert "source: jsonl" in said
    assert "\n" not in said


def test_hub_reads_a_local_data_set(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(3)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    section = {"source": "hub", "dataset": str(folder)}
    data = DataSection(tasks={"t": section})
    assert [row.completion for row in load(data)] == ["c0", "c1", "c2"]
    assert load_examples(data, "test", seed=0) == {}
    data.tasks["t"].splits = {"test": "exam"}
    with pytest.raises(ConfigError, match=r"no split 'exam' \(splits.test\)"):
        load_examples(data, "test", seed=0)


def test_missing_datasets_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    data = DataSection(tasks={"t": {"source": "hub", "dataset": "a/b"}})
    with pytest.raises(ConfigError, match=r'pip install "rotmole\[train\]"'):
        load(data)


def test_a_parquet_file_whose_pages_are_damaged(tmp_path):
    """Arrow raises OSError here, not an error of its own."""
    file = tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist([{"prompt": "a"}]), file, compression="none")
    content = bytearray(file.read_bytes())
    content[4:12] = b"\xff" * 8
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable parquet file"):
        read(file)
