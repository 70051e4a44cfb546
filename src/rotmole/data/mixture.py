"""The mixture of tasks: shares, the order of one epoch, and the fingerprint of the data."""

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

        share_t ~ weight_t * rows_t^(1/temperature)       (weight_t is 1 if it is not given)

    With weights but without a temperature, share_t ~ weight_t, whatever the number of rows.
    Without both, each row is used once. The shares add up to the number of all rows.

    Args:
        data: its weights and temperature are used.

    Source: temperature as in multilingual pre-training (arXiv 1907.05019).
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
    # rounding down leaves a few rows; they go to the largest remainders
    by_remainder = sorted(exact, key=lambda task: (counts[task] - exact[task], task))
    for task in by_remainder[: total - sum(counts.values())]:
        counts[task] += 1
    return counts


def mix(examples: Examples, data: DataSection, *, seed: int) -> list[Example]:
    """Return the rows of one epoch: every task's share, shuffled.

    A share of k rows from a task of n rows uses each row k // n times, and a seeded choice of
    k % n rows once more. The choice is the same in every epoch, so if a share is smaller than its
    task, the other rows are never trained on.

    Args:
        data: its weights and temperature are used.
        seed: of the choice and the order.
    """
    order: list[Example] = []
    for task, count in shares(examples, data).items():
        rows = examples[task]
        repeats, remainder = divmod(count, len(rows))
        order += rows * repeats
        order += random.Random(f"mix:{seed}:{task}").sample(rows, remainder)
    random.Random(f"mix:{seed}").shuffle(order)
    return order


def fingerprint(examples: Mapping[str, Sequence[Example]]) -> str:
    """Return the sha256 of what the examples teach; the paths of their files are left out.

    Rows with the same text and the same learnt tokens are equal, also to those of 0.1.0, which
    had no ranges: one range to the end counts as the completion.
    """
    digest = hashlib.sha256()
    for task in sorted(examples):
        for example in examples[task]:
            content = asdict(example)
            del content["origin"]
            if len(example.learnt) == 1:
                start = example.learnt[0][0]
                text = example.prompt + example.completion
                content |= {"prompt": text[:start], "completion": text[start:]}
            if len(example.learnt) < 2:
                del content["learnt"]
            digest.update(json.dumps(content, sort_keys=True).encode())
            digest.update(b"\n")
    return digest.hexdigest()


def repeated(
    rows: Mapping[str, Sequence[Example]], among: Mapping[str, Sequence[Example]]
) -> dict[str, int]:
    """Count the rows that are rows of another split too, with the same prompt and answer.

    Args:
        rows: task -> those that are looked for.
        among: task -> those of the other split, of any task.

    Returns:
        Task -> how many; without tasks that have none.
    """
    known = {row.prompt + row.completion for part in among.values() for row in part}
    counts = {t: sum(row.prompt + row.completion in known for row in rows[t]) for t in rows}
    return {task: count for task, count in counts.items() if count}


def data_fingerprint(data: DataSection, examples: Mapping[str, Examples]) -> dict[str, Any]:
    """Return what identifies the data of a run.

    With source locale it includes the versions of Babel and num2words, whose tables are the data.

    Args:
        examples: split -> task -> rows, within the limits.

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
