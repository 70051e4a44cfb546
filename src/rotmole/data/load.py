"""From the run file's data section to examples by task: sources, splits, limits, templates."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rotmole.config.fields import did_you_mean
from rotmole.config.schema import DataSection, Split, TaskSection
from rotmole.data.examples import Example
from rotmole.data.formats import render
from rotmole.data.locale import locale_problems, locale_rows, missing_libraries
from rotmole.data.sources import Row, check_columns, read_file, read_hub
from rotmole.errors import ConfigError

FILE_SOURCES = ("jsonl", "csv", "parquet")


def load_examples(
    data: DataSection, split: Split, *, seed: int, tokenizer: Any = None
) -> dict[str, list[Example]]:
    """Return the examples of one split by task.

    A task that has no such split is left out, so the result may be empty.

    Args:
        seed: of the choice under a limit (the carving of a validation set does not depend on it).
        tokenizer: the model's tokenizer; needed by tasks with format messages only.

    Returns:
        Task name -> rows, in the run file's order.

    Raises:
        ConfigError: the section contradicts itself; holds every problem.
        DataError: a file or row is wrong; names file, row and snippet.
    """
    problems = data_problems(data)
    if problems:
        raise ConfigError(problems)
    examples = {}
    for name, task in data.tasks.items():
        rows = task_rows(data, name, split, seed=seed)
        if rows is not None:
            examples[name] = render(name, _as_read(task), rows, tokenizer)
    return examples


def task_rows(data: DataSection, name: str, split: Split, *, seed: int) -> list[Row] | None:
    """Return the rows of one task and split after carving and limits, None if it has none."""
    task = data.tasks[name]
    if task.source == "locale":
        return locale_rows(task, split, seed=seed)
    rows = _source_rows(data, task, split)
    if rows is None:
        return None
    return limited(rows, task, split, seed=f"{seed}|{name}|{split}")


def _as_read(task: TaskSection) -> TaskSection:
    """Give locale rows their group."""
    if task.source == "locale" and task.group_column is None:
        return task.model_copy(update={"group_column": "language"})
    return task


def _source_rows(data: DataSection, task: TaskSection, split: Split) -> list[Row] | None:
    if not task.validation_fraction or split == "test":
        return _read(data, task, split)
    train = _read(data, task, "train")
    if train is None:
        return None
    wanted = split == "validation"
    return [row for row in train if carved(row, task.validation_fraction) == wanted]


def carved(row: Row, fraction: float) -> bool:
    """Say whether a row goes to validation: by the hash of its content, whatever the seed.

    Equal rows always land on the same side.
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
    """Return the files of a split as a list."""
    files = task.files.get(split, [])
    return [files] if isinstance(files, str) else list(files)


def resolve(data: DataSection, file: str) -> Path:
    """Return the path of a file: relative names start from `data.root`, ~ is the home folder."""
    return Path(data.root).expanduser() / Path(file).expanduser()


def limited(rows: Sequence[Row], task: TaskSection, split: Split, *, seed: str) -> list[Row]:
    """Return at most `limit` rows of each group, a seeded choice in the order of the file."""
    limit = task.limit.get(split)
    if limit is None:
        return list(rows)
    if task.group_column:
        check_columns(list(rows), [task.group_column])
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        group = str(row.columns[task.group_column]) if task.group_column else ""
        groups.setdefault(group, []).append(index)
    kept: set[int] = set()
    for group, indices in groups.items():
        kept.update(random.Random(f"{seed}|{group}").sample(indices, min(limit, len(indices))))
    return [rows[index] for index in sorted(kept)]


def data_problems(data: DataSection) -> list[str]:
    """Return everything that is wrong with the data section, without reading any row.

    Cheap enough for `check`: it looks at settings, at whether files exist and whether the
    libraries of a source are installed.
    """
    problems = []
    for name, task in data.tasks.items():
        found = _source_problems(data, task) + _format_problems(task)
        problems += [f"data.tasks.{name}: {problem}" for problem in found]
    return problems


def _source_problems(data: DataSection, task: TaskSection) -> list[str]:
    problems = []
    if task.source == "locale":
        problems += locale_problems(task.kind, task.languages) or missing_libraries(task.kind)
        if task.files:
            problems.append("files have no effect with source locale; remove them")
    elif task.kind is not None or task.languages is not None:
        problems.append(f"kind and languages belong to source locale, the source is {task.source}")
    if task.source == "hub" and not task.dataset:
        problems.append("source hub needs `dataset`, the id of the data set")
    if task.source in FILE_SOURCES:
        problems += _file_problems(data, task)
    if task.validation_fraction and (task.source == "locale" or "validation" in task.files):
        problems.append(
            "validation_fraction carves train, but there is a validation split already; "
            "remove one of the two"
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
                near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
                hint = did_you_mean(path.name, near)
                problems.append(f"files.{split}: no file {path} (data.root is {data.root}){hint}")
    return problems


def _format_problems(task: TaskSection) -> list[str]:
    problems = []
    if task.format == "classification":
        labels = task.labels or []
        if len(labels) < 2:
            problems.append("format classification needs `labels`, at least two words by index")
    elif task.labels is not None and task.format != "regression":
        problems.append(f"labels have no effect with format {task.format}; remove them")
    if task.labels and len(set(task.labels)) < len(task.labels):
        problems.append(f"labels must differ, they are {', '.join(task.labels)}")
    if task.format == "regression" and task.labels is not None and len(task.labels) < 2:
        problems.append("labels of format regression are the words for 0, 1, ...: at least two")
    return problems
