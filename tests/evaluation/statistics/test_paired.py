"""Paired differences against simulations with known answers, and against counting by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from rotmole.evaluation.statistics.paired import (
    detectable,
    holm,
    paired,
    seeds_needed,
    sign_flip,
    student_interval,
)

STUDIES = 4000


def simulated(seeds: int, *, difference: float, studies: int = STUDIES, rng: int = 0):
    """Seed means of many studies [studies, seeds]: row effects, seed effects, noise of each cell.

    Two methods answer the same 50 rows. Rows are easy or hard for both, a seed is good or bad for
    one method, and a method likes some rows better; that difference belongs to the test set.
    """
    draw = np.random.default_rng(rng)
    rows = 50
    row = draw.normal(0, 1.0, (studies, 1, 1, rows))
    taste = draw.normal(0, 0.3, (studies, 2, 1, rows))
    taste -= taste.mean(-1, keepdims=True)  # the truth is the difference on this test set
    seed = draw.normal(0, 0.1, (studies, 2, seeds, 1))
    noise = draw.normal(0, 0.5, (studies, 2, seeds, rows))
    scores = row + taste + seed + noise
    return (scores[:, 1] - scores[:, 0]).mean(-1) + difference


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_the_interval_covers_the_truth_in_95_of_100_studies(seeds):
    low, high = student_interval(simulated(seeds, difference=0.2, rng=seeds))
    coverage = np.mean((low <= 0.2) & (high >= 0.2))
    error = np.sqrt(0.95 * 0.05 / STUDIES)
    assert abs(coverage - 0.95) < 3 * error


def test_the_percentile_bootstrap_does_not_cover():
    """The reason for Student's t, and the proof that the simulation can see a bad interval."""
    d = simulated(3, difference=0.0, studies=1000)
    draws = np.random.default_rng(0).integers(0, 3, (500, 3))
    low, high = np.percentile(d[:, draws].mean(-1), [2.5, 97.5], axis=1)
    assert np.mean((low <= 0) & (high >= 0)) < 0.8


def test_two_names_of_one_method_are_found_alike():
    """An A/A study: 1 in 20 tests errs, and with Holm's steps 1 in 20 studies at most."""
    studies, methods, seeds = 300, 3, 8
    d = simulated(seeds, difference=0.0, studies=studies * methods, rng=1)
    p = np.array([sign_flip(line) for line in d]).reshape(studies, methods)
    error = 3 * np.sqrt(0.05 * 0.95 / studies)
    assert np.mean(p <= 0.05) < 0.05 + error
    assert np.mean([min(holm(family)) <= 0.05 for family in p]) < 0.05 + error
    same = paired([0.0] * 8)
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_a_planted_difference_is_found():
    studies, seeds, claims = 100, 8, 6
    planted = simulated(seeds, difference=0.5, studies=studies, rng=2)
    others = simulated(seeds, difference=0.0, studies=studies * (claims - 1), rng=3)
    others = others.reshape(studies, claims - 1, seeds)
    found = 0
    for line, rest in zip(planted, others, strict=True):
        adjusted = holm([sign_flip(line), *map(sign_flip, rest)])
        found += adjusted[0] <= 0.05
    assert found > 0.95 * studies


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_signs_are_all_counted(n):
    d = np.random.default_rng(n).normal(0.5, 1.0, n)
    flips = np.array(list(itertools.product((-1, 1), repeat=n)))
    means = (flips * d).mean(1)
    by_hand = np.mean(np.abs(means) >= abs(d.mean()) - 1e-12)
    assert sign_flip(d) == pytest.approx(by_hand)
    assert sign_flip(np.arange(1, n + 1)) == pytest.approx(2 / 2**n)


def test_many_units_are_sampled_and_the_seed_repeats_them():
    d = np.random.default_rng(0).normal(0.1, 1.0, 300)
    assert sign_flip(d, seed=3) == sign_flip(d, seed=3)
    assert sign_flip(d) == pytest.approx(ttest_1samp(d, 0.0).pvalue, abs=0.02)


def test_the_interval_is_scipys():
    d = [0.3, 0.1, 0.4, 0.2]
    expected = ttest_1samp(d, 0.0).confidence_interval(0.95)
    result = paired(d)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high))
    assert result.value == pytest.approx(0.25)
    assert result.spread == pytest.approx(np.std(d, ddof=1))


def test_one_unit_has_no_interval():
    result = paired([0.3])
    assert (result.low, result.high, result.p, result.spread) == (None, None, None, None)


@pytest.mark.parametrize("bad", [[], [0.1, float("nan")], [float("inf")]])
def test_differences_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        paired(bad)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("claims", [1, 2, 6, 7, 25, 26])
def test_seeds_needed_is_where_the_test_can_first_pass(claims):
    n = seeds_needed(claims)
    assert 2 / 2**n <= 0.05 / claims < 2 / 2 ** (n - 1)


@pytest.mark.parametrize(("n", "claims"), [(3, 1), (8, 6)])
def test_the_detectable_difference_is_found_in_80_of_100_studies(n, claims):
    size = detectable(2.0, n, claims=claims)
    d = np.random.default_rng(0).normal(size, 2.0, (STUDIES, n))
    power = np.mean(ttest_1samp(d, 0.0, axis=1).pvalue <= 0.05 / claims)
    assert power == pytest.approx(0.8, abs=0.02)
