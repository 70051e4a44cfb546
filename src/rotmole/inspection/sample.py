"""The tokens that an inspection looks at: a few rows of each task, as they are learnt."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rotmole.config.load import sft_arguments
from rotmole.config.schema import RunFile
from rotmole.data import Example, encode_all
from rotmole.data.encode import Row, equal_length_batches
from rotmole.errors import ConfigError
from rotmole.models.logits import accepts_logits_to_keep
from rotmole.tuner.layer import RotMoleLayer

LIMIT = 4000
"""Tokens, of the rows that are looked at, and again of those that a static map is fitted on."""
BATCH = 16
UNLIMITED = 1 << 30
TEXT = "text"
"""Name of the task of a text without a run file."""

Rows = dict[str, list[Row]]
Tasks = Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class Sample:
    """Rows by task, or by task and group: "units/de".

    Attributes:
        calibration: to fit a static map on.
        held_out: other rows, which all else is measured on.
        words: where they come from, as "validation rows".
    """

    calibration: Rows
    held_out: Rows
    words: str


def sample_of(
    run: RunFile, splits: Mapping[Any, Tasks], tokenizer: Any, limit: int = LIMIT
) -> Sample:
    """Return rows of a run: training rows to fit on, validation or else test rows to look at.

    Args:
        run: whose seed and lengths hold.
        splits: its rows by split and task, from rotmole.data.load_splits.
        tokenizer: of the model.
        limit: tokens of each of both; each task and group gets an equal share, at least one row.

    Raises:
        ConfigError: no task has rows.
    """
    longest = sft_arguments(run)["max_length"] or UNLIMITED

    def some(split: str) -> Rows:
        cells = _cells(splits.get(split, {}))
        return _within(cells, tokenizer, limit, longest, f"{run.seed}/{split}")

    train = some("train")
    for split in ("validation", "test"):
        held_out = some(split)
        if held_out:
            return Sample(train, held_out, f"{split} rows")
    if not train:
        raise ConfigError("no task has rows, so there is nothing to look at; add --text or --file.")
    warnings.warn(
        "no task has validation or test rows, so half of the training rows are looked at, which "
        "the adapter has learnt",
        stacklevel=2,
    )
    return halves(train, "training rows")


def sample_of_text(text: str, tokenizer: Any, limit: int = LIMIT, *, longest: int = 256) -> Sample:
    """Return the passages of a text, between blank lines: every second one to fit a static map on.

    Args:
        text: one passage is looked at and nothing is fitted.
        tokenizer: of the model.
        limit: tokens of each of both.
        longest: a longer passage is read in pieces.

    Raises:
        ConfigError: the text has fewer than two tokens.
    """
    pieces: list[Row] = []
    for passage in text.split("\n\n"):
        if passage.strip():
            ids = list(tokenizer(passage.strip("\n"))["input_ids"])
            pieces += [{"input_ids": ids[i : i + longest]} for i in range(0, len(ids), longest)]
    pieces = _cut([row for row in pieces if len(row["input_ids"]) > 1], 2 * limit)
    if not pieces:
        raise ConfigError("the text has no two tokens, so there is nothing to look at.")
    return halves({TEXT: pieces}, "the text")


def halves(rows: Rows, words: str) -> Sample:
    """Return a sample of which every second row of a task is fitted on."""
    fitted = {task: each[1::2] for task, each in rows.items() if len(each) > 1}
    return Sample(fitted, {task: each[::2] for task, each in rows.items()}, words)


def _cells(tasks: Tasks) -> dict[str, list[Example]]:
    cells: dict[str, list[Example]] = {}
    for task, rows in tasks.items():
        for row in rows:
            cells.setdefault(f"{task}/{row.group}" if row.group else task, []).append(row)
    return cells


def _within(cells: Tasks, tokenizer: Any, limit: int, longest: int, seed: str) -> Rows:
    """Return rows of each cell, in a seeded order, until its share of the tokens is reached."""
    rows: Rows = {}
    for cell, examples in cells.items():
        budget = limit // len(cells)
        order = random.Random(f"{seed}/{cell}").sample(range(len(examples)), len(examples))
        encoded: list[Row] = []
        for start in range(0, len(order), BATCH):
            some = [examples[i] for i in order[start : start + BATCH]]
            encoded += encode_all(some, tokenizer, max_length=longest)
            if sum(len(row["input_ids"]) for row in encoded) >= budget:
                break
        rows[cell] = _cut(encoded, budget)
    return rows


def _cut(rows: Sequence[Row], limit: int) -> list[Row]:
    """Return the first rows that have `limit` tokens together, at least one."""
    kept: list[Row] = []
    tokens = 0
    for row in rows:
        if kept and tokens >= limit:
            break
        kept.append({name: row[name] for name in ("input_ids", "labels") if name in row})
        tokens += len(row["input_ids"])
    return kept


def tokens_of(rows: Mapping[str, Sequence[Row]]) -> dict[str, int]:
    """Return the number of tokens of each task."""
    return {task: sum(len(row["input_ids"]) for row in each) for task, each in rows.items()}


def batches(rows: Sequence[Row], model: Any) -> list[dict[str, Any]]:
    """Return rows as arguments of a model, without padding, without logits that nobody reads."""
    device = next(model.parameters()).device
    arguments: dict[str, Any] = {"use_cache": False}
    head = model.get_base_model().get_output_embeddings()
    if accepts_logits_to_keep(model) and not isinstance(head, RotMoleLayer):
        arguments["logits_to_keep"] = 1
    return [
        {name: value.to(device) for name, value in batch.items()} | arguments
        for batch, _ in equal_length_batches(rows, BATCH)
    ]
