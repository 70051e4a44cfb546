"""A4: one meaning of labels, answers and scores in every file format."""

from __future__ import annotations

import json

import pyarrow as arrow
import pytest
from pyarrow import parquet

from rotmole.config.schema import DataSection, TaskSection
from rotmole.data import load_examples
from rotmole.data.formats import render
from rotmole.data.load import data_problems
from rotmole.data.sources import Row
from rotmole.errors import DataError

LABELLED = {"format": "classification", "prompt": "{text}"}


def label(value: object, labels: list[str]) -> int | str:
    """The index that a value means, or what is said of it."""
    task = TaskSection(**LABELLED, labels=labels)
    try:
        return render("t", task, [Row("x", 1, {"text": "a", "label": value})])[0].answer
    except DataError as error:
        return str(error)


@pytest.mark.parametrize(
    ("labels", "values", "index"),
    [
        (["1", "2", "3"], [1, "1", 1.0, "1.0", " 1"], 0),
        (["0", "1"], [1, "1", 1.0, True, "true"], 1),
        (["no", "yes"], [1, "1", 1.0, "yes", True, "True", "true"], 1),
        (["false", "true"], [True, "true", "True", "TRUE", 1, "1"], 1),
        (["False", "True"], [False, "false", "False", 0], 0),
        (["1.0", "2.0"], [1.0, "1.0"], 0),
        (["5", "6", "7"], [0, "0", "5", 5], 0),
    ],
)
def test_a_label_means_the_same_whatever_its_type(labels, values, index):
    assert [label(value, labels) for value in values] == [index] * len(values)


@pytest.mark.parametrize(
    ("labels", "value", "words"),
    [
        (["1", "2", "3"], 0, "as the label '1' is a number, values must be labels"),
        (["1", "2", "3"], "0", "as the label '1' is a number, values must be labels"),
        (["2", "1", "0"], 3, "must be 0..2 or one of 2, 1, 0"),
        (["yes", "no"], True, "which would be label 1, 'no', if true"),
        (["yes", "no"], "True", "write labels: [no, yes]"),
        (["a", "b", "c"], True, "is none of the 3 labels"),
        (["good", "bad"], "Good", "did you mean 'good'"),
        (["good", "bad"], 2, "must be 0..1 or one of good, bad"),
        (["good", "bad"], "", "must be 0..1"),
        (["good", "bad"], 0.5, "must be 0..1"),
        (["good", "bad"], -1, "must be 0..1"),
    ],
)
def test_a_label_that_cannot_be_read_in_one_way_is_refused(labels, value, words):
    assert words in str(label(value, labels))


def test_every_file_format_gives_the_same_rows(tmp_path):
    values = [1, 3, 2]
    rows = [{"text": f"t{value}", "label": value} for value in values]
    (tmp_path / "numbers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [{**row, "label": str(row["label"])} for row in rows]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    (tmp_path / "cells.csv").write_text("text;label\n" + "".join(f"t{v};{v}\n" for v in values))
    table = arrow.table({"text": [f"t{v}" for v in values], "label": [1.0, 3.0, 2.0]})
    parquet.write_table(table, tmp_path / "floats.parquet")
    with arrow.ipc.new_stream(tmp_path / "floats.arrow", table.schema) as writer:
        writer.write_table(table)
    found = {}
    for name in ("numbers.jsonl", "texts.json", "cells.csv", "floats.parquet", "floats.arrow"):
        task = {**LABELLED, "labels": ["1", "2", "3"], "files": name}
        data = DataSection(root=str(tmp_path), tasks={"t": task})
        found[name] = [(e.prompt, e.completion) for e in load_examples(data, "train", seed=0)["t"]]
    assert set(map(tuple, found.values())) == {(("t1", " 1"), ("t3", " 3"), ("t2", " 2"))}


def answers(*rows: tuple[list[str] | str, object]) -> list[int] | str:
    task = TaskSection(format="multiple_choice", prompt="{q}")
    made = [
        Row("x", number, {"q": "?", "choices": choices, "answer": answer})
        for number, (choices, answer) in enumerate(rows, start=1)
    ]
    try:
        return [example.answer for example in render("t", task, made)]
    except DataError as error:
        return str(error)


def test_answers_are_indices_letters_or_texts():
    words = ["bank", "library", "B"]
    assert answers((words, 1), (words, 0)) == [1, 0]
    assert answers((words, "1"), (words, "0.0"), (words, 2.0)) == "x: row 3: " + (
        "column 'answer' mixes types: a number here, a string in row 1; use one type; the row "
        'begins: {"q": "?", "choices": ["bank", "library", "B"], "answer": 2.0}'
    )
    assert answers((words, "1"), (words, "0.0")) == [1, 0]
    assert answers((words, "A"), (words, "C")) == [0, 2]
    assert answers((words, "library"), (words, "bank")) == [1, 0]
    assert answers((json.dumps(words), "bank")) == [0]  # as csv has lists


def test_answers_are_read_in_the_one_way_that_fits_all_rows():
    sums = ["1", "2", "4", "8"]
    # 8 is no index, so 2 is the text and not the index of "4"
    assert answers((sums, 2), (sums, 8)) == [1, 3]
    # 0 is no choice, so 2 is the index of "4"
    assert answers((sums, 2), (sums, 0)) == [2, 0]
    assert answers((["0", "1"], 1), (["0", "1"], 0)) == [1, 0]
    said = answers((sums, 2), (sums, 1))
    assert "which could be choice 2 as index and choice 1 as text; write letters" in said
    # no way fits all: each row has one meaning of its own, as in 0.1.0
    assert answers((["x", "y"], "A"), (["x", "y"], "1")) == [0, 1]


def test_scores_are_numbers_or_label_words():
    def score(value, **more):
        task = TaskSection(format="regression", prompt="{q}", **more)
        return render("t", task, [Row("x", 1, {"q": "?", "score": value})])[0].score

    assert [score(v) for v in (3, "3", 3.0, "3.0", "2.5")] == [3, 3, 3, 3, 2.5]
    words = ["bad", "fair", "good"]
    assert [score(v, labels=words) for v in ("good", 2, "2")] == [2, 2, 2]
    for wrong in (True, "true", "nan", "inf", "fine"):
        with pytest.raises(DataError, match="must be a number in 0"):
            score(wrong, labels=words)


def test_regression_labels_that_are_other_numbers_are_refused(tmp_path):
    """Stars 1 to 5: the score 4 would be the word '5'."""
    (tmp_path / "x.csv").write_text("q,score\na,4\n")
    task = {"files": "x.csv", "format": "regression", "prompt": "{q}"}

    def problems(labels: list[str]) -> list[str]:
        section = DataSection(root=str(tmp_path), tasks={"t": {**task, "labels": labels}})
        return data_problems(section)

    assert "so '1' may not be the word for another number" in problems(list("12345"))[0]
    assert problems(list("012345")) == []
