from __future__ import annotations

from dataclasses import replace

import pytest

from rotmole.data.examples import Example
from rotmole.errors import ConfigError
from rotmole.evaluation.few_shot import with_examples


def rows(task: str, groups: str, start: int = 0) -> list[Example]:
    return [
        Example(task, group, str(start + i), f"{task} {group}{start + i}:", f" {i}")
        for i, group in enumerate(groups)
    ]


TRAIN = {"t": rows("t", "aaaabbbb"), "u": rows("u", "aaaa")}
ROW = rows("t", "a", start=90)[0]


def test_worked_examples_stand_before_the_prompt():
    shown = with_examples(ROW, TRAIN, count=2, seed=0)
    first, second, last = shown.prompt.split("\n\n")
    assert last == ROW.prompt
    assert {first, second} < {row.prompt + row.completion for row in TRAIN["t"][:4]}
    assert (shown.completion, shown.id) == (ROW.completion, ROW.id)


def test_none_is_the_row_itself():
    assert with_examples(ROW, {}, count=0, seed=0) is ROW


def test_the_draw_depends_on_seed_and_row_alone():
    more = {**TRAIN, "v": rows("v", "a")}
    for row in rows("t", "a" * 20, start=50):
        again = with_examples(row, more, count=2, seed=0)
        assert with_examples(row, TRAIN, count=2, seed=0) == again
    prompts = {with_examples(ROW, TRAIN, count=2, seed=seed).prompt for seed in range(20)}
    assert len(prompts) > 3


def test_a_small_group_borrows_from_the_task():
    shown = with_examples(ROW, {"t": rows("t", "abbb")}, count=3, seed=0)
    assert shown.prompt.count("\n\n") == 3


def test_a_row_never_shows_its_own_answer():
    with pytest.raises(ConfigError, match="has only 0 training rows"):
        with_examples(ROW, {"t": [ROW]}, count=1, seed=0)


def test_too_few_rows_are_told():
    with pytest.raises(ConfigError, match="examples_in_prompt is 9, but task 't' has only 8"):
        with_examples(ROW, TRAIN, count=9, seed=0)


def test_what_is_learnt_moves_with_the_prompt():
    row = replace(ROW, learnt=((2, 4), (len(ROW.prompt), len(ROW.prompt + ROW.completion))))
    shown = with_examples(row, TRAIN, count=2, seed=0)
    texts = [
        [(each.prompt + each.completion)[start:stop] for start, stop in each.learnt]
        for each in (row, shown)
    ]
    assert texts[0] == texts[1]
