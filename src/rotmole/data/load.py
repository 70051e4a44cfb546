"""From the run file's data section to examples by task: sources, splits, limits, templates."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rotmole.config.schema import SPLITS, DataSection, Split, TaskSection
from rotmole.data.examples import Example
from rotmole.data.formats import render
from rotmole.data.labels import numbered
from rotmole.data.locale import locale_problems, locale_rows, missing_libraries
from rotmole.data.paths import FILE_SOURCES, contents, file_type, task_files
from rotmole.data.readers import rows_of
from rotmole.data.sources import Row, column_faults, read_hub, together
from rotmole.errors import ConfigError, DataError


def load_examples(
    data: DataSection,
    split: Split,
    *,
    seed: int,
    tokenizer: Any = None,
    date: str | None = None,
) -> dict[str, list[Example]]:
    """Return the examples of one split by task, as `load_splits` does for several."""
    return load_splits(data, [split], seed=seed, tokenizer=tokenizer, date=date)[split]


def load_splits(
    data: DataSection,
    splits: Sequence[Split] = SPLITS,
    *,
    seed: int,
    tokenizer: Any = None,
    date: str | None = None,
) -> dict[Split, dict[str, list[Example]]]:
    """Return the examples of several splits by task.

    A task without a split is left out of it, so a split may be empty. Warns if
    validation_fraction takes no row.

    Args:
        seed: of the choice under a limit; which rows `validation_fraction` takes does not depend
            on it.
        tokenizer: the model's tokenizer; only tasks with format messages need it.
        date: ISO date that a chat template sees as today's; None is today's.

    Returns:
        Split -> task name -> rows, in the run file's order.

    Raises:
        ConfigError: the section has problems; lists all of them.
        DataError: files or rows are wrong; names all of them.
    """
    problems = data_problems(data)
    if problems:
        raise ConfigError(problems)
    loader = _Loader(data, seed)
    examples: dict[Split, dict[str, list[Example]]] = {split: {} for split in splits}
    for split in splits:
        for name, task in data.tasks.items():
            try:
                rows = loader.rows(name, split)
                if rows is not None:
                    shown = _shown(task, rows)
                    examples[split][name] = render(name, shown, rows, tokenizer, date=date)
            except DataError as error:
                loader.faults.append(error)
    if loader.faults:
        raise together(loader.faults)
    return examples


def _shown(task: TaskSection, rows: Sequence[Row]) -> TaskSection:
    """Return the task with the columns that its source has by convention."""
    if task.source == "locale" and task.group_column is None:
        return task.model_copy(update={"group_column": "language"})
    columns = rows[0].columns if rows else {}
    share_gpt = task.messages_column == "messages" and "messages" not in columns
    if task.format == "messages" and share_gpt and "conversations" in columns:
        return task.model_copy(update={"messages_column": "conversations"})
    return task


class _Loader:
    """Reads the rows of tasks, each file once, and collects the faults of files and rows."""

    def __init__(self, data: DataSection, seed: int) -> None:
        self.data, self.seed = data, seed
        self.faults: list[DataError] = []
        self._read: dict[tuple[Path, str, str | None], list[Row]] = {}

    def rows(self, name: str, split: Split) -> list[Row] | None:
        """Return the rows of one task and split within its limit; None without that split."""
        task = self.data.tasks[name]
        if task.source == "locale":
            return locale_rows(task, split, seed=self.seed)
        rows = self._split(name, task, split)
        limit = task.limit.get(split)
        if rows is None or limit is None:
            return rows
        groups = [""] * len(rows)
        if task.group_column:
            wrong = column_faults(rows, [task.group_column])
            if wrong:
                raise together(list(wrong.values()))
            groups = [str(row.columns[task.group_column]) for row in rows]
        chosen = within_limit(groups, limit, seed=f"{self.seed}|{name}|{split}|")
        return [rows[index] for index in chosen]

    def _split(self, name: str, task: TaskSection, split: Split) -> list[Row] | None:
        """Return all rows of a split; `validation_fraction` divides the train split into two."""
        fraction = task.validation_fraction
        if not fraction or split == "test":
            return self._source(task, split)
        train = self._source(task, "train")
        if train is None:
            return None
        rows = [row for row in train if is_validation(row, fraction) == (split == "validation")]
        if train and not rows and not self.faults:
            none = f"data.tasks.{name}: validation_fraction {fraction:g} of {len(train)} rows"
            if split == "train":
                raise DataError(f"{none} leaves no row to train on; lower it", source=name)
            warnings.warn(
                f"{none} is no row (each row's hash decides): there is no validation; raise it, "
                "or name a file of the validation split.",
                stacklevel=5,
            )
        return rows

    def _source(self, task: TaskSection, split: Split) -> list[Row] | None:
        if task.source == "hub":
            rows = read_hub(str(task.dataset), task.dataset_config, task.splits.get(split, split))
            if rows is None and split in task.splits:
                raise ConfigError(
                    f"data set '{task.dataset}' has no split '{task.splits[split]}' "
                    f"(splits.{split})"
                )
            return rows
        files, _ = task_files(self.data, task)
        if split not in files:
            return None
        return [row for path in files[split] for row in self._file(path, task)]

    def _file(self, path: Path, task: TaskSection) -> list[Row]:
        key = (path, task.source, task.delimiter)
        if key not in self._read:
            rows = self._read[key] = []
            try:
                for row in read_file(path, task.source, task.delimiter):
                    if isinstance(row, DataError):
                        self.faults.append(row)
                    else:
                        rows.append(row)
            except DataError as error:
                self.faults.append(error)
        return self._read[key]


def read_file(path: Path, source: str, delimiter: str | None = None) -> Iterator[Row | DataError]:
    """Yield the rows of one file, or of the files in an archive, and an error for each bad row.

    Raises:
        DataError: the file is missing, empty or no such file at all.
    """
    for name, raw, kind in contents(path, source):
        yield from rows_of(raw, name, kind, delimiter)


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


def is_validation(row: Row, fraction: float) -> bool:
    """Return whether `validation_fraction` moves a row of the train split to validation.

    The hash of the row's content decides, so equal rows always go to the same split.
    """
    content = {name: value for name, value in row.columns.items() if name != "id"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


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
    elif task.kind is not None or task.languages is not None:
        problems.append(
            f"kind and languages have an effect with source locale only, but the source is "
            f"{task.source}; remove them"
        )
    files: dict[Split, list[Path]] = {}
    if task.source in FILE_SOURCES:
        files, file_problems = _file_problems(data, task)
        problems += file_problems
        if task.dataset:
            problems.append("dataset has an effect with source hub only; set source: hub")
    else:
        if task.files:
            problems.append(f"files have no effect with source {task.source}; remove them")
        if task.delimiter:
            problems.append(f"delimiter has no effect with source {task.source}; remove it")
    if task.source == "hub" and not task.dataset:
        problems.append("source hub needs `dataset`, the id of the data set")
    if task.validation_fraction and (task.source == "locale" or "validation" in files):
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


def _file_problems(
    data: DataSection, task: TaskSection
) -> tuple[dict[Split, list[Path]], list[str]]:
    if not task.files:
        return {}, [f"source {task.source} needs `files`, such as files: {{train: train.jsonl}}"]
    files, problems = task_files(data, task)
    types = {task.source}
    if task.source == "files":
        types = {file_type(path) or "csv" for paths in files.values() for path in paths}
    if task.delimiter and types and "csv" not in types:
        problems.append("delimiter has an effect on csv files only; remove it")
    return files, problems


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
    number = numbered(task.labels or [])
    if task.format == "regression" and number:
        problems.append(
            f"labels of format regression are the words for 0, 1, ..., so '{number}' may not be "
            "the word for another number; write words, or 0, 1, ... in this order"
        )
    if task.format == "regression" and task.labels is not None and len(task.labels) < 2:
        problems.append(
            "labels of format regression are the words for 0, 1, ...; name at least two"
        )
    return problems
