"""From the run file's data section to examples by task: sources, splits, limits, templates."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rotmole.config.schema import DataSection, Split, TaskSection
from rotmole.data.examples import Example
from rotmole.data.formats import render
from rotmole.data.locale import locale_problems, locale_rows, missing_libraries
from rotmole.data.sources import Row, check_columns, read_file, read_hub
from rotmole.errors import ConfigError, did_you_mean

FILE_SOURCES = ("jsonl", "csv", "parquet")


def load_examples(
    data: DataSection,
    split: Split,
    *,
    seed: int,
    tokenizer: Any = None,
    date: str | None = None,
) -> dict[str, list[Example]]:
    """Return the examples of one split by task.

    A task without that split is left out, so the result may be empty.

    Args:
        seed: of the choice under a limit; which rows `validation_fraction` takes does not depend
            on it.
        tokenizer: the model's tokenizer; only tasks with format messages need it.
        date: ISO date that a chat template sees as today's; None is today's.

    Returns:
        Task name -> rows, in the run file's order.

    Raises:
        ConfigError: the section has problems; lists all of them.
        DataError: a file or row is wrong; names file and row.
    """
    problems = data_problems(data)
    if problems:
        raise ConfigError(problems)
    examples = {}
    for name, task in data.tasks.items():
        rows = task_rows(data, name, split, seed=seed)
        if rows is None:
            continue
        by_language = task.source == "locale" and task.group_column is None
        grouped = task.model_copy(update={"group_column": "language"}) if by_language else task
        examples[name] = render(name, grouped, rows, tokenizer, date=date)
    return examples


def task_rows(data: DataSection, name: str, split: Split, *, seed: int) -> list[Row] | None:
    """Return the rows of one task and split, within its limit; None if the split is missing."""
    task = data.tasks[name]
    if task.source == "locale":
        return locale_rows(task, split, seed=seed)
    rows = _source_rows(data, task, split)
    limit = task.limit.get(split)
    if rows is None or limit is None:
        return rows
    groups = [""] * len(rows)
    if task.group_column:
        check_columns(rows, [task.group_column])
        groups = [str(row.columns[task.group_column]) for row in rows]
    return [rows[i] for i in within_limit(groups, limit, seed=f"{seed}|{name}|{split}|")]


def within_limit(groups: Sequence[str], limit: int | None, *, seed: str) -> list[int]:
    """Return the indices of at most `limit` rows of each group: a seeded choice, ascending.

    Args:
        groups: the group of each row.
        limit: the maximum number of rows of a group; None takes all rows.
        seed: of the choice; the group's name is appended to it.
    """
    places: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        places.setdefault(group, []).append(index)
    chosen: set[int] = set()
    for group, indices in places.items():
        count = len(indices) if limit is None else min(limit, len(indices))
        chosen.update(random.Random(seed + group).sample(indices, count))
    return sorted(chosen)


def _source_rows(data: DataSection, task: TaskSection, split: Split) -> list[Row] | None:
    """Read the rows of a split; `validation_fraction` divides the train split into two."""
    if not task.validation_fraction or split == "test":
        return _read(data, task, split)
    train = _read(data, task, "train")
    if train is None:
        return None
    wanted = split == "validation"
    return [row for row in train if is_validation(row, task.validation_fraction) == wanted]


def is_validation(row: Row, fraction: float) -> bool:
    """Return whether `validation_fraction` moves a row of the train split to validation.

    The hash of the row's content decides, so equal rows always go to the same split.
    """
    content = {name: value for name, value in row.columns.items() if name != "id"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _read(data: DataSection, task: TaskSection, split: Split) -> list[Row] | None:
    if task.source == "hub":
        rows = read_hub(str(task.dataset), task.dataset_config, task.splits.get(split, split))
        if rows is None and split in task.splits:
            raise ConfigError(
                f"data set '{task.dataset}' has no split '{task.splits[split]}' (splits.{split})"
            )
        return rows
    if split not in task.files:
        return None
    return [
        row
        for file in file_names(task, split)
        for row in read_file(resolve(data, file), task.source)
    ]


def file_names(task: TaskSection, split: Split) -> list[str]:
    """Return the files of a split as a list, also if the run file names a single one."""
    files = task.files.get(split, [])
    return [files] if isinstance(files, str) else list(files)


def resolve(data: DataSection, file: str) -> Path:
    """Return the path of a file: relative to `data.root`, with ~ as the home folder."""
    return Path(data.root).expanduser() / Path(file).expanduser()


def data_problems(data: DataSection) -> list[str]:
    """Return everything that is wrong with the data section, one sentence each.

    No row is read: settings are compared, and files and libraries are only looked for.
    """
    problems = []
    for name, task in data.tasks.items():
        task_problems = _source_problems(data, task) + _format_problems(task)
        problems += [f"data.tasks.{name}: {problem}" for problem in task_problems]
    return problems


def _source_problems(data: DataSection, task: TaskSection) -> list[str]:
    problems = []
    if task.source == "locale":
        problems += locale_problems(task.kind, task.languages) or missing_libraries(task.kind)
        if task.files:
            problems.append("files have no effect with source locale; remove them")
    elif task.kind is not None or task.languages is not None:
        problems.append(
            f"kind and languages have an effect with source locale only, but the source is "
            f"{task.source}; remove them"
        )
    if task.source == "hub" and not task.dataset:
        problems.append("source hub needs `dataset`, the id of the data set")
    if task.source in FILE_SOURCES:
        problems += _file_problems(data, task)
    if task.validation_fraction and (task.source == "locale" or "validation" in task.files):
        problems.append(
            "validation_fraction takes rows from the train split, but there is a validation split "
            "already; remove one of the two"
        )
    problems += [
        f"limit.{split} is {limit}, it must be at least 1"
        for split, limit in task.limit.items()
        if limit < 1
    ]
    return problems


def _file_problems(data: DataSection, task: TaskSection) -> list[str]:
    if not task.files:
        return [f"source {task.source} needs `files`, such as files: {{train: train.jsonl}}"]
    problems = []
    for split in task.files:
        names = file_names(task, split)
        if not names:
            problems.append(f"files.{split} is empty; name at least one file or remove it")
        for file in names:
            path = resolve(data, file)
            if not path.is_file():
                names_there = (
                    [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
                )
                hint = did_you_mean(path.name, names_there)
                problems.append(
                    f"files.{split}: there is no file {path} (data.root is {data.root}; in a run "
                    f"file it is relative to the file){hint}"
                )
    return problems


def _format_problems(task: TaskSection) -> list[str]:
    problems = []
    if task.loss_on == "last" and task.format != "messages":
        problems.append(
            f"loss_on: last has an effect with format messages only, but the format is "
            f"{task.format}; write completion"
        )
    if task.format == "classification":
        labels = task.labels or []
        if len(labels) < 2:
            problems.append(
                "format classification needs `labels`: at least two words, in the order of their "
                "index"
            )
    elif task.labels is not None and task.format != "regression":
        problems.append(f"labels have no effect with format {task.format}; remove them")
    if task.labels and len(set(task.labels)) < len(task.labels):
        problems.append(f"labels are {', '.join(task.labels)}; each must be named once")
    if task.format == "regression" and task.labels is not None and len(task.labels) < 2:
        problems.append(
            "labels of format regression are the words for 0, 1, ...; name at least two"
        )
    return problems
