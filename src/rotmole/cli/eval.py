"""``rotmole eval``: figures of a run or an adapter, with and without the adapter."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rotmole.cli.screen import note, progress
from rotmole.config.schema import RunFile
from rotmole.data import Example, load_examples
from rotmole.errors import ConfigError
from rotmole.evaluation import Report, to_json
from rotmole.evaluation import evaluate as work
from rotmole.evaluation.evaluate import task_metrics
from rotmole.evaluation.render import footnotes, print_table, rows
from rotmole.evaluation.target import Target, find_target, load_target
from rotmole.files import atomic_write_text, make_folder
from rotmole.models.load import load_tokenizer
from rotmole.processes import is_main_process, joined, same_everywhere

RESULT = "evaluation.json"
_WITHOUT_EFFECT = {
    "adapter": "the adapter is evaluated as it was saved",
    "training": "nothing is trained",
    "optimizer": "nothing is trained",
}


def evaluate(
    target: Path,
    overrides: Sequence[str] = (),
    config: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    as_json: bool = False,
    *,
    trust_remote_code: bool = False,
) -> int:
    """Evaluate a target, print the table, and write evaluation.json.

    The file is written to the run folder, or to the adapter's folder if that is not in one. If a
    launcher such as torchrun starts several processes, they share the batches, and only the first
    one prints and writes.

    Args:
        config: run file for an adapter folder.
        split: train, validation or test; None means evaluation.split.
        limit: rows per task and group; None means evaluation.limit.
        as_json: print JSON instead of the table.
    """
    chosen = {"split": split, "limit": limit}
    given = [f"evaluation.{key}={value}" for key, value in chosen.items() if value is not None]
    for word in overrides:
        reason = _WITHOUT_EFFECT.get(word.partition("=")[0].strip().partition(".")[0])
        if reason:
            warnings.warn(f"{word} has no effect on eval, because {reason}.", stacklevel=2)
    place = find_target(target, overrides=[*overrides, *given], config=config)
    run = place.run
    if run is None:
        raise ConfigError(
            f"{target} is not in a run folder, so there is no data to evaluate it on; add "
            "--config RUN.yaml."
        )
    examples, shown = _examples(run, place.date, trust_remote_code)
    metrics = {name: task.metrics for name, task in run.data.tasks.items()}
    task_metrics(examples, metrics)  # raises before the model is loaded, which takes long
    is_main = is_main_process()
    say = note if is_main else lambda text: None
    loaded = load_target(place, say=say, trust_remote_code=trust_remote_code)

    with joined() as spread, progress() if is_main else nullcontext() as show:
        same_everywhere("model.dtype", loaded.model.dtype)
        report = work(
            loaded.model, loaded.tokenizer, examples, run.evaluation,
            metrics_by_task=metrics, demonstrations=shown,
            progress=show, seed=run.seed, spread=spread,
        )  # fmt: skip
    if is_main:
        _deliver(report, _origin(place, loaded.name, loaded.note), place.folder, as_json=as_json)
    return 0


def _examples(
    run: RunFile, date: str, trust_remote_code: bool
) -> tuple[dict[str, list[Example]], dict[str, list[Example]]]:
    """Return the rows to evaluate, and the training rows for examples in prompts."""
    tokenizer = None
    if any(task.format == "messages" for task in run.data.tasks.values()):
        # its chat template renders the rows
        tokenizer = load_tokenizer(run.model, trust_remote_code=trust_remote_code)
    split = run.evaluation.split
    examples = load_examples(run.data, split, seed=run.seed, tokenizer=tokenizer, date=date)
    left_out = [name for name in run.data.tasks if not examples.get(name)]
    if len(left_out) == len(run.data.tasks):
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
    chats = [name for name in examples if run.data.tasks[name].format == "messages"]
    if chats:
        raise ConfigError(
            f"evaluation.examples_in_prompt is {run.evaluation.examples_in_prompt}, but examples "
            f"cannot be put before a chat ({', '.join(chats)}); set it to 0, or write them into "
            "the chats as earlier turns."
        )
    return examples, load_examples(run.data, "train", seed=run.seed, tokenizer=tokenizer, date=date)


def _origin(target: Target, name: str, note: str | None) -> dict[str, Any]:
    packages = ("rotmole", "torch", "transformers", "peft")
    return {
        "model": name,
        "note": note,
        "adapter": str(target.adapter) if target.adapter else None,
        "versions": {package: version(package) for package in packages},
    }


def _deliver(report: Report, origin: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    """Write evaluation.json; print it, or the table."""
    result = {**origin, **to_json(report)}
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    file = atomic_write_text(make_folder(folder) / RESULT, text)
    if as_json:
        sys.stdout.write(text)
        return
    print_table(rows(report))
    model_note = [f"model: {origin['note']}"] if origin["note"] else []
    for line in [*footnotes(report), *model_note, f"written: {file}"]:
        print(line)
