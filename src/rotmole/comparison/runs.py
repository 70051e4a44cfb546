"""Two or more finished runs, paired by row, or by seed where each method has several.

With several seeds of each method, the seed is the unit, as in a study. Otherwise the row is: the
differences say which run is better on such rows, and nothing of other training seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Literal

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from rotmole.comparison.differences import ByUnit, claimed, measures_of, paired_differences
from rotmole.comparison.equal import TOLERANCE
from rotmole.comparison.judgement import FEW, Difference, Measure
from rotmole.comparison.results import Row
from rotmole.comparison.scores import own_metrics, row_scores, scores
from rotmole.data.examples import Example
from rotmole.errors import InputError
from rotmole.training.callbacks.metrics import read_metrics
from rotmole.training.folder.layout import ADAPTER, MANIFEST, METRICS
from rotmole.tuner.storage.weights import read_header

FEW_ROWS = "too few rows for a claim"
"""The verdict where rows are the unit."""
Examples = Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class Run:
    """A run that was scored.

    Attributes:
        name: as the user wrote it.
        method: the same for runs that differ in their seed alone.
        seed: of training; None if it is not known.
        rows: "task/id" -> the scores of a row.
        figures: task -> metric -> figure of the whole task.
    """

    name: str
    method: str
    seed: int | None
    rows: Mapping[str, Row] = field(repr=False)
    figures: Mapping[str, Mapping[str, float]] = field(repr=False)


@dataclass(frozen=True)
class Trained:
    """How the adapter of a run came about, as its run folder says; None where that is not known.

    Attributes:
        parameters: trainable; those in the adapter's file where there is no run folder.
        updates, tokens: that the run had made and seen at the end.
        data: a checksum of its training rows.
    """

    parameters: int | None = None
    updates: int | None = None
    tokens: int | None = None
    data: str | None = None


@dataclass(frozen=True)
class RunDifferences:
    """What the comparison of runs has found.

    Attributes:
        unit: what the differences are paired by.
        baseline: name of the first run or method.
        measures: that are judged.
        members: name -> names of its runs, one a seed.
        differences: to the baseline, over everything and by task.
        claims: size of the family of claims: all over everything.
        left_out: tasks whose own metric has no figure of a single row.
    """

    unit: Literal["row", "seed"]
    baseline: str
    measures: tuple[Measure, ...]
    members: Mapping[str, tuple[str, ...]]
    differences: tuple[Difference, ...]
    claims: int
    left_out: tuple[str, ...]


def compare_runs(runs: Sequence[Run], metrics: Sequence[str]) -> RunDifferences:
    """Compare runs with the first one, or methods with the method of the first run.

    Args:
        runs: at least two, scored on the same rows.
        metrics: names in the order in which a task's own metric is chosen.
    """
    own = own_metrics(runs, metrics)
    by_seed = _by_seed(runs)
    if by_seed:
        units: ByUnit = {
            name: {seed: scores(run, own) for seed, run in members.items()}
            for name, members in by_seed.items()
        }
        members = {name: tuple(r.name for r in part.values()) for name, part in by_seed.items()}
        left_out: tuple[str, ...] = ()
    else:
        units = {run.name: row_scores(run, own) for run in runs}
        members = {run.name: (run.name,) for run in runs}
        seen = {row.task for run in runs for row in run.rows.values() if _has(row, own)}
        left_out = tuple(task for task in own if task not in seen)
    baseline, *others = units
    pairs = {name: [u for u in units[name] if u in units[baseline]] for name in others}
    differences = paired_differences(units, pairs, baseline)
    measures = tuple(m for m in measures_of(own) if any(d.measure == m.name for d in differences))
    claims = len(others) * len(measures)
    judged = claimed(differences, others, measures, claims)
    unit: Literal["row", "seed"] = "seed" if by_seed else "row"
    if unit == "row":
        judged = tuple(replace(d, verdict=FEW_ROWS) if d.verdict == FEW else d for d in judged)
    return RunDifferences(unit, baseline, measures, members, judged, claims, left_out)


def _has(row: Row, own: Mapping[str, str]) -> bool:
    return own.get(row.task) in row.metrics


def _by_seed(runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Return method -> seed -> run; {} if seeds cannot be the unit."""
    methods: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run.seed is None or run.seed in methods.get(run.method, {}):
            return {}
        methods.setdefault(run.method, {})[run.seed] = run
    first = next(iter(methods.values()))
    if len(methods) < 2 or any(len(first.keys() & seeds.keys()) < 2 for seeds in methods.values()):
        return {}
    return {_label([run.name for run in seeds.values()]): seeds for seeds in methods.values()}


def _label(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more"


def trained(adapter: Path | None) -> Trained:
    """Read how the adapter of a run folder, or another one, came about; None is a base model."""
    if adapter is None:
        return Trained(parameters=0)
    folder = adapter.resolve().parent
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        file = adapter / SAFETENSORS_WEIGHTS_NAME
        header = read_header(file).values() if file.is_file() else []
        return Trained(parameters=sum(prod(entry.shape) for entry in header) or None)
    # a checkpoint has not made all updates
    logs = read_metrics(folder / METRICS) if adapter.resolve().name == ADAPTER else []
    train = json.dumps(manifest["data"]["splits"].get("train"), sort_keys=True)
    return Trained(
        parameters=manifest["adapter"]["trainable_parameters"],
        updates=max((log.get("step", 0) for log in logs), default=None),
        tokens=max((log.get("num_input_tokens_seen", 0) for log in logs), default=None),
        data=sha256(train.encode()).hexdigest()[:12],
    )


def unequal(here: Trained, first: Trained) -> list[str]:
    """Say what tells a run from the first one beside its method, as far as it is known."""
    reasons = []
    if here.parameters and first.parameters:
        apart = here.parameters / first.parameters - 1
        if abs(apart) > TOLERANCE:
            reasons.append(f"{100 * apart:+.1f} % trainable parameters")
    if here.data and first.data and here.data != first.data:
        reasons.append("other training rows")
    amounts = [(one.updates, one.tokens) for one in (here, first)]
    if amounts[0] != amounts[1] and None not in (here.updates, first.updates):
        reasons.append("another number of updates or tokens")
    return reasons


def check_same_rows(examples: Mapping[str, Examples]) -> None:
    """Compare the rows of every run with those of the first.

    Args:
        examples: name of a run -> its rows by task.

    Raises:
        InputError: a run has other rows; names the task and the first row that differs.
    """
    first, *others = examples
    for other in others:
        here, there = examples[first], examples[other]
        if list(here) != list(there):
            raise InputError(
                f"{other} has the tasks {', '.join(there)} and {first} has {', '.join(here)}; "
                f"runs are compared on the same rows: {_ADVICE}."
            )
        for task in here:
            if reason := _unlike(here[task], there[task]):
                raise InputError(
                    f"{other} has other rows than {first} in task {task!r} ({reason}); runs are "
                    f"compared on the same rows: {_ADVICE}."
                )


_ADVICE = (
    "choose a split that they share with --split, or give all of them the data of one run file "
    "with --config RUN.yaml"
)


def _unlike(here: Sequence[Example], there: Sequence[Example]) -> str:
    if len(here) != len(there):
        return f"{len(there)} and {len(here)} rows"
    for number, (one, other) in enumerate(zip(here, there, strict=True), start=1):
        if _key(one) != _key(other):
            return f"the first that differs is row {number}: {other.prompt[:40]!r}"
    return ""


def _key(row: Example) -> tuple[object, ...]:
    return row.id, row.group, row.prompt, row.completion, row.choices, row.answer, row.score
