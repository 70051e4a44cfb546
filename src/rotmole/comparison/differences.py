"""Paired differences to a baseline by measure and part of the data, and the verdicts on them.

A unit is what pairs are made of: a seed of a study, or a row of the test set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rotmole.comparison import judgement as words
from rotmole.comparison.judgement import Difference, Measure
from rotmole.comparison.results import NLL
from rotmole.comparison.scores import HELD_OUT, OWN, Part, Scores
from rotmole.evaluation.metrics import METRICS
from rotmole.evaluation.statistics.paired import (
    LEVEL,
    Paired,
    detectable,
    holm,
    paired,
    seeds_needed,
)

ByUnit = Mapping[str, Mapping[Any, Scores]]
"""method -> unit, such as the seed -> its scores."""


def parts_of(by_unit: ByUnit) -> list[tuple[str, Part]]:
    """Return measures and parts: everything, then tasks, then groups, in the order of the data."""
    measured = dict.fromkeys(
        (measure, part)
        for seeds in by_unit.values()
        for values in seeds.values()
        for measure, parts in values.items()
        for part in parts
    )
    return sorted(measured, key=lambda key: (bool(key[1][0]), bool(key[1][1])))


def measures_of(own: Mapping[str, str]) -> tuple[Measure, ...]:
    """Return what claims are about.

    Args:
        own: task -> its own metric.
    """
    nll = Measure(NLL, "NLL", higher_is_better=False)
    if not own:
        return (nll,)
    names = set(own.values())
    higher = {METRICS[name].higher_is_better for name in names if name in METRICS} or {True}
    label = names.pop() if len(names) == 1 else OWN
    return nll, Measure(OWN, label, higher_is_better=higher == {True})


def finite_or_none(value: float) -> float | None:
    """Return a value, None in place of NaN and infinity, which JSON has not."""
    return value if math.isfinite(value) else None


def paired_differences(
    by_unit: ByUnit, pairs: Mapping[str, Sequence[Any]], baseline: str
) -> list[Difference]:
    """Return each method's differences to the baseline by measure and part, without verdicts.

    Args:
        by_unit: scores of every method, the baseline among them.
        pairs: method -> units that can be paired.
        baseline: name of the baseline.
    """
    differences = []
    for measure, part in parts_of(by_unit):
        for name, units in pairs.items():
            both = [[by_unit[side][unit].get(measure, {}) for side in (name, baseline)]
                    for unit in units]  # fmt: skip
            values = [
                here.get(part, math.nan) - there.get(part, math.nan)
                for here, there in both
                if part in here or part in there
            ]
            difference = estimate(values)
            verdict = words.DIVERGED if values and difference is None else ""
            differences.append(Difference(name, measure, *part, difference, verdict))
    return differences


def estimate(values: Sequence[float]) -> Paired | None:
    """Return the paired difference; None if there is none or one of them is not finite."""
    if not values or not all(map(math.isfinite, values)):
        return None
    return paired(values)


def claimed(
    differences: Sequence[Difference],
    equal: Sequence[str],
    measures: Sequence[Measure],
    claims: int,
) -> tuple[Difference, ...]:
    """Add verdicts to the differences over everything, by Holm's steps over the family.

    Args:
        differences: of all parts.
        equal: methods that claims are about.
        measures: that are judged.
        claims: size of the family.
    """
    family = [d for d in differences if _in_family(d, equal)]
    # a claim without a p-value stays in the family, which was stated before
    p_values = [1.0 if d.estimate is None or d.estimate.p is None else d.estimate.p for d in family]
    adjusted = dict(zip(map(id, family), holm(p_values), strict=True))
    higher = {measure.name: measure.higher_is_better for measure in measures}
    return tuple(
        d
        if d.task or d.measure == HELD_OUT
        else _verdict(d, adjusted.get(id(d)), claims, higher_is_better=higher[d.measure])
        for d in differences
    )


def _in_family(difference: Difference, equal: Sequence[str]) -> bool:
    claimed = not difference.task and difference.measure != HELD_OUT
    return claimed and difference.method in equal


def _verdict(
    d: Difference, adjusted: float | None, claims: int, *, higher_is_better: bool
) -> Difference:
    measured = d.estimate
    least = None
    if measured is not None and measured.spread is not None:
        least = detectable(measured.spread, measured.n, claims=claims)
    if d.verdict:
        verdict = d.verdict
    elif adjusted is None:
        verdict = words.UNEQUAL
    elif measured is None:
        verdict = words.UNPAIRED
    elif measured.n < seeds_needed(claims):
        verdict = words.FEW
    elif adjusted > LEVEL:
        verdict = words.NONE
    else:
        verdict = words.BETTER if (measured.value > 0) == higher_is_better else words.WORSE
    return replace(d, verdict=verdict, adjusted=adjusted, detectable=least)
