from __future__ import annotations

import json

import pytest

from rotmole.config.schema import DataSection
from rotmole.data import data_problems, fingerprint, load_examples, load_splits
from rotmole.data.load import within_limit
from rotmole.errors import ConfigError, DataError

SUM_OF_0_1_0 = "575ab29adf7fc4b89d6be2fbb35980f331f8765b49d46922331425bc72a1d3dd"


def rows(count: int) -> list[dict]:
    return [{"id": i, "prompt": f"p{i}", "completion": f"c{i}", "g": i % 3} for i in range(count)]


def write(path, content: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")


def section(tmp_path, **more) -> DataSection:
    write(tmp_path / "train.jsonl", rows(300))
    task = {"source": "jsonl", "files": {"train": "train.jsonl"}, **more}
    return DataSection(root=str(tmp_path), tasks={"t": task})


def ids(data: DataSection, split: str = "train", seed: int = 0) -> list[str]:
    return [row.id for row in load_examples(data, split, seed=seed)["t"]]


def test_root_files_and_missing_split(tmp_path):
    data = section(tmp_path)
    write(tmp_path / "more.jsonl", rows(2))
    data.tasks["t"].files["train"] = ["train.jsonl", str(tmp_path / "more.jsonl")]
    assert len(ids(data)) == 302
    assert load_examples(data, "validation", seed=0) == {}


def test_carving_is_by_row_and_not_by_seed(tmp_path):
    data = section(tmp_path, validation_fraction=0.2)
    train, validation = ids(data), ids(data, "validation", seed=5)
    assert set(train).isdisjoint(validation)
    assert len(train) + len(validation) == 300
    assert 30 <= len(validation) <= 90
    # equal rows stay on one side, and order or neighbours do not matter
    doubled = [{**row, "id": f"again{row['id']}"} for row in rows(300)]
    write(tmp_path / "train.jsonl", list(reversed(rows(300) + doubled)))
    again = ids(data, "validation")
    assert set(again) == {*validation, *(f"again{i}" for i in validation)}


def test_limit_is_seeded_per_group_and_keeps_order(tmp_path):
    data = section(tmp_path, limit={"train": 20})
    first = ids(data)
    assert len(first) == 20
    assert first == ids(data)
    assert first != ids(data, seed=1)
    assert [int(i) for i in first] == sorted(int(i) for i in first)
    data.tasks["t"].group_column = "g"
    groups = [row.group for row in load_examples(data, "train", seed=0)["t"]]
    assert {g: groups.count(g) for g in set(groups)} == {"0": 20, "1": 20, "2": 20}


def test_the_choice_under_a_limit_is_that_of_release_0_1():
    assert within_limit(["a", "b"] * 6, 2, seed="0|t|train|") == [4, 6, 7, 9]
    assert within_limit(["a", "b"] * 6, None, seed="") == list(range(12))


def test_all_problems_at_once(tmp_path):
    data = section(tmp_path)
    data = DataSection(
        root=str(tmp_path),
        tasks={
            "a": {"source": "jsonl"},
            "b": {"source": "csv", "files": {"train": "trian.jsonl", "test": []}},
            "c": {"source": "hub"},
            "d": {"source": "locale", "kind": "unit", "files": {"train": "x"}},
            "e": {"source": "locale", "kind": "numbers", "languages": ["de", "da"]},
            "f": {"source": "locale"},
            "g": {
                "source": "jsonl",
                "files": {"train": "train.jsonl", "validation": "train.jsonl"},
                "validation_fraction": 0.1,
                "format": "classification",
                "kind": "dates",
                "limit": {"train": 0},
            },
            "h": {"source": "jsonl", "files": {"train": "train.jsonl"}, "labels": ["x", "x"]},
        },
    )
    problems = data_problems(data)
    expected = [
        "data.tasks.a: source jsonl needs `files`",
        "data.tasks.b: files.train: there is no file",
        "data.tasks.b: files.test is empty",
        "data.tasks.c: source hub needs `dataset`",
        "data.tasks.d: kind 'unit' is not known",
        "data.tasks.d: files have no effect",
        "data.tasks.e: language 'da' is not available for numbers",
        "data.tasks.f: source locale needs `kind`",
        "data.tasks.g: kind and languages have an effect with source locale only",
        "data.tasks.g: validation_fraction takes rows from the train split",
        "data.tasks.g: limit.train is 0",
        "data.tasks.g: format classification needs `labels`",
        "data.tasks.h: labels have no effect with format prompt_completion",
        "data.tasks.h: labels are x, x; each must be named once",
    ]
    assert len(problems) == len(expected)
    for problem, start in zip(problems, expected, strict=True):
        assert problem.startswith(start)
    assert "did you mean 'train.jsonl'" in problems[1]
    assert "did you mean 'units'" in problems[4]
    with pytest.raises(ConfigError) as caught:
        load_examples(data, "train", seed=0)
    assert caught.value.problems == problems


def test_the_faults_of_all_files_and_rows_at_once(tmp_path):
    good = '{"prompt": "a", "completion": "b"}\n'
    (tmp_path / "a.jsonl").write_text(good + "{broken\n" + '{"prompt": "x"}\n' * 3)
    (tmp_path / "b.csv").write_text("prompt,completion\na,b\nc\n,d\n")
    (tmp_path / "c.jsonl").write_bytes(b"")
    (tmp_path / "d.jsonl").write_text(good + "".join(f'"{i}"\n[{i}]\n' for i in range(40)))
    (tmp_path / "test.json").write_text("[1")
    tasks = {
        "a": {"files": {"train": "a.jsonl", "test": "test.json"}},
        "b": {"files": "b.csv"},
        "c": {"files": ["c.jsonl", "d.jsonl"]},
        "right": {"source": "jsonl", "files": "right.jsonl"},
    }
    (tmp_path / "right.jsonl").write_text(good)
    data = DataSection(root=str(tmp_path), tasks=tasks)
    with pytest.raises(DataError) as caught:
        load_splits(data, seed=0)
    head, *lines = str(caught.value).splitlines()
    assert head == f"{len(lines)} problems in the data:"
    assert all(line.startswith("  - ") for line in lines)
    said = [line.removeprefix(f"  - {tmp_path}/") for line in lines]
    starts = [
        "a.jsonl: row 2 is not JSON",
        "a.jsonl: row 3: no column 'completion'",
        "b.csv: row 2 (line 3) has 1 values",
        "b.csv: row 3: nothing is in the prompt's column",
        "c.jsonl: the file is empty",
        "d.jsonl: row 2 is a JSON string",
        "test.json: the file is not JSON",
    ]
    for line, start in zip(said, starts, strict=True):
        assert line.startswith(start)
    assert said[1].endswith("(and 2 more rows like it)")
    assert said[5].endswith("(and 79 more rows like it)")
    assert len(caught.value.faults) == 1 + 3 + 1 + 1 + 1 + 80 + 1


def test_no_more_than_five_faults_of_a_file(tmp_path):
    rows = "".join(f'{{"text": "t", "label": "l{"x" * i}"}}\n' for i in range(9))
    (tmp_path / "x.jsonl").write_text(rows)
    task = {"files": "x.jsonl", "format": "classification", "labels": ["a", "b"]}
    data = DataSection(root=str(tmp_path), tasks={"t": {**task, "prompt": "{text}"}})
    with pytest.raises(DataError) as caught:
        load_examples(data, "train", seed=0)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 6
    assert lines[-1] == f"  - {tmp_path}/x.jsonl: 4 more rows with other faults"


def test_a_file_of_two_splits_is_read_and_blamed_once(tmp_path):
    data = section(tmp_path, validation_fraction=0.2)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{broken\n')
    with pytest.raises(DataError, match=r"^\S+train\.jsonl: row 2 is not JSON") as caught:
        load_splits(data, seed=0)
    assert "\n" not in str(caught.value)
    assert "more row" not in str(caught.value)


def test_a_fraction_without_rows_is_said_by_name(tmp_path):
    data = section(tmp_path, validation_fraction=0.01)
    write(tmp_path / "train.jsonl", rows(20))
    said = r"data\.tasks\.t: validation_fraction 0\.01 of 20 rows is no row"
    with pytest.warns(UserWarning, match=said) as caught:
        examples = load_splits(data, seed=0)
    assert len(caught) == 1
    assert {split: len(tasks.get("t", [])) for split, tasks in examples.items()} == {
        "train": 20,
        "validation": 0,
        "test": 0,
    }
    data.tasks["t"].validation_fraction = 0.9999
    with pytest.raises(DataError, match="leaves no row to train on; lower it"):
        load_splits(data, seed=0)


def test_the_columns_of_share_gpt_are_found(tmp_path, tokenizer):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    write(tmp_path / "chat.jsonl", [{"conversations": turns}])
    data = DataSection(
        root=str(tmp_path), tasks={"t": {"files": "chat.jsonl", "format": "messages"}}
    )
    (row,) = load_examples(data, "train", seed=0, tokenizer=tokenizer)["t"]
    assert row.completion == "Hello"
    data.tasks["t"].messages_column = "chat"
    with pytest.raises(DataError, match="no column 'chat'"):
        load_examples(data, "train", seed=0, tokenizer=tokenizer)


def test_rows_of_0_1_0_have_the_same_fingerprint(tmp_path):
    """The sums were made by rotmole 0.1.0 from these files."""
    write(tmp_path / "x.jsonl", [{"id": 1, "q": 'a "b" {q}', "n": 1.5, "l": [1, "x"], "b": True}])
    (tmp_path / "x.csv").write_text('q,n\n"a, b",007\n;,1.0\n')
    tasks = {
        "json": {
            "source": "jsonl",
            "files": {"train": "x.jsonl"},
            "prompt": '{{x}} {"a": 1} {q} {n}: ',
            "completion": "{l} {b}",
        },
        "csv": {
            "source": "csv",
            "files": {"train": "x.csv"},
            "prompt": "{q}",
            "completion": "{n}",
        },
    }
    data = DataSection(root=str(tmp_path), tasks=tasks)
    assert fingerprint(load_examples(data, "train", seed=0)) == SUM_OF_0_1_0
