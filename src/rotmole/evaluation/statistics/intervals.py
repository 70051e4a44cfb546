"""95 % intervals: Wilson's for shares of rows, a seeded bootstrap over rows for other metrics.

They cover the choice of test rows only, not the variation between training seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from rotmole.evaluation.statistics.resampled import Columns, Rows

Resampled = Callable[[Columns, Rows], Columns]
RESAMPLES = 1000
_BLOCK = 1 << 20  # rows drawn at a time


def wilson(hits: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the lower and upper end of Wilson's score interval of a share hits/n.

    Args:
        n: number of all rows, at least 1.
        confidence: 0 .. 1.

    Source: Wilson 1927, computed by scipy.
    """
    from scipy.stats import binomtest

    interval = binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def _resamples(n: int, resamples: int, seed: int) -> Iterator[Rows]:
    """Draw rows with replacement, in blocks [B, n] of bounded memory."""
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // max(1, n))
    for start in range(0, resamples, block):
        yield generator.integers(0, n, (min(block, resamples - start), n))


def _ends(values: list[Columns], confidence: float) -> tuple[float, float]:
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.concatenate(values), [tail, 100 - tail])
    return float(low), float(high)


def bootstrap(
    resampled: Resampled,
    columns: Columns,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the lower and upper end of a figure's percentile bootstrap interval over rows.

    Args:
        resampled: [N, k] numbers and rows [B, N] -> the figure of each resample, [B].
        columns: [N, k], one line per row of data.
        confidence: 0 .. 1.
        resamples: number of resamples.
        seed: of the resamples.

    Source: Efron 1979, percentile form.
    """
    draws = _resamples(len(columns), resamples, seed)
    return _ends([resampled(columns, rows_BN) for rows_BN in draws], confidence)


def paired_difference(
    resampled: Resampled,
    columns_first: Columns,
    columns_second: Columns,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the bootstrap interval of second minus first, for two systems on the same rows.

    Both systems are resampled with the same rows, so rows that are hard for both cancel out.

    Args:
        resampled: [N, k] numbers and rows [B, N] -> the figure of each resample, [B].
        columns_first: [N, k] of the first system.
        columns_second: [N, k] of the second system, the same rows in the same order.
        confidence: 0 .. 1.
        resamples: number of resamples.
        seed: of the resamples.

    Raises:
        ValueError: the systems have different numbers of rows.

    Source: paired percentile bootstrap.
    """
    if len(columns_first) != len(columns_second):
        raise ValueError(
            f"a paired comparison needs the same rows, but one system has {len(columns_first)} and "
            f"the other {len(columns_second)}"
        )
    differences = [
        resampled(columns_second, rows_BN) - resampled(columns_first, rows_BN)
        for rows_BN in _resamples(len(columns_first), resamples, seed)
    ]
    return _ends(differences, confidence)
