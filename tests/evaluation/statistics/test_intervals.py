from __future__ import annotations

import numpy as np
import pytest

from rotmole.evaluation.statistics import intervals
from rotmole.evaluation.statistics.intervals import bootstrap, paired_difference, wilson
from rotmole.evaluation.statistics.resampled import mean


def test_wilson_by_hand():
    z = 1.959963984540054
    centre = (8 / 10 + z * z / 20) / (1 + z * z / 10)
    half = z / (1 + z * z / 10) * np.sqrt(0.8 * 0.2 / 10 + z * z / 400)
    assert wilson(8, 10) == pytest.approx((centre - half, centre + half))


def test_wilson_of_none_and_all():
    assert wilson(0, 10)[0] == 0.0
    assert 0.2 < wilson(0, 10)[1] < 0.35
    assert wilson(10, 10)[1] == 1.0


def test_the_bootstrap_is_seeded():
    columns = np.random.default_rng(1).normal(size=(40, 1))
    assert bootstrap(mean, columns, seed=3) == bootstrap(mean, columns, seed=3)
    assert bootstrap(mean, columns, seed=3) != bootstrap(mean, columns, seed=4)


def test_bootstrap_intervals_cover_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap(mean, rng.exponential(size=(60, 1)), resamples=200, seed=seed)
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_bootstrap_matches_the_normal_interval_of_a_mean():
    columns = np.random.default_rng(2).normal(size=(500, 1))
    half = 1.96 * columns.std() / np.sqrt(500)
    low, high = bootstrap(mean, columns)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_pairing_cancels_what_is_hard_for_both():
    rng = np.random.default_rng(3)
    hard = rng.normal(size=(200, 1)) * 10
    second = hard + 1 + rng.normal(size=(200, 1)) * 0.1
    low, high = paired_difference(mean, hard, second)
    assert 0.95 < low < (second - hard).mean() < high < 1.05
    assert high - low < 0.1  # unpaired it would be about 4


def test_equal_systems_differ_by_exactly_nothing():
    columns = np.random.default_rng(4).normal(size=(30, 1))
    assert paired_difference(mean, columns, columns.copy()) == (0.0, 0.0)


def test_pairs_need_the_same_rows():
    with pytest.raises(ValueError, match="same rows, but one system has 3 and the other 4"):
        paired_difference(mean, np.zeros((3, 1)), np.zeros((4, 1)))


def test_blocks_only_bound_the_memory(monkeypatch):
    columns = np.random.default_rng(5).normal(size=(30, 1))
    whole = bootstrap(mean, columns)
    monkeypatch.setattr(intervals, "_BLOCK", 70)
    assert bootstrap(mean, columns) == whole
