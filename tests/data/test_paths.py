"""`files` as names, folders and patterns, and the splits that a folder's names say."""

from __future__ import annotations

import pytest

from rotmole.config.load import load_run
from rotmole.config.schema import DataSection
from rotmole.data import data_problems, load_examples
from rotmole.errors import ConfigError

ROW = '{"prompt": "p", "completion": "c"}\n'


def make(tmp_path, *names: str) -> None:
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = ROW if "json" in name else "prompt,completion\np,c\n"
        path.write_text(text)


def section(tmp_path, files: object, **more: object) -> DataSection:
    return DataSection(root=str(tmp_path), tasks={"t": {"files": files, **more}})


def origins(tmp_path, files: object, split: str = "train", **more: object) -> list[str]:
    rows = load_examples(section(tmp_path, files, **more), split, seed=0).get("t", [])
    return [row.origin.removeprefix(f"{tmp_path}/").partition(":")[0] for row in rows]


def problem(tmp_path, files: object, **more: object) -> str:
    return "; ".join(data_problems(section(tmp_path, files, **more)))


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ("a.jsonl", ["a.jsonl"]),
        (["b/2.csv", "a.jsonl"], ["b/2.csv", "a.jsonl"]),
        ({"train": "b"}, ["b/1.json", "b/2.csv", "b/c/3.ndjson"]),
        ({"train": ["a.jsonl", "b/c"]}, ["a.jsonl", "b/c/3.ndjson"]),
        ("b/*.csv", ["b/2.csv"]),
        ("**/*.[jn]*son*", ["a.jsonl", "b/1.json", "b/c/3.ndjson"]),
        ("b", ["b/1.json", "b/2.csv", "b/c/3.ndjson"]),
        ("x[1].csv", ["x[1].csv"]),
    ],
)
def test_names_folders_and_patterns(tmp_path, files, found):
    make(tmp_path, "a.jsonl", "b/2.csv", "b/1.json", "b/c/3.ndjson", "b/.4.csv", "b/.git/5.csv")
    make(tmp_path, "x[1].csv", "b/README.md", "b/__MACOSX/6.csv", "b/dataset_info.json")
    assert origins(tmp_path, files) == found


def test_the_names_in_a_folder_say_the_split(tmp_path):
    make(tmp_path, "d/train-0.jsonl", "d/train-1.jsonl", "d/dev.csv", "d/test/1.csv")
    splits = {split: origins(tmp_path, "d", split) for split in ("train", "validation", "test")}
    assert splits == {
        "train": ["d/train-0.jsonl", "d/train-1.jsonl"],
        "validation": ["d/dev.csv"],
        "test": ["d/test/1.csv"],
    }
    assert "there is a validation split" in problem(tmp_path, "d", validation_fraction=0.1)
    # a name counts before the folders above it, and a word only as a whole
    make(tmp_path, "e/train/val.csv", "e/train/trainer.csv", "e/train/data-00000-of-1.csv")
    assert origins(tmp_path, "e", "validation") == ["e/train/val.csv"]
    assert len(origins(tmp_path, "e")) == 2


def test_a_source_that_is_set_reads_its_own_files_alone(tmp_path):
    make(tmp_path, "d/1.csv", "d/2.jsonl", "d/3.json", "d/4.tsv")
    assert origins(tmp_path, "d", source="csv") == ["d/1.csv", "d/4.tsv"]
    assert origins(tmp_path, "d", source="jsonl") == ["d/2.jsonl", "d/3.json"]
    (tmp_path / "rows.txt").write_text(ROW)
    assert origins(tmp_path, "rows.txt", source="jsonl") == ["rows.txt"]


def test_a_delimiter_is_one_character():
    text = "output_dir: x\ndata: {tasks: {a: {files: x.csv, delimiter: ';;'}}}\n"
    with pytest.raises(ConfigError, match=r"delimiter: ';;' is not one character, such as ; or"):
        load_run(None, text=text)


@pytest.mark.parametrize(
    ("files", "more", "words"),
    [
        ("rows.txt", {}, "rows.txt is none of .jsonl, .ndjson"),
        ("rows.xlsx", {}, "rows.xlsx is a workbook; save its sheet as CSV UTF-8"),
        ("rows.jsnol", {}, "there is no file"),
        ("rows.jsnol", {}, "did you mean 'rows.jsonl'"),
        ("https://x.org/a.csv", {}, "download it first, or use source: hub"),
        ("*.arrow", {}, "files: no file matches"),
        ({"train": "empty"}, {}, "files.train: the folder"),
        ("empty", {"source": "parquet"}, "has no file that ends in .parquet"),
        ("mixed", {}, "has files of the split test, but the name of other.csv says none"),
        ([], {}, "needs `files`"),
        ({"train": []}, {}, "files.train is empty"),
        ("rows.jsonl", {"delimiter": ";"}, "delimiter has an effect on csv files only"),
        ("rows.jsonl", {"dataset": "a/b"}, "dataset has an effect with source hub only"),
        ("rows.jsonl", {"source": "hub", "dataset": "a/b"}, "files have no effect with source hub"),
    ],
)
def test_what_names_nothing_is_a_problem(tmp_path, files, more, words):
    make(tmp_path, "rows.jsonl", "rows.txt", "rows.xlsx", "mixed/test.csv", "mixed/other.csv")
    (tmp_path / "empty").mkdir()
    assert words in problem(tmp_path, files, **more)
