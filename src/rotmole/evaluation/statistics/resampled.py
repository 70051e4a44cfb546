"""Metrics over many resamples of the same rows at once, for the bootstrap.

    figure_B[b] = metric(columns_Nk[rows_BN[b]])

A metric's figure itself always comes from its library (metrics.py). scikit-learn needs 5 ms a
call, so a thousand resamples of every task and group would take minutes. Macro-F1 and Matthews are
therefore computed here from confusion counts; a test compares them with scikit-learn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Columns = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


def mean(columns: Columns, rows_BN: Rows) -> Columns:
    """Mean of one column, [N, 1] -> [B]."""
    return np.asarray(columns[rows_BN, 0].mean(1))


def perplexity(columns: Columns, rows_BN: Rows) -> Columns:
    """exp(sum of loss / sum of tokens), [N, 2] -> [B]."""
    sums_B2 = columns[rows_BN].sum(1)
    return np.asarray(np.exp(sums_B2[:, 0] / sums_B2[:, 1]))


def macro_f1(columns: Columns, rows_BN: Rows) -> Columns:
    """Mean over the classes that occur of 2 TP / (2 TP + FP + FN), [N, 2] -> [B]."""
    counts_BCC = _confusion(columns, rows_BN)
    hits_BC = np.diagonal(counts_BCC, axis1=1, axis2=2)
    seen_BC = counts_BCC.sum(1) + counts_BCC.sum(2)
    f1_BC = np.divide(2 * hits_BC, seen_BC, out=np.zeros(seen_BC.shape), where=seen_BC > 0)
    return np.asarray(f1_BC.sum(1) / (seen_BC > 0).sum(1))


def matthews(columns: Columns, rows_BN: Rows) -> Columns:
    """Correlation of correct and chosen class (Gorodkin 2004), [N, 2] -> [B]; 0/0 gives 0."""
    counts_BCC = _confusion(columns, rows_BN).astype(np.float64)
    chosen_BC, right_BC = counts_BCC.sum(1), counts_BCC.sum(2)
    n = rows_BN.shape[1]
    hits_B = np.trace(counts_BCC, axis1=1, axis2=2)
    shared_B = hits_B * n - (chosen_BC * right_BC).sum(1)
    spread_B = (n**2 - (chosen_BC**2).sum(1)) * (n**2 - (right_BC**2).sum(1))
    return np.divide(shared_B, np.sqrt(spread_B), out=np.zeros(len(rows_BN)), where=spread_B > 0)


def _confusion(columns: Columns, rows_BN: Rows) -> npt.NDArray[np.int64]:
    """Counts [B, correct class, chosen class]."""
    label_N2 = columns.astype(np.int64)
    classes = int(label_N2.max()) + 1
    cell_BN = (label_N2[:, 0] * classes + label_N2[:, 1])[rows_BN]
    cell_BN = cell_BN + np.arange(len(rows_BN))[:, None] * classes**2
    counts = np.bincount(cell_BN.ravel(), minlength=len(rows_BN) * classes**2)
    return counts.reshape(len(rows_BN), classes, classes)


def pearson(columns: Columns, rows_BN: Rows) -> Columns:
    """Correlation of two columns, [N, 2] -> [B]; 0 if one of them is constant."""
    return _correlation(*np.moveaxis(columns[rows_BN], 2, 0))


def spearman(columns: Columns, rows_BN: Rows) -> Columns:
    """Correlation of the ranks of two columns, [N, 2] -> [B]; 0 if one of them is constant."""
    from scipy.stats import rankdata

    first_BN, second_BN = np.moveaxis(columns[rows_BN], 2, 0)
    return _correlation(rankdata(first_BN, axis=1), rankdata(second_BN, axis=1))


def _correlation(first_BN: Columns, second_BN: Columns) -> Columns:
    from scipy.stats import pearsonr

    result_B = np.zeros(len(first_BN))
    varied_B = ~(is_constant(first_BN) | is_constant(second_BN))
    if first_BN.shape[1] > 1 and varied_B.any():
        correlation: Any = pearsonr(first_BN[varied_B], second_BN[varied_B], axis=1)
        result_B[varied_B] = correlation.statistic
    return result_B


def is_constant(values_BN: Columns) -> npt.NDArray[np.bool_]:
    """Return for each line whether it varies by no more than rounding errors."""
    return np.asarray(np.ptp(values_BN, axis=-1) <= 1e-12 * np.abs(values_BN).max(-1))
