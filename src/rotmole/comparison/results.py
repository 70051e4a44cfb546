"""What a study has measured: one record a finished cell, read from the cells' folders.

A study folder holds `plan.json` (what is compared) and one ordinary run folder a cell:

    cells/tuning/METHOD/TRIAL/seed-N     trained; scored on validation rows while training
    cells/final/METHOD/seed-N            trained with the chosen settings; scored on the test split

A cell is finished when its folder has `cell.json`, which is written last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rotmole.errors import InputError
from rotmole.evaluation.files import PREDICTIONS, RESULT
from rotmole.training.callbacks.metrics import read_metrics
from rotmole.training.folder.layout import MANIFEST, METRICS

PLAN, CELL, CELLS = "plan.json", "cell.json", "cells"
NLL = "nll"
TUNING, FINAL = "tuning", "final"


@dataclass(frozen=True)
class Row:
    """The scores of one row.

    Attributes:
        task, group: of the row; group is "" where the task has none.
        nll: negative log-likelihood of the answer, the mean over its tokens.
        tokens: of the answer.
        metrics: name -> value of this row alone; metrics that need many rows are left out.
    """

    task: str
    group: str
    nll: float
    tokens: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Point:
    """One validation while training.

    Attributes:
        update: number of updates made.
        seconds: of training alone, validation and checkpoints left out, resumes included.
        tokens: trained on, padding left out.
        flops: floating-point operations of training, an estimate; None if they are not known.
        nll: mean validation loss over the rows.
    """

    update: int
    seconds: float
    tokens: int
    flops: float | None
    nll: float


@dataclass(frozen=True)
class Result:
    """One finished cell.

    Attributes:
        method: name in the study file.
        stage: "tuning" or "final".
        seed: of the cell.
        settings: the values of the tuning grid that the cell was trained with, by full name.
        rate: training.learning_rate.
        parameters: trainable, gates included.
        gate_parameters: those of scaling and rotation gates.
        difference: parameters relative to the target, such as 0.013; None without a target.
        equal: whether the method is part of claims at equal parameters.
        updates: made.
        tokens: trained on, padding left out.
        train_seconds: of training alone, resumes included.
        flops: floating-point operations of training, an estimate; None if they are not known.
        nll: validation loss of the weights that are the result; infinite where training diverged.
        facts: dtype, device, threads, processor, data: cells that differ in them are not paired;
            versions, commit, platform.
        rows: "task/id" -> scores on the test split; empty while tuning.
        figures: task -> metric -> figure of the whole task on the test split; empty while tuning.
        curve: validations, in order.
        folder: the run folder.
        repeated: task -> how many of the scored rows are training rows too.
        left_out: tasks that have no row in the split that was scored.
    """

    method: str
    stage: str
    seed: int
    settings: Mapping[str, Any]
    rate: float
    parameters: int
    gate_parameters: int
    difference: float | None
    equal: bool
    updates: int
    tokens: int
    train_seconds: float
    flops: float | None
    nll: float
    facts: Mapping[str, Any]
    rows: Mapping[str, Row] = field(repr=False)
    figures: Mapping[str, Mapping[str, float]] = field(repr=False)
    curve: Sequence[Point] = field(repr=False)
    folder: Path
    repeated: Mapping[str, int] = field(default_factory=dict)
    left_out: Sequence[str] = ()


@dataclass(frozen=True)
class Results:
    """All finished cells of a study, and what is missing.

    Attributes:
        baseline: the method that others are compared with.
        methods: names, in the order of the study file.
        metrics: "nll" and the metrics of the tasks that are judged, in order.
        seeds: final seeds.
        plan: plan.json: methods, target of parameters, tuning grid, chosen settings.
        tuning, final: finished cells of each stage.
        missing: folders of cells that the plan has and that are not finished.
        held_out: tasks that no cell trains on.
    """

    baseline: str
    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    plan: Mapping[str, Any]
    tuning: tuple[Result, ...]
    final: tuple[Result, ...]
    missing: tuple[str, ...]
    held_out: tuple[str, ...] = ()


def read_results(study: Path) -> Results:
    """Read what a study folder has.

    Args:
        study: the folder that `rotmole compare` writes.

    Raises:
        InputError: it is no study folder.
    """
    try:
        plan = json.loads((study / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"{str(study)!r} has no readable {PLAN}; give the folder that `rotmole compare` wrote."
        ) from None
    cells = {name: read_cell(study / name) for name in plan["cells"]}
    finished = [cell for cell in cells.values() if cell is not None]
    return Results(
        baseline=plan["baseline"],
        methods=tuple(plan["methods"]),
        metrics=tuple(plan["metrics"]),
        seeds=tuple(plan["seeds"]),
        plan=plan,
        held_out=tuple(plan.get("held_out", ())),
        tuning=tuple(cell for cell in finished if cell.stage == TUNING),
        final=tuple(cell for cell in finished if cell.stage == FINAL),
        missing=tuple(name for name, cell in cells.items() if cell is None),
    )


def read_cell(folder: Path) -> Result | None:
    """Read one cell.

    Args:
        folder: its run folder.

    Returns:
        The record; None where the cell is not finished.
    """
    try:
        content = json.loads((folder / CELL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    flops = content["flops"]
    each = None if flops is None else flops / max(content["updates"], 1)
    nll = content.pop("nll")
    content["facts"] |= _data(folder) | {
        name: content[name] for name in SCORED_FACTS if content.get(name) is not None
    }
    return Result(
        **{name: content[name] for name in _PLAIN},
        nll=math.inf if nll is None else nll,
        rows=rows_of(_lines(folder / PREDICTIONS)) if content["stage"] == FINAL else {},
        figures=_figures(folder / RESULT) if content["stage"] == FINAL else {},
        curve=tuple(_curve(folder / METRICS, each)),
        folder=folder,
        repeated=content.get("repeated", {}),
        left_out=tuple(content.get("left_out", ())),
    )


SCORED_FACTS = ("base_weights", "held_out_rows")
"""Checksums in cell.json; those of older cells have none."""
_PLAIN = (
    "method", "stage", "seed", "settings", "rate", "parameters", "gate_parameters", "difference",
    "equal", "updates", "tokens", "train_seconds", "flops", "facts",
)  # fmt: skip


def _data(folder: Path) -> dict[str, str]:
    """Return the checksum of all rows of a cell as a fact; methods have it in common in a seed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {"data": manifest["data"]["sha256"][:12]}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(lines: Iterable[Mapping[str, Any]], system: str = "after") -> dict[str, Row]:
    """Return "task/id" -> the scores of a row.

    Args:
        lines: of predictions.jsonl.
        system: whose answers are meant.
    """
    rows = {}
    for row in lines:
        scores = row["systems"][system]
        values = {k: v for k, v in scores["metrics"].items() if v is not None}
        loss = scores.get("loss")
        rows[f"{row['task']}/{row['id']}"] = Row(
            task=row["task"],
            group=row["group"],
            nll=math.inf if loss is None else loss / max(scores["tokens"], 1),
            tokens=scores.get("tokens", 0),
            metrics=values,
        )
    return rows


def _figures(path: Path) -> dict[str, dict[str, float]]:
    return figures_of(json.loads(path.read_text(encoding="utf-8")))


def figures_of(content: Mapping[str, Any], system: str = "after") -> dict[str, dict[str, float]]:
    """Return task -> metric -> figure of the whole task; figures that are not finite are left out.

    Args:
        content: of eval.json.
        system: whose figures are meant.
    """
    return {
        task: {m: e["value"] for m, e in part["metrics"].items() if e["value"] is not None}
        for task, part in content["systems"][system]["tasks"].items()
    }


def _curve(path: Path, flops: float | None) -> list[Point]:
    points = []
    for row in read_metrics(path):
        if row.get("eval_loss") is not None:
            update = row["step"]
            points.append(
                Point(
                    update=update,
                    seconds=row.get("train_seconds", 0.0),
                    tokens=int(row.get("num_input_tokens_seen", 0)),
                    flops=None if flops is None else flops * update,
                    nll=row["eval_loss"],
                )
            )
    return points
