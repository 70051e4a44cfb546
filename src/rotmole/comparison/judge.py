"""From the results of a study to verdicts: paired differences to the baseline, the seed as unit.

A claim is about everything that was scored, by NLL or by the tasks' own metrics. The family of
claims holds each method that is equal in parameters, by each measure. Tasks, groups, equal seconds
and equal operations have intervals and are no claims.

A study without final seeds is a screen: the tuning cells of each method's chosen settings stand in
for final ones, scored by their validation loss, and nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from rotmole.comparison.differences import (
    ByUnit,
    claimed,
    estimate,
    finite_or_none,
    measures_of,
    paired_differences,
    parts_of,
)
from rotmole.comparison.judgement import (
    AtBudget,
    Clock,
    Curve,
    Judgement,
    Measure,
    Method,
    Score,
    Trial,
)
from rotmole.comparison.results import NLL, SCORED_FACTS, TUNING, Point, Result, Results
from rotmole.comparison.scores import HELD_OUT, Scores, own_metrics, scores
from rotmole.errors import InputError
from rotmole.evaluation.statistics.paired import seeds_needed
from rotmole.units import count_word

VALIDATION = Measure(NLL, "validation NLL", higher_is_better=False)
UNSEEN = Measure(HELD_OUT, "NLL of held-out tasks", higher_is_better=False)

OTHER_SPLITS = {
    "train": "The final cells are scored on the rows that they were trained on.",
    "validation": "The final cells are scored on validation rows. Where these choose settings or "
    "weights too, all methods look better than they are on other rows.",
}
"""What has to be known of a study that is not scored on test rows."""

PAIRING_FACTS = ("dtype", "device", "threads", "processor", "data", *SCORED_FACTS)
"""Cells that differ in one of these are not paired."""

Cells = Mapping[str, Mapping[int, Result]]
"""method -> seed -> finished final cell."""


def judge(results: Results) -> Judgement:
    """Judge a study.

    Args:
        results: of its finished cells; cells that are missing are named in the notes.

    Raises:
        InputError: the baseline has no finished cell that could be judged.
    """
    stage, judged = _judged(results)
    cells: dict[str, dict[int, Result]] = {name: {} for name in results.methods}
    for cell in sorted(judged, key=lambda cell: cell.seed):
        cells[cell.method][cell.seed] = cell
    if not cells[results.baseline]:
        raise InputError(
            f"no {stage} cell of the baseline {results.baseline!r} is finished; run `rotmole "
            "compare` again, which goes on where it stopped."
        )
    known = own_metrics(judged, results.metrics)
    own = {task: metric for task, metric in known.items() if task not in results.held_out}
    by_cell = {
        name: {seed: _scores_of(cell, own, results.held_out) for seed, cell in seeds.items()}
        for name, seeds in cells.items()
    }
    pairs, notes = _pairs(cells, results.baseline)
    notes += _training_notes(cells, pairs, results.baseline)
    differences = tuple(paired_differences(by_cell, pairs, results.baseline))
    measures: tuple[Measure, ...] = (VALIDATION,)
    claims = 0
    if results.seeds:
        measures = measures_of(own)
        equal = _equal(cells, results)
        claims = len(equal) * len(measures)
        differences = claimed(differences, equal, measures, claims)
        measures += (UNSEEN,) if results.held_out else ()
    return Judgement(
        headline=_headline(results, claims),
        baseline=results.baseline,
        measures=measures,
        own_metrics=own,
        seeds=tuple(results.seeds),
        claims=claims,
        seeds_needed=seeds_needed(claims),
        study={k: v for k, v in results.plan.items() if k not in ("cells", "facts", "study")},
        facts=_shared_facts(judged),
        methods=tuple(_method(name, seeds) for name, seeds in cells.items() if seeds),
        scores=tuple(_averages(by_cell)),
        differences=differences,
        at_equal_flops=_at_budget(cells, pairs, results.baseline, _flops),
        curves=tuple(_curves(cells)),
        trials=tuple(_trials(results.tuning)),
        notes=tuple([*notes, *_facts_notes(judged), *_plan_notes(results), *_cost_notes(cells)]),
        clock=_clock(cells, pairs, results.baseline),
        missing=results.missing,
    )


def _judged(results: Results) -> tuple[str, Sequence[Result]]:
    """Return the final cells, or a screen's tuning cells of each method's best settings."""
    if results.seeds:
        return "final", results.final
    chosen = results.plan["chosen"]
    return "chosen", [
        cell
        for cell in results.tuning
        if cell.method in chosen and dict(cell.settings) == chosen[cell.method]
    ]


def _scores_of(cell: Result, own: Mapping[str, str], held_out: Collection[str]) -> Scores:
    if cell.stage == TUNING:
        return {NLL: {("", ""): cell.nll}}
    return scores(cell, own, held_out)


def _headline(results: Results, claims: int) -> str:
    count = len(results.seeds or results.plan["tuning_seeds"])
    counted = f"{count_word(count)} seed{'s' if count != 1 else ''}"
    if not results.seeds:
        return f"a screen by validation rows, rates tuned on {counted}: no claim is made"
    seeds = len(results.seeds)
    if not results.tuning:
        return f"rates not tuned, {counted}: shows the tool, decides nothing"
    if not claims:
        return f"rates tuned, {counted}: no claim, as no method is equal to the baseline"
    claimed = f"{claims} claim{'s' if claims != 1 else ''}"
    needed = seeds_needed(claims)
    if seeds < needed:
        return f"rates tuned, {counted}: too few seeds for a claim ({needed} for {claimed})"
    return f"rates tuned, {counted}, {claimed}"


def _equal(cells: Cells, results: Results) -> list[str]:
    """Return the methods that claims are about, those whose cells are not finished among them."""
    planned = results.plan.get("methods", {})
    names = [
        name
        for name, seeds in cells.items()
        if (_any(seeds).equal if seeds else planned.get(name, {}).get("equal", False))
    ]
    if results.baseline not in names:
        return []
    return [name for name in names if name != results.baseline]


def _any(seeds: Mapping[int, Result]) -> Result:
    return next(iter(seeds.values()))


def _pairs(cells: Cells, baseline: str) -> tuple[dict[str, list[int]], list[str]]:
    """Return method -> seeds that can be paired with the baseline, and why others cannot."""
    pairs: dict[str, list[int]] = {}
    notes = []
    for name, seeds in cells.items():
        if name == baseline:
            continue
        pairs[name] = []
        for seed, cell in seeds.items():
            other = cells[baseline].get(seed)
            if other is None:
                continue
            reason = _unlike(cell, other)
            if reason:
                notes.append(f"{name}, seed {seed}, is not paired with {baseline}: {reason}.")
            else:
                pairs[name].append(seed)
    return pairs, notes


def _unlike(cell: Result, other: Result) -> str:
    """Say why two cells cannot be paired; "" if they can."""
    for fact in PAIRING_FACTS:
        here, there = cell.facts.get(fact), other.facts.get(fact)
        older = fact in SCORED_FACTS and None in (here, there)
        if here != there and not older:
            return f"{fact.replace('_', ' ')} is {here} and {there}"
    if cell.rows.keys() != other.rows.keys():
        return f"they scored other rows ({len(cell.rows)} and {len(other.rows)})"
    return ""


def _shared_facts(cells: Sequence[Result]) -> dict[str, Any]:
    first = cells[0].facts
    return {k: v for k, v in first.items() if all(cell.facts.get(k) == v for cell in cells)}


def _facts_notes(cells: Sequence[Result]) -> list[str]:
    """Name the facts that differ between cells and do not keep them from being paired."""
    names = dict.fromkeys(name for cell in cells for name in cell.facts)
    notes = []
    for name in names:
        values = list(dict.fromkeys(str(cell.facts.get(name)) for cell in cells))
        if len(values) > 1 and name not in PAIRING_FACTS:
            notes.append(f"The cells differ in {name}: {'; '.join(values)}.")
    return notes


def _training_notes(cells: Cells, pairs: Mapping[str, Sequence[int]], baseline: str) -> list[str]:
    """Name the methods that were trained longer, shorter or on other rows than the baseline."""

    def amount(name: str, seeds: Sequence[int]) -> str:
        chosen = [cells[name][seed] for seed in seeds]
        updates, tokens = (fmean(c.updates for c in chosen), fmean(c.tokens for c in chosen))
        return f"{updates:,.0f} updates on {tokens:,.0f} tokens"

    return [
        f"{name} was not trained as {baseline} was, so their difference is not the method's alone: "
        f"{amount(name, seeds)} a cell, {baseline} {amount(baseline, seeds)}."
        for name, seeds in pairs.items()
        if any(_trained(cells[name][seed]) != _trained(cells[baseline][seed]) for seed in seeds)
    ]


def _trained(cell: Result) -> tuple[int, int]:
    return cell.updates, cell.tokens


def _plan_notes(results: Results) -> list[str]:
    notes = []
    if results.seeds and (note := OTHER_SPLITS.get(results.plan.get("split", ""))):
        notes.append(note)
    if left_out := dict.fromkeys(task for cell in results.final for task in cell.left_out):
        notes.append(f"Tasks without rows to score, left out: {', '.join(left_out)}.")
    if repeated := _repeated(results.final):
        notes.append(f"Rows that were scored and trained on as well: {repeated}.")
    for seed in dict.fromkeys(cell.seed for cell in results.tuning):
        if len({cell.facts.get("data") for cell in results.tuning if cell.seed == seed}) > 1:
            notes.append(
                f"The tuning cells of seed {seed} were trained on different data, so their losses "
                "do not say which settings are best."
            )
    if edge := results.plan.get("on_edge"):
        notes.append(f"The best settings lie on the edge of the tuning grid for {', '.join(edge)}.")
    if count := len(results.missing):
        counted = "1 cell is" if count == 1 else f"{count} cells are"
        notes.append(f"{counted} not finished: {', '.join(results.missing)}.")
    return notes


def _repeated(cells: Sequence[Result]) -> str:
    """Say how many scored rows of each task are training rows too: the most of any cell."""
    tasks = dict.fromkeys(task for cell in cells for task in cell.repeated)
    parts = []
    for task in tasks:
        worst = max(cells, key=lambda cell: cell.repeated.get(task, 0))
        total = sum(row.task == task for row in worst.rows.values())
        parts.append(f"{task} {worst.repeated[task]} of {total}")
    return ", ".join(parts)


def _method(name: str, seeds: Mapping[int, Result]) -> Method:
    cell = _any(seeds)
    return Method(
        name=name,
        parameters=cell.parameters,
        gate_parameters=cell.gate_parameters,
        difference=cell.difference,
        equal=cell.equal,
        settings=dict(cell.settings),
        rate=cell.rate,
        updates=fmean(cell.updates for cell in seeds.values()),
        tokens=fmean(cell.tokens for cell in seeds.values()),
        flops=_mean_flops(seeds),
        seeds=tuple(seeds),
    )


def _mean_flops(seeds: Mapping[int, Result]) -> float | None:
    known = [cell.flops for cell in seeds.values() if cell.flops is not None]
    return fmean(known) if len(known) == len(seeds) else None


def _cost_notes(cells: Cells) -> list[str]:
    unknown = [name for name, seeds in cells.items() if seeds and _mean_flops(seeds) is None]
    if not unknown:
        return []
    return [
        f"The operations of {', '.join(unknown)} depend on values and were not counted, so the "
        "table at equal operations leaves them out."
    ]


def _averages(by_unit: ByUnit) -> Iterable[Score]:
    for measure, part in parts_of(by_unit):
        for name, seeds in by_unit.items():
            values = {s: v[measure][part] for s, v in seeds.items() if part in v.get(measure, {})}
            if not values:
                continue
            finite = all(map(math.isfinite, values.values()))
            yield Score(
                method=name,
                measure=measure,
                task=part[0],
                group=part[1],
                value=fmean(values.values()) if finite else None,
                spread=stdev(values.values()) if finite and len(values) > 1 else None,
                by_seed={seed: finite_or_none(value) for seed, value in values.items()},
            )


def _at_budget(
    cells: Cells,
    pairs: Mapping[str, Sequence[int]],
    baseline: str,
    cost: Callable[[Point], float],
) -> tuple[AtBudget, ...]:
    """Compare validation NLL at the cost at which the cheaper of both ends."""
    result = []
    for name, seeds in pairs.items():
        values, budgets, shares = [], [], []
        for seed in seeds:
            curves = [cells[name][seed].curve, cells[baseline][seed].curve]
            if not all(curves):
                continue
            ends = [cost(curve[-1]) for curve in curves]
            if not all(map(math.isfinite, ends)):
                continue
            here, there = (_nll_at(curve, min(ends), cost) for curve in curves)
            values.append(here - there)
            budgets.append(min(ends))
            shares.append(min(ends) / ends[0] if ends[0] else 1.0)
        difference = estimate(values)
        budget, share = (fmean(budgets), fmean(shares)) if budgets else (None, None)
        result.append(AtBudget(name, budget, share, difference))
    return tuple(result)


def _flops(point: Point) -> float:
    return math.nan if point.flops is None else point.flops


def _nll_at(curve: Sequence[Point], budget: float, cost: Callable[[Point], float]) -> float:
    """Return the validation NLL at a cost, on a straight line between two validations."""
    costs = [cost(point) for point in curve]
    if budget < costs[0]:
        return math.nan
    return float(np.interp(budget, costs, [point.nll for point in curve]))


def _curves(cells: Cells) -> Iterable[Curve]:
    for name, seeds in cells.items():
        for seed, cell in seeds.items():
            if cell.curve:
                yield Curve(
                    method=name,
                    seed=seed,
                    update=tuple(point.update for point in cell.curve),
                    tokens=tuple(point.tokens for point in cell.curve),
                    flops=tuple(point.flops for point in cell.curve),
                    nll=tuple(finite_or_none(point.nll) for point in cell.curve),
                )


def _trials(cells: Sequence[Result]) -> Iterable[Trial]:
    for cell in cells:
        settings = dict(cell.settings)
        yield Trial(cell.method, settings, cell.rate, cell.seed, finite_or_none(cell.nll))


def _clock(cells: Cells, pairs: Mapping[str, Sequence[int]], baseline: str) -> Clock:
    return Clock(
        seconds={
            name: {seed: cell.train_seconds for seed, cell in seeds.items()}
            for name, seeds in cells.items()
            if seeds
        },
        curves={
            name: {seed: tuple(p.seconds for p in cell.curve) for seed, cell in seeds.items()}
            for name, seeds in cells.items()
            if seeds
        },
        at_equal_seconds=_at_budget(cells, pairs, baseline, lambda point: point.seconds),
    )
