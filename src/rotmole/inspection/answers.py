"""What answers cost with parts of the adapter switched off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rotmole.data.encode import IGNORED, Row
from rotmole.evaluation.scoring import Scored, log_likelihoods
from rotmole.inspection.inspection import ALL, Answers
from rotmole.inspection.probe import EVEN, NO_ROTATION, Found, changed
from rotmole.inspection.sample import BATCH

Say = Callable[[str], None]


def answers_of(
    model: Any,
    adapter: str,
    layers: Mapping[str, Found],
    rows: Mapping[str, Sequence[Row]],
    tick: Callable[[], None] | None = None,
) -> dict[str, Answers]:
    """Return the mean negative log-likelihood of the learnt tokens, by task and over all.

    Args:
        model: with the adapter, which is active.
        adapter: its name.
        layers: all of the adapter.
        rows: by task; without labels every token but the first counts.
        tick: called after each of `systems`.
    """
    texts = {task: [_scored(row) for row in each] for task, each in rows.items()}
    flat = [text for each in texts.values() for text in each]
    sums: dict[str, list[float] | None] = {}
    for name, block in systems(model, adapter, layers).items():
        sums[name] = None
        if block is not None:
            with block:
                sums[name] = log_likelihoods(model, flat, batch_size=BATCH)
            if tick is not None:
                tick()
    result: dict[str, Answers] = {}
    bounds = {ALL: (0, len(flat))}
    start = 0
    for task, each in texts.items():
        bounds[task] = (start, start + len(each))
        start += len(each)
    for task, (first, last) in bounds.items():
        tokens = sum(len(text.positions) for text in flat[first:last])
        if not tokens or (task != ALL and len(texts) == 1):
            continue
        means = {
            name: None if values is None else -sum(values[first:last]) / tokens
            for name, values in sums.items()
        }
        trained, base = means["trained"], means["base"]
        assert trained is not None
        assert base is not None
        result[task] = Answers(trained, means["rotation_off"], means["uniform"], base, tokens)
    return result


def systems(
    model: Any, adapter: str, layers: Mapping[str, Found]
) -> dict[str, AbstractContextManager[Any] | None]:
    """Return under which block the model computes without a part; None where that is nothing.

    Equal weights are not for adapters with block-routed blocks.
    """
    known = list(layers.values())
    turns, blocks = any(x.rotates for x in known), any(x.is_block for x in known)
    weighs = any(x.weighs for x in known) and not blocks
    return {
        "trained": nullcontext(),
        "rotation_off": changed(layers, adapter, NO_ROTATION) if turns else None,
        "uniform": changed(layers, adapter, EVEN) if weighs else None,
        "base": model.disable_adapter(),
    }


def _scored(row: Row) -> Scored:
    ids = row["input_ids"]
    labels = row.get("labels", ids)
    return Scored(tuple(ids), tuple(p for p, label in enumerate(labels) if p and label != IGNORED))
