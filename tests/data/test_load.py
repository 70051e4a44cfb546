from __future__ import annotations

import json

import pytest

from rotmole.config.schema import DataSection
from rotmole.data import data_problems, load_examples
from rotmole.data.load import within_limit
from rotmole.errors import ConfigError


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
