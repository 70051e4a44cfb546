"""How much each expert with a name is used on each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rotmole.data.examples import Example
from rotmole.evaluation.scoring import evaluating, log_likelihoods, scored_answers
from rotmole.tuner.shares import ExpertShares

ROWS = 32  # of each task; shares of so many rows move by a percent or two with others


def shares_by_task(
    model: Any,
    tokenizer: Any,
    examples: Mapping[str, Sequence[Example]],
    *,
    batch_size: int,
    max_length: int,
) -> dict[str, dict[str, float]]:
    """Return task -> expert -> its share of the routing weights, over prompts and answers.

    Args:
        examples: rows by task; the first 32 of each are read.

    Returns:
        {} if the experts have no names.
    """
    shares: dict[str, dict[str, float]] = {}
    watch = ExpertShares(model)
    if not watch.names:
        return shares
    with watch, evaluating(model):
        for task, rows in examples.items():
            watch.reset()
            texts = scored_answers(rows[:ROWS], tokenizer, longest=max_length)
            log_likelihoods(model, texts, batch_size=batch_size)
            shares[task] = watch.shares()
    return shares
