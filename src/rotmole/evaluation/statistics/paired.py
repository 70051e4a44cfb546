"""Paired differences: intervals, exact sign-flip tests, Holm's steps, what could have been seen.

    d_i = second_i - first_i,    i = 1 .. n units, such as training seeds

The interval is Student's t over the units. The test flips signs: if the two systems are alike, d_i
and -d_i are equally likely, so with n units no p-value is below 2 / 2^n.

A unit is what was drawn anew and independently: the seed, if each method was trained with several;
otherwise the row of the test set, and then nothing is said of other training seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

LEVEL = 0.05
POWER = 0.8
_EXACT = 1 << 14  # the most sign patterns that are counted; more are sampled
_BLOCK = 1 << 22  # signs drawn at a time


@dataclass(frozen=True)
class Paired:
    """The mean paired difference, second minus first.

    Attributes:
        value: mean over the units.
        low, high: ends of the 95 % interval; None with fewer than two units.
        n: number of units.
        p: of the sign-flip test, two-sided; None with fewer than two units.
        spread: standard deviation over the units; None with fewer than two.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    p: float | None
    spread: float | None


def paired(differences: Sequence[float], *, seed: int = 0) -> Paired:
    """Return the mean difference with its interval and its p-value.

    Args:
        differences: one a unit, finite.
        seed: of the sign patterns where there are too many to count.

    Raises:
        ValueError: there is no difference, or one is not finite.
    """
    d_n = np.asarray(differences, dtype=np.float64)
    if not d_n.size or not np.isfinite(d_n).all():
        raise ValueError(f"a paired comparison needs finite differences, not {d_n.tolist()}")
    n = len(d_n)
    if n < 2:
        return Paired(float(d_n.mean()), None, None, n, None, None)
    low, high = student_interval(d_n)
    spread = float(d_n.std(ddof=1))
    return Paired(float(d_n.mean()), float(low), float(high), n, sign_flip(d_n, seed=seed), spread)


def student_interval(differences: npt.ArrayLike, *, confidence: float = 1 - LEVEL) -> Any:
    """Return the ends of mean(d) -+ t_(n-1) sd(d) / sqrt(n), over the last axis.

    Args:
        differences: [..., n], n at least 2.
        confidence: 0 .. 1.

    Returns:
        Two arrays [...].
    """
    from scipy.stats import t

    d = np.asarray(differences, dtype=np.float64)
    n = d.shape[-1]
    half = t.ppf(0.5 + confidence / 2, n - 1) * d.std(axis=-1, ddof=1) / math.sqrt(n)
    return d.mean(axis=-1) - half, d.mean(axis=-1) + half


def sign_flip(differences: npt.ArrayLike, *, seed: int = 0) -> float:
    """Return the two-sided p-value of the sign-flip test of mean(d) = 0.

    With at most 14 units all 2^n patterns of signs are counted; with more, 9999 are sampled.
    Values below 0.0001 are not reached then.

    Args:
        differences: [n].
        seed: of the sampled patterns.
    """
    from scipy.stats import permutation_test

    d_n = np.asarray(differences, dtype=np.float64)
    exact = 2 ** len(d_n) <= _EXACT
    result = permutation_test(
        (d_n,), np.mean, permutation_type="samples", vectorized=True,
        n_resamples=_EXACT if exact else 9999, batch=max(1, _BLOCK // len(d_n)),
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return min(1.0, float(result.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values of a family adjusted by Holm's steps, in the given order.

        p_(i) -> max over j <= i of min(1, (m - j + 1) p_(j)),    p_(1) <= ... <= p_(m)

    A claim holds at level a if its adjusted value is at most a.

    Source: Holm 1979.
    """
    p_m = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_m, kind="stable")
    steps = np.maximum.accumulate((len(p_m) - np.arange(len(p_m))) * p_m[order])
    adjusted = np.empty_like(p_m)
    adjusted[order] = np.minimum(1.0, steps)
    return [float(p) for p in adjusted]


def seeds_needed(claims: int, *, level: float = LEVEL) -> int:
    """Return the fewest units with which a sign-flip test can pass Holm's first step.

        2 / 2^n <= level / claims

    >>> seeds_needed(1), seeds_needed(6), seeds_needed(25)
    (6, 8, 10)
    """
    return math.ceil(1 + math.log2(max(claims, 1) / level))


def detectable(spread: float, n: int, *, claims: int = 1, level: float = LEVEL) -> float:
    """Return the smallest true difference that a paired t-test finds in 80 % of studies.

    Args:
        spread: standard deviation of the differences over the units.
        n: number of units, at least 2.
        claims: of the family; the test is at level / claims, Holm's first step.

    Returns:
        A difference in the unit of the spread; 0 if the spread is 0.
    """
    return spread * _standardised(n, level / max(claims, 1)) / math.sqrt(n)


@lru_cache
def _standardised(n: int, level: float) -> float:
    """Return the non-centrality at which the t-test's power is POWER."""
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    bound = t.ppf(1 - level / 2, n - 1)
    return float(brentq(lambda shift: nct.sf(bound, n - 1, shift) - POWER, 0.0, 20 * bound))
