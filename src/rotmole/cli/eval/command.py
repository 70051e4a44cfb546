"""``rotmole eval``: figures of a run or an adapter, with and without the adapter."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rotmole.cli.screen import note, progress
from rotmole.config.schema import DataSection, RunFile, TaskSection
from rotmole.config.training import longest_row
from rotmole.data import Example, load_examples
from rotmole.errors import ConfigError, StorageError, did_you_mean
from rotmole.evaluation import Report
from rotmole.evaluation import evaluate as work
from rotmole.evaluation.evaluate import task_metrics
from rotmole.evaluation.files import (
    PREDICTIONS,
    RESULT,
    as_text,
    is_chosen_here,
    origin,
    write_files,
)
from rotmole.evaluation.render import footnotes, print_lines, print_table, rows
from rotmole.evaluation.shares import ROWS, shares_by_task
from rotmole.evaluation.target import Target, find_target, load_target
from rotmole.files import check_writable
from rotmole.models.load import load_tokenizer
from rotmole.processes import is_main_process, joined, same_everywhere

_WITHOUT_EFFECT = {
    "adapter": "the adapter is evaluated as it was saved",
    "training": "nothing is trained",
    "optimizer": "nothing is trained",
}
_WITH_EFFECT = ("training.max_length",)  # the length at which rows are refused or cut


def evaluate(
    target: Path,
    overrides: Sequence[str] = (),
    config: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    as_json: bool = False,
    *,
    tasks: Sequence[str] = (),
    output: Path | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Evaluate a target, print the table, and write eval.json and predictions.jsonl.

    If the files cannot be written, that is said before anything is scored, and the table is
    printed all the same. If a launcher such as torchrun starts several processes, they share the
    batches, and only the first one prints and writes.

    Args:
        config: run file for an adapter folder.
        split: train, validation or test; None means evaluation.split.
        limit: rows per task and group; None means evaluation.limit.
        as_json: print JSON instead of the table.
        tasks: names of the tasks to score; none means all.
        output: folder of the files; None means the run folder, or the adapter's folder if that is
            not in one.

    Raises:
        StorageError: the files cannot be written; the table was printed.
    """
    tell_without_effect(overrides)
    place = with_data(target, [*overrides, *section_words(split, limit)], config)
    run = place.run
    assert run is not None  # with_data
    data = run.data.model_copy(update={"tasks": chosen_tasks(run.data, tasks)})
    folder = (place.folder if output is None else output).expanduser()
    is_main = is_main_process()
    say = note if is_main else lambda text: None
    if is_main:
        _say_if_unwritable(folder)
    say(f"loading data (split {run.evaluation.split})")
    examples, shown = load_rows(run, data, place.date, trust_remote_code)
    metrics = {name: task.metrics for name, task in data.tasks.items()}
    task_metrics(examples, metrics)  # raises before the model is loaded, which takes long
    loaded = load_target(place, say=say, trust_remote_code=trust_remote_code)

    with joined() as spread, progress() if is_main else nullcontext() as show:
        same_everywhere("model.dtype", loaded.model.dtype)
        report = work(
            loaded.model, loaded.tokenizer, examples, run.evaluation,
            metrics_by_task=metrics, demonstrations=shown,
            progress=show, seed=run.seed, max_length=longest_row(run),
            spread=spread,
        )  # fmt: skip
    if is_main:
        shares = shares_by_task(
            loaded.model, loaded.tokenizer, examples,
            batch_size=run.evaluation.batch_size, max_length=longest_row(run),
        )  # fmt: skip
        facts = origin(run, place.adapter, loaded.name, loaded.note) | {"expert_shares": shares}
        _deliver(report, facts, folder, _split_advice(place, data), as_json=as_json)
    return 0


def tell_without_effect(overrides: Sequence[str]) -> None:
    """Warn of settings that cannot change what an evaluation finds."""
    for word in overrides:
        key = word.partition("=")[0].strip()
        reason = _WITHOUT_EFFECT.get(key.partition(".")[0])
        if reason and key not in _WITH_EFFECT:
            warnings.warn(f"{word} has no effect on eval, because {reason}.", stacklevel=3)


def section_words(split: str | None, limit: int | None) -> list[str]:
    """Return the options as key=value of the evaluation section."""
    chosen = {"split": split, "limit": limit}
    return [f"evaluation.{key}={value}" for key, value in chosen.items() if value is not None]


def with_data(target: Path, overrides: Sequence[str], config: Path | None) -> Target:
    """Find a target that has a run file, and so data.

    Raises:
        ConfigError: it has none.
    """
    place = find_target(target, overrides=overrides, config=config)
    if place.run is None:
        raise ConfigError(
            f"{target} is not in a run folder, so there is no data to evaluate it on; add "
            "--config RUN.yaml."
        )
    return place


def chosen_tasks(data: DataSection, names: Sequence[str]) -> dict[str, TaskSection]:
    """Return the tasks of these names, all if there is no name.

    Raises:
        ConfigError: there is no task of such a name.
    """
    known = f"; the tasks are {', '.join(data.tasks)}"
    unknown = [
        f"--task {name}: there is no such task{did_you_mean(name, data.tasks) or known}"
        for name in names
        if name not in data.tasks
    ]
    if unknown:
        raise ConfigError(unknown)
    return {name: task for name, task in data.tasks.items() if not names or name in names}


def _say_if_unwritable(folder: Path) -> None:
    try:
        check_writable(folder, RESULT, PREDICTIONS)
    except StorageError as error:
        note(f"{error} The figures will be printed only; --output DIR writes them elsewhere.")


def load_rows(
    run: RunFile, data: DataSection, date: str, trust_remote_code: bool
) -> tuple[dict[str, list[Example]], dict[str, list[Example]]]:
    """Return the rows to evaluate, and the training rows for examples in prompts."""
    tokenizer = None
    if any(task.format == "messages" for task in data.tasks.values()):
        # its chat template renders the rows
        tokenizer = load_tokenizer(run.model, trust_remote_code=trust_remote_code)
    split = run.evaluation.split
    examples = load_examples(data, split, seed=run.seed, tokenizer=tokenizer, date=date)
    left_out = [name for name in data.tasks if not examples.get(name)]
    if len(left_out) == len(data.tasks):
        raise ConfigError(
            f"no task has rows in split {split!r}; choose another one with --split, or give the "
            "tasks files for it."
        )
    if left_out:
        warnings.warn(
            f"tasks without rows in split {split!r} are left out: {', '.join(left_out)}",
            stacklevel=2,
        )
    examples = {name: rows for name, rows in examples.items() if rows}
    if not run.evaluation.examples_in_prompt:
        return examples, {}
    return examples, load_examples(data, "train", seed=run.seed, tokenizer=tokenizer, date=date)


def _split_advice(target: Target, data: DataSection) -> list[str]:
    if not is_chosen_here(target.run, target.adapter):
        return []
    tested = [
        name
        for name, task in data.tasks.items()
        if task.source == "locale" or "test" in task.files or "test" in task.splits
    ]
    advice = "--split test scores others" if tested else "a test split would not be"
    return [
        "validation rows chose this checkpoint in training, so their figures are a little too "
        f"good; {advice}."
    ]


def _used(shares: dict[str, dict[str, float]]) -> list[str]:
    """Say how much each expert with a name is used on each task."""
    if not shares:
        return []
    lines = [f"weights of the experts, the mean of layers and tokens, {ROWS} rows of each task:"]
    for task, named in shares.items():
        words = ", ".join(f"{name} {100 * share:.0f} %" for name, share in named.items())
        lines.append(f"  {task}: {words}")
    return lines


def _deliver(
    report: Report, facts: dict[str, Any], folder: Path, advice: list[str], *, as_json: bool
) -> None:
    """Print the table, or JSON; then write the files."""
    if as_json:
        sys.stdout.write(as_text(report, facts))
        sys.stdout.flush()
    else:
        print_table(rows(report))
        model_note = [f"model: {facts['note']}"] if facts["note"] else []
        print_lines([*footnotes(report), *_used(facts["expert_shares"]), *advice, *model_note])
    files = write_files(report, facts, folder)
    if not as_json:
        print(f"written: {', '.join(map(str, files))}")
