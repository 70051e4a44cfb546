"""Which cells a study has: tuning, the choice of the best settings, final seeds.

The plan follows from the study file and from the cells that are finished, so every process that
reads the folder comes to the same one.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotmole.comparison.grid import grown, name_of, trials
from rotmole.comparison.results import CELLS, FINAL, PLAN, TUNING, Result, read_cell
from rotmole.comparison.study import Study
from rotmole.files import atomic_write_text

FORMAT = 1


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        method, seed: of the run.
        stage: "tuning" or "final".
        settings: of the tuning grid, by full name.
    """

    method: str
    seed: int
    stage: str
    settings: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """The run folder, below the study's."""
        trial = [name_of(dict(self.settings))] if self.stage == TUNING else []
        return "/".join([CELLS, self.stage, self.method, *trial, f"seed-{self.seed}"])


@dataclass(frozen=True)
class Plan:
    """The cells that are known by now.

    Attributes:
        cells: tuning first, then final; those of one seed and trial stand together.
        grid: of tuning, with the values that were added; empty without tuning.
        chosen: method -> its best settings, as soon as tuning is finished.
        on_edge: methods whose best lies on the edge of a grid that may not grow further.
        open: whether more cells will follow when these are finished.
    """

    cells: tuple[Cell, ...]
    grid: Mapping[str, Sequence[float]]
    chosen: Mapping[str, Mapping[str, float]]
    on_edge: tuple[str, ...]
    open: bool


def make_plan(study: Study) -> Plan:
    """Work out the cells from the study file and from what is finished in its folder."""
    file = study.file
    if file.tune is None:
        chosen: dict[str, dict[str, float]] = {name: {} for name in file.methods}
        return Plan(_final(study, chosen), {}, chosen, (), open=False)
    grid = {key: sorted(values) for key, values in file.tune.grid.items()}
    for added in itertools.count():
        cells = _tuning(study, grid)
        results = {cell: read_cell(study.folder / cell.name) for cell in cells}
        if any(result is None for result in results.values()):
            return Plan(cells, grid, {}, (), open=True)
        chosen = _best(study, grid, results)
        edges = [
            (key, value, method)
            for method, settings in chosen.items()
            for key, best in settings.items()
            if (value := grown(grid[key], best)) is not None
        ]
        if not edges or added >= file.tune.growth:
            late = tuple(dict.fromkeys(method for _, _, method in edges))
            return Plan(cells + _final(study, chosen), grid, chosen, late, open=False)
        key, value, _ = min(edges)
        grid = grid | {key: sorted([*grid[key], value])}
    raise AssertionError  # pragma: no cover - count() does not end


def _tuning(study: Study, grid: Mapping[str, Sequence[float]]) -> tuple[Cell, ...]:
    assert study.file.tune is not None
    return tuple(
        Cell(method, seed, TUNING, tuple(trial.items()))
        for seed in study.file.tune.seeds
        for method in study.file.methods
        for trial in trials(study.adapter_of(method), grid)
    )


def _final(study: Study, chosen: Mapping[str, Mapping[str, float]]) -> tuple[Cell, ...]:
    return tuple(
        Cell(method, seed, FINAL, tuple(chosen[method].items()))
        for seed in study.file.seeds
        for method in study.file.methods
    )


def _best(
    study: Study, grid: Mapping[str, Sequence[float]], results: Mapping[Cell, Result | None]
) -> dict[str, dict[str, float]]:
    """Choose each method's settings: the lowest validation loss, the mean over tuning seeds.

    Of equal losses the first trial of the grid counts, whose values are the smallest.
    """
    assert study.file.tune is not None
    chosen = {}
    for method in study.file.methods:
        best, lowest = {}, math.inf
        for trial in trials(study.adapter_of(method), grid):
            losses = [
                result.nll
                for seed in study.file.tune.seeds
                if (result := results[Cell(method, seed, TUNING, tuple(trial.items()))])
            ]
            mean = sum(losses) / len(losses)
            if not best or mean < lowest:
                best, lowest = trial, mean
        chosen[method] = best
    return chosen


def write_plan(study: Study, plan: Plan, facts: Mapping[str, Any]) -> Path:
    """Write plan.json: what is compared, for whoever reads the results.

    Args:
        study: the study.
        plan: as of now.
        facts: dtype, device and threads of all cells.
    """
    file = study.file
    content = {
        "format": FORMAT,
        "study": study.where,
        "baseline": file.baseline,
        "equal": file.equal,
        "metrics": file.metrics,
        "split": file.split,
        "held_out": list(file.held_out),
        "seeds": file.seeds,
        "tuning_seeds": file.tune.seeds if file.tune else [],
        "grid": plan.grid,
        "chosen": plan.chosen,
        "on_edge": plan.on_edge,
        "complete": not plan.open,
        "facts": dict(facts),
        "methods": {
            name: {
                "adapter": sized.adapter,
                "solved": sized.field,
                "value": sized.value,
                "scale": sized.scale,
                "parameters": sized.parameters,
                "gate_parameters": sized.gates,
                "target": sized.target,
                "difference": sized.difference,
                "equal": sized.equal,
                "rounded": sized.rounded,
                "raised_layers": sized.raised,
                "written": study.written(name),
            }
            for name, sized in study.sized.items()
        },
        "cells": [cell.name for cell in plan.cells],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path = study.folder / PLAN
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return path
    return atomic_write_text(path, text)
