"""The scores of a cell: a mean over rows for each part of the data, then a mean over parts.

    score(cell, part)  = mean over the rows of a task's group
    score(cell, task)  = mean over its groups
    score(cell)        = mean over the groups of all tasks, each with the same weight

Tasks that no cell trains on (`held_out`) have a measure of their own, their NLL, and count in no
other.

A task's own metric is the first of the study's metrics that its rows have, perplexity left out,
which says the same as NLL. A metric of many rows, such as matthews, is that of the whole task.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Protocol

from rotmole.comparison.results import NLL, Row

OWN = "own metric"
HELD_OUT = "held-out nll"
PERPLEXITY = "perplexity"
Part = tuple[str, str]
Scores = dict[str, dict[Part, float]]
"""measure ("nll", "own metric", "held-out nll") -> (task, group) -> score.

Group "" is the task, both "" is all.
"""


class Scored(Protocol):
    """What has been scored: a cell of a study, or a run."""

    @property
    def rows(self) -> Mapping[str, Row]:
        """ "task/id" -> the scores of a row."""

    @property
    def figures(self) -> Mapping[str, Mapping[str, float]]:
        """task -> metric -> figure of the whole task."""


def own_metrics(cells: Sequence[Scored], metrics: Sequence[str]) -> dict[str, str]:
    """Return each task's own metric; tasks without any of the metrics are left out.

    Args:
        cells: finished cells with rows.
        metrics: of the study, in order.
    """
    wanted = [name for name in metrics if name not in (NLL, PERPLEXITY)]
    have: dict[str, set[str]] = {}
    for cell in cells:
        for row in cell.rows.values():
            have.setdefault(row.task, set()).update(row.metrics)
        for task, figures in cell.figures.items():
            have.setdefault(task, set()).update(figures)
    chosen = {task: next((m for m in wanted if m in names), None) for task, names in have.items()}
    return {task: metric for task, metric in chosen.items() if metric is not None}


def scores(cell: Scored, own: Mapping[str, str], held_out: Collection[str] = ()) -> Scores:
    """Return the scores of a cell by measure and part.

    Args:
        cell: finished, with rows.
        own: task -> its own metric.
        held_out: tasks that the cell did not train on.
    """
    parts: dict[Part, list[str]] = {}
    for name, row in cell.rows.items():
        parts.setdefault((row.task, row.group), []).append(name)
    nll = {part: fmean(cell.rows[name].nll for name in names) for part, names in parts.items()}
    result = {
        measure: _totals(values)
        for measure, is_held_out in ((NLL, False), (HELD_OUT, True))
        if (values := {p: v for p, v in nll.items() if (p[0] in held_out) == is_held_out})
    }
    values: dict[Part, float] = {}
    own = {task: metric for task, metric in own.items() if task not in held_out}
    for part, names in parts.items():
        metric = own.get(part[0])
        metrics = [cell.rows[name].metrics.get(metric or "") for name in names]
        if metric is not None and all(value is not None for value in metrics):
            values[part] = fmean(value for value in metrics if value is not None)
    for task, metric in own.items():
        if not any(part[0] == task for part in values):
            value = cell.figures.get(task, {}).get(metric)
            values[task, ""] = math.nan if value is None else value
    if values:
        result[OWN] = _totals(values)
    return result


def row_scores(cell: Scored, own: Mapping[str, str]) -> dict[str, Scores]:
    """Return the scores of each row by measure and the parts it belongs to.

    A metric of many rows has no scores of single ones and is left out.

    Args:
        cell: finished, with rows.
        own: task -> its own metric.
    """
    result = {}
    for name, row in cell.rows.items():
        parts = dict.fromkeys([("", ""), (row.task, ""), (row.task, row.group)])
        values = {NLL: row.nll, OWN: row.metrics.get(own.get(row.task, ""))}
        result[name] = {
            measure: dict.fromkeys(parts, value)
            for measure, value in values.items()
            if value is not None
        }
    return result


def _totals(parts: Mapping[Part, float]) -> dict[Part, float]:
    """Return the mean of all parts, the mean of each task, and the parts that are groups."""
    tasks = {task: [v for part, v in parts.items() if part[0] == task] for task, _ in parts}
    by_task = {(task, ""): fmean(values) for task, values in tasks.items()}
    groups = {part: value for part, value in parts.items() if part[1]}
    return {("", ""): fmean(parts.values()), **by_task, **groups}
