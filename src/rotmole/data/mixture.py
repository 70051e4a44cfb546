"""The mixture of tasks: shares, one epoch's order, and the fingerprint of what was used."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rotmole.config.schema import DataSection
from rotmole.data.examples import Example

Examples = dict[str, list[Example]]


def shares(examples: Mapping[str, Sequence[Example]], data: DataSection) -> dict[str, int]:
    """Return how many rows each task gives to one epoch.

        share_t ~ weight_t * rows_t^(1/temperature)       (weight 1 where none is given)

    Without a temperature but with weights, share_t ~ weight_t: sizes do not count. Without
    either, each row is used once. The epoch is as long as all rows together.

    Args:
        data: holds the weights and the temperature.

    Returns:
        Rows by task; they add up to the number of all rows.

    Source: temperature as in multilingual pre-training (arXiv 1907.05019); weights our choice.
    """
    sizes = {task: len(rows) for task, rows in examples.items() if rows}
    weights = {task: data.tasks[task].weight for task in sizes}
    if data.temperature is None and not any(weights.values()):
        return sizes
    power = 0.0 if data.temperature is None else 1.0 / data.temperature
    parts = {task: (weights[task] or 1.0) * size**power for task, size in sizes.items()}
    total, whole = sum(sizes.values()), sum(parts.values())
    exact = {task: total * part / whole for task, part in parts.items()}
    counts = {task: int(value) for task, value in exact.items()}
    # largest remainders, so that the counts add up to the total
    by_remainder = sorted(exact, key=lambda task: (counts[task] - exact[task], task))
    for task in by_remainder[: total - sum(counts.values())]:
        counts[task] += 1
    return counts


def mix(examples: Examples, data: DataSection, *, seed: int) -> list[Example]:
    """Return one epoch: every task's share of rows, shuffled.

    Within it a row comes again only after all rows of its task have come; the remainder of a share
    is a seeded choice without repetition, and the same in every epoch: where a task's share is
    smaller than the task, its other rows are not trained on.

    Args:
        data: holds the weights and the temperature.
        seed: of the choice and the order.
    """
    order: list[Example] = []
    for task, count in shares(examples, data).items():
        rows = examples[task]
        whole, rest = divmod(count, len(rows))
        order += rows * whole
        order += random.Random(f"mix:{seed}:{task}").sample(rows, rest)
    random.Random(f"mix:{seed}").shuffle(order)
    return order


def fingerprint(examples: Mapping[str, Sequence[Example]]) -> str:
    """Return the sha256 of what the examples hold, independent of where the files lie."""
    digest = hashlib.sha256()
    for task in sorted(examples):
        for example in examples[task]:
            content = asdict(example)
            del content["origin"]
            digest.update(json.dumps(content, sort_keys=True).encode())
            digest.update(b"\n")
    return digest.hexdigest()


def data_fingerprint(data: DataSection, examples: Mapping[str, Examples]) -> dict[str, Any]:
    """Return what identifies the data of a run.

    Args:
        data: the section of the run file; with source locale the versions of Babel and num2words
            belong to the fingerprint, because their tables are the data.
        examples: split -> task -> rows, as used.

    Returns:
        {"sha256": ..., "splits": {split: {task: {"rows": n, "sha256": ...}}}, "versions": {...}}.
    """
    splits = {
        split: {
            task: {"rows": len(rows), "sha256": fingerprint({task: rows})}
            for task, rows in tasks.items()
        }
        for split, tasks in examples.items()
    }
    versions: dict[str, str] = {}
    if any(task.source == "locale" for task in data.tasks.values()):
        from rotmole.data.locale import library_versions

        versions = library_versions()
    content = {"splits": splits, "versions": versions}
    whole = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {"sha256": whole, **content}
