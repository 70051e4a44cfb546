"""Figures of usage from recorded sums."""

from __future__ import annotations

import math

import pytest
import torch

from rotmole.inspection.inspection import ALL
from rotmole.inspection.usage import affinities, usage_by_task
from rotmole.recording.statistics import LayerStatistics, TaskStatistics

CHOICES = {"units/de": [8, 2], "units/fr": [1, 9], "dates/de": [6, 4], "dates/fr": [0, 30]}


def recorded(choices: dict[str, list[int]]) -> LayerStatistics:
    """Sums of one expert for each token."""
    tasks = {}
    for name, counts in choices.items():
        task = TaskStatistics.empty(2)
        task.tokens = task.rows = sum(counts)
        task.choices_E = task.top_E = torch.tensor(counts)
        task.weight_E = task.part_E = torch.tensor(counts).double()
        task.pairs_EE = torch.diag(task.choices_E)
        task.squares_E = task.choices_E.double()  # rows of one token
        tasks[name] = task
    return LayerStatistics(2, 1, "top_k", "none", 4, has_router=True, tasks=tasks)


def information(table: list[list[int]]) -> float:
    total = sum(map(sum, table))
    rows, columns = (
        [sum(row) for row in table],
        [sum(column) for column in zip(*table, strict=True)],
    )
    return sum(
        count / total * math.log(count * total / (rows[t] * columns[e]))
        for t, row in enumerate(table)
        for e, count in enumerate(row)
        if count
    )


def test_tasks_and_groups_are_summed_apart() -> None:
    found = affinities(recorded(CHOICES))
    assert found["task"].information == pytest.approx(information([[9, 11], [6, 34]]))
    assert found["group"].information == pytest.approx(information([[14, 6], [1, 39]]))
    assert affinities(recorded({"units": [3, 4]})) == {}
    assert affinities(recorded({"units": [3, 4], "dates": [4, 3]})).keys() == {"task"}
    assert affinities(recorded({"units/de": [3, 4], "units/fr": [4, 3]})).keys() == {"group"}


def test_usage_has_no_number_that_is_none_known() -> None:
    usage = usage_by_task(recorded(CHOICES))
    assert list(usage) == [ALL, *CHOICES]
    assert usage[ALL].choices == (15, 45)
    assert usage[ALL].share == pytest.approx((0.25, 0.75))
    assert usage["dates/fr"].weight == (None, 1.0)
    assert usage["dates/fr"].together == ((0.0, 0.0), (0.0, 1.0))
    assert usage_by_task(recorded({"units": [3, 4]})).keys() == {ALL}
