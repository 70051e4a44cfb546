"""Results of made-up studies, for tests of the judge and of what it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rotmole.comparison.results import FINAL, TUNING, Point, Result, Results, Row

FACTS = {
    "dtype": "float32", "device": "cpu", "threads": 1, "processor": "test", "commit": "abc",
    "versions": {"torch": "2.6"},
}  # fmt: skip
TASKS = {"dates": ("de", "fr"), "units": ("de", "fr")}
UPDATES = (0, 25, 50, 75, 100)


def made_results(
    shifts: Mapping[str, float],
    *,
    seeds: Sequence[int] = range(8),
    tasks: Mapping[str, Sequence[str]] = TASKS,
    rows: int = 6,
    tuned: bool = True,
    seconds: Mapping[str, float] | None = None,
) -> Results:
    """Results of a study in which each method's NLL is that of the first plus its shift.

    Args:
        shifts: method -> shift; the first is the baseline.
        tasks: task -> groups; () is a task without groups.
        rows: of each group.
        seconds: method -> seconds of its training; 100 if it is not named.
    """
    methods = tuple(shifts)
    final = [
        made_cell(n, method, seed, shifts[method], tasks, rows, (seconds or {}).get(method, 100))
        for n, method in enumerate(methods)
        for seed in seeds
    ]
    trials = [
        replace(cell, stage=TUNING, seed=100, rate=rate, nll=1 + (np.log10(rate) + 3) ** 2,
                settings={"training.learning_rate": rate}, rows={}, figures={})
        for cell in final if cell.seed == seeds[0]
        for rate in (3e-4, 1e-3, 3e-3)
    ]  # fmt: skip
    return Results(
        baseline=methods[0],
        methods=methods,
        metrics=("nll", "exact_match"),
        seeds=tuple(seeds),
        plan={},
        tuning=tuple(trials) if tuned else (),
        final=tuple(final),
        missing=(),
    )


def made_cell(
    number: int,
    method: str,
    seed: int,
    shift: float,
    tasks: Mapping[str, Sequence[str]] = TASKS,
    rows: int = 6,
    seconds: float = 100,
) -> Result:
    """One finished final cell: row effects common to all, a seed effect of this method, noise."""
    rng = np.random.default_rng([number, seed])
    level = 0.4 + shift + rng.normal(0, 0.01)
    hard = np.random.default_rng(7)  # the same for all cells
    scored = {}
    for task, groups in tasks.items():
        for group in groups or ("",):
            for index in range(rows):
                nll = level + 0.2 * hard.random() + rng.normal(0, 0.02)
                right = float(rng.random() > nll)
                name = f"{task}/{group}{index}"
                scored[name] = Row(task, group, nll, 5, {"exact_match": right, "perplexity": 9.0})
    curve = tuple(
        Point(update, seconds * update / 100, 50 * update, 1e9 * (1 + number) * update,
              level + 2 * float(np.exp(-update / 25)) + rng.normal(0, 0.01))
        for update in UPDATES
    )  # fmt: skip
    return Result(
        method=method, stage=FINAL, seed=seed, settings={"training.learning_rate": 1e-3}, rate=1e-3,
        parameters=1_000_000 + 4_000 * number, gate_parameters=1_000 * number,
        difference=0.004 * number, equal=True, updates=100, tokens=5_000, train_seconds=seconds,
        flops=1e11 * (1 + number), nll=level, facts=FACTS, rows=scored, figures={}, curve=curve,
        folder=Path(f"cells/final/{method}/seed-{seed}"),
    )  # fmt: skip
