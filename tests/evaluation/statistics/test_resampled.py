from __future__ import annotations

import numpy as np
import pytest

from rotmole.evaluation.metrics import METRICS


def columns_of(name: str, n: int, seed: int) -> np.ndarray:
    """Numbers such as the metric meets them, with rare classes and repeated scores."""
    rng = np.random.default_rng(seed)
    if name in ("macro_f1", "matthews"):
        right = rng.choice(4, size=n, p=[0.6, 0.3, 0.08, 0.02])
        chosen = np.where(rng.random(n) < 0.6, right, rng.integers(0, 4, n))
        return np.stack([right, chosen], axis=1).astype(float)
    if name in ("pearson", "spearman"):
        return np.stack([rng.integers(0, 6, n), rng.normal(size=n).round(1)], axis=1)
    if name == "perplexity":
        return np.stack([rng.exponential(size=n), rng.integers(1, 9, n)], axis=1)
    if name == "chrf":
        whole = rng.integers(0, 9, (n, 18)).astype(float)
        whole[:, 2::3] = np.minimum(whole[:, 0::3], whole[:, 1::3])
        return whole
    return rng.integers(0, 2, (n, 1)).astype(float)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("name", METRICS)
def test_every_resample_equals_the_library(name, n):
    metric = METRICS[name]
    rng = np.random.default_rng(n)
    columns = columns_of(name, n, seed=n)
    rows_BN = rng.integers(0, n, (12, n))
    rows_BN[0] = 0  # one row, again and again: everything is constant
    expected = [metric.value(columns[rows]) for rows in rows_BN]
    assert metric.resampled(columns, rows_BN) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", ["macro_f1", "matthews"])
def test_constant_predictions(name):
    columns = np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    rows_BN = np.array([[0, 1, 2, 3], [1, 1, 2, 2], [0, 0, 3, 3]])
    expected = [METRICS[name].value(columns[rows]) for rows in rows_BN]
    assert METRICS[name].resampled(columns, rows_BN).tolist() == pytest.approx(expected)
