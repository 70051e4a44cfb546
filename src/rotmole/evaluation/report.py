"""From answers to figures: the figures of one system, reports of several systems, and JSON."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from rotmole.data.examples import Example
from rotmole.evaluation.metrics import METRICS, Answer, choose, expected_score
from rotmole.evaluation.statistics.intervals import bootstrap, paired_difference, wilson
from rotmole.evaluation.statistics.resampled import Columns

FORMAT = 1


@dataclass(frozen=True)
class Measure:
    """A figure with the ends of its 95 % interval and its number of rows."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Cell:
    """The figures of one task ("" for all tasks) and one of its groups ("" for all groups)."""

    task: str
    group: str
    metrics: dict[str, Measure]


@dataclass(frozen=True)
class System:
    """The answers and figures of one system, such as a model with an adapter, on all tasks.

    Attributes:
        cells: of each task, followed by those of its groups if it has several.
        overall: pooled metrics over the rows of all tasks that have them.
        seconds: wall time of answering.
        examples: rows by task, as the system read them: with the examples in their prompts.
        answers: answers by task, in the order of the rows.
        columns: (task, metric) -> [N, k], which `compare` resamples.
        cut: task -> ids of rows whose prompts lost their beginning.
    """

    cells: tuple[Cell, ...]
    overall: dict[str, Measure]
    seconds: float
    examples: Mapping[str, Sequence[Example]]
    answers: Mapping[str, Sequence[Answer]]
    columns: Mapping[tuple[str, str], Columns] = field(repr=False)
    cut: Mapping[str, AbstractSet[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The figures of several systems on the same rows.

    Attributes:
        systems: by name, in the order of the table's columns.
        differences: name -> that system minus the first one, by task and group, then overall ("").
        settings: of the evaluation, such as split, limit and examples_in_prompt.
    """

    systems: dict[str, System]
    differences: dict[str, tuple[Cell, ...]]
    settings: dict[str, Any]


def measure_columns(metric: str, columns: Columns, *, seed: int) -> Measure:
    """Return the figure and the interval of a metric over [N, k] lines."""
    entry = METRICS[metric]
    value, n = entry.value(columns), len(columns)
    if entry.proportion:
        low, high = wilson(round(float(columns.sum())), n)
    else:
        low, high = bootstrap(entry.resampled, columns, seed=seed)
    return Measure(value, low, high, n)


def summarise(
    examples: Mapping[str, Sequence[Example]],
    answers: Mapping[str, Sequence[Answer]],
    metrics: Mapping[str, Sequence[str]],
    *,
    seconds: float,
    seed: int,
    cut: Mapping[str, AbstractSet[str]] | None = None,
) -> System:
    """All figures of one system.

    Args:
        examples: rows by task, none empty.
        seconds: wall time of the answers.
        cut: task -> ids of rows whose prompts lost their beginning.
    """
    columns = {
        (task, metric): METRICS[metric].columns(rows, answers[task])
        for task, rows in examples.items()
        for metric in metrics[task]
    }
    cells = tuple(
        Cell(task, group, {m: measure_columns(m, part, seed=seed) for m, part in parts.items()})
        for task, group, parts in _parts(examples, columns)
    )
    overall = {
        metric: measure_columns(metric, values, seed=seed)
        for metric, values in _pooled(columns).items()
    }
    return System(cells, overall, seconds, examples, answers, columns, cut or {})


def _parts(
    examples: Mapping[str, Sequence[Example]], columns: Mapping[tuple[str, str], Columns]
) -> Iterator[tuple[str, str, dict[str, Columns]]]:
    """Yield each task with its columns by metric, followed by its groups if it has several."""
    for task, rows in examples.items():
        by_metric = {metric: values for (name, metric), values in columns.items() if name == task}
        yield task, "", by_metric
        groups = sorted({row.group for row in rows})
        for group in groups if len(groups) > 1 else ():
            in_group = np.array([row.group == group for row in rows])
            yield task, group, {metric: values[in_group] for metric, values in by_metric.items()}


def _pooled(columns: Mapping[tuple[str, str], Columns]) -> dict[str, Columns]:
    parts: dict[str, list[Columns]] = {}
    for (_, metric), values in columns.items():
        if METRICS[metric].pooled:
            parts.setdefault(metric, []).append(values)
    return {metric: np.concatenate(values) for metric, values in parts.items()}


def compare(systems: Mapping[str, System], settings: Mapping[str, Any] | None = None) -> Report:
    """Make the report of several systems, with paired differences to the first one.

    Args:
        systems: by name; all on the same rows in the same order.
        settings: of the evaluation, shown in the report.

    Raises:
        ValueError: two systems answered different rows.
    """
    first_name, *others = systems
    first = systems[first_name]
    differences = {}
    for name in others:
        if _row_ids(systems[name]) != _row_ids(first):
            raise ValueError(
                f"systems {name!r} and {first_name!r} did not answer the same rows; evaluate both "
                "with the same split and limit"
            )
        differences[name] = _differences(first, systems[name])
    return Report(dict(systems), differences, dict(settings or {}))


def _row_ids(system: System) -> dict[str, list[str]]:
    return {task: [row.id for row in rows] for task, rows in system.examples.items()}


def _differences(first: System, second: System) -> tuple[Cell, ...]:
    """Return second minus first by task and group, then overall, for metrics that both have."""
    parts = zip(
        _parts(first.examples, first.columns), _parts(second.examples, second.columns), strict=True
    )
    pairs = [(task, group, before, after) for (task, group, before), (_, _, after) in parts]
    pairs.append(("", "", _pooled(first.columns), _pooled(second.columns)))
    return tuple(
        Cell(task, group, {m: _difference(m, before[m], after[m]) for m in after if m in before})
        for task, group, before, after in pairs
    )


def _difference(metric: str, first: Columns, second: Columns) -> Measure:
    entry = METRICS[metric]
    low, high = paired_difference(entry.resampled, first, second)
    return Measure(entry.value(second) - entry.value(first), low, high, len(first))


def to_json(report: Report) -> dict[str, Any]:
    """Return the report as values for json.dumps; figures that are not finite become None."""
    systems = {}
    for name, system in report.systems.items():
        systems[name] = {
            "seconds": round(system.seconds, 3),
            "rows_cut": {task: len(ids) for task, ids in system.cut.items() if ids},
            "overall": _measures(system.overall),
            "tasks": _tasks(system.cells),
        }
    differences = {name: _tasks(cells) for name, cells in report.differences.items()}
    overall = {name: tasks.pop("")["metrics"] for name, tasks in differences.items()}
    return {
        "format": FORMAT,
        "settings": report.settings,
        "systems": systems,
        "differences": {
            name: {"to": next(iter(report.systems)), "overall": overall[name], "tasks": tasks}
            for name, tasks in differences.items()
        },
    }


def _tasks(cells: Sequence[Cell]) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for cell in cells:
        if cell.group:
            groups = tasks[cell.task].setdefault("groups", {})
            groups[cell.group] = {"metrics": _measures(cell.metrics)}
        else:
            tasks[cell.task] = {"metrics": _measures(cell.metrics)}
    return tasks


def _measures(measures: Mapping[str, Measure]) -> dict[str, Any]:
    return {
        metric: {name: _finite(value) for name, value in asdict(measure).items()}
        for metric, measure in measures.items()
    }


def prediction_rows(report: Report) -> Iterator[dict[str, Any]]:
    """Yield one dictionary of JSON values per row: what was asked, and what each system answered.

        task, group, id, origin, prompt, reference    of the row; `cut` if its prompt was cut
        choices, right_choice, right_score            if the row has them
        systems: name -> prediction, log_likelihoods, choice, loss ..., metrics of this row alone

    Metrics that exist for many rows only, such as macro_f1, are left out of `metrics`.
    """
    first = next(iter(report.systems.values()))
    for task, examples in first.examples.items():
        for index, example in enumerate(examples):
            systems = {
                name: _prediction(system, task, index) for name, system in report.systems.items()
            }
            yield {**_question(example, first.cut.get(task, ())), "systems": systems}


def _question(example: Example, cut: Container[str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "task": example.task,
        "group": example.group,
        "id": example.id,
        "origin": example.origin,
        "prompt": example.prompt,
        "reference": example.completion,
    }
    if example.id in cut:
        row["cut"] = True
    if example.choices:
        row |= {"choices": list(example.choices), "right_choice": example.answer}
    if example.score is not None:
        row["right_score"] = example.score
    return row


def _prediction(system: System, task: str, index: int) -> dict[str, Any]:
    example, answer = system.examples[task][index], system.answers[task][index]
    row: dict[str, Any] = {}
    if answer.text is not None:
        row["prediction"] = answer.text
    if answer.log_likelihoods is not None:
        row["log_likelihoods"] = [_finite(value) for value in answer.log_likelihoods]
        row["choice"] = choose(answer.log_likelihoods, example.choices, per_byte=False)
        if example.score is not None:
            row["score"] = _finite(expected_score(answer.log_likelihoods))
    if answer.loss is not None:
        row |= {"loss": _finite(answer.loss), "tokens": answer.tokens}
    row["metrics"] = {
        metric: _finite(METRICS[metric].value(columns[index : index + 1]))
        for (name, metric), columns in system.columns.items()
        if name == task and METRICS[metric].by_row
    }
    return row


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
