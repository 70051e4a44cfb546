"""How much each expert with a name is used on each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel

from rotmole.data.examples import Example
from rotmole.evaluation.scoring import evaluating, log_likelihoods, scored_answers
from rotmole.recording.record import record_routing
from rotmole.recording.usage import named_shares

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
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    names: list[str] = getattr(config, "expert_names", None) or []
    if not names:
        return {}
    with record_routing(model, rotation=False) as log, evaluating(model):
        for task, rows in examples.items():
            texts = scored_answers(rows[:ROWS], tokenizer, longest=max_length)
            with log.of(task):
                log_likelihoods(model, texts, batch_size=batch_size, apart=True)
    return {task: named_shares(log, names, task) for task in examples}
