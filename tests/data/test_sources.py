from __future__ import annotations

import json
import sys

import datasets
import pytest

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
