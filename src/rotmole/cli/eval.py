"""rotmole eval: figures of a run or an adapter, before beside after."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rotmole.config.schema import RunFile
from rotmole.data import Example, load_examples
from rotmole.errors import ConfigError
from rotmole.evaluation import Report, to_json
from rotmole.evaluation import evaluate as work
from rotmole.evaluation.evaluate import Progress, task_metrics
from rotmole.evaluation.render import footnotes, plain_text, rich_table, rows
from rotmole.evaluation.target import Target, find_target, load_target
from rotmole.files import atomic_write_text, make_folder
from rotmole.models.load import load_tokenizer
from rotmole.processes import is_main_process, joined, same_everywhere

RESULT = "evaluation.json"
_IDLE = {
    "adapter": "the adapter is scored as it was saved",
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
    """Score a target, print the table, and write evaluation.json.

    The file goes into the run folder, or beside an adapter that lies in none. Started by torchrun
    and the like, the processes share the batches, and the first one alone speaks and writes.

    Args:
        config: run file for an adapter folder.
        split: train, validation or test; None takes evaluation.split.
        limit: rows per task and group; None takes evaluation.limit.
    """
    chosen = {"split": split, "limit": limit}
    given = [f"evaluation.{key}={value}" for key, value in chosen.items() if value is not None]
    for word in overrides:
        reason = _IDLE.get(word.partition("=")[0].strip().partition(".")[0])
        if reason:
            warnings.warn(f"{word} has no effect on eval, because {reason}.", stacklevel=2)
    found = find_target(target, overrides=[*overrides, *given], config=config)
    run = found.run
    if run is None:
        raise ConfigError(
            f"{target} lies in no run folder, so there is no data to score it on; give "
            "--config RUN.yaml."
        )
    examples, shown = _examples(run, trust_remote_code)
    metrics = {name: task.metrics for name, task in run.data.tasks.items()}
    task_metrics(examples, metrics)  # mistakes are told before the model loads
    speaks = is_main_process()
    say = _note if speaks else lambda text: None
    loaded = load_target(found, say=say, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {
        "metrics_by_task": metrics,
        "demonstrations": shown,
        "seed": run.seed,
    }
    with joined() as spread, _progress() if speaks else nullcontext() as progress:
        same_everywhere("model.dtype", loaded.model.dtype)
        options |= {"progress": progress, "spread": spread}
        report = work(loaded.model, loaded.tokenizer, examples, run.evaluation, **options)
    if speaks:
        _deliver(report, _origin(found, loaded.name, loaded.note), found.folder, as_json=as_json)
    return 0


def _examples(
    run: RunFile, trust_remote_code: bool
) -> tuple[dict[str, list[Example]], dict[str, list[Example]]]:
    """Rows to score, and the training rows to show in prompts."""
    tokenizer = None
    if any(task.format == "messages" for task in run.data.tasks.values()):
        tokenizer = load_tokenizer(
            run.model, trust_remote_code=trust_remote_code
        )  # its chat template renders the rows
    split = run.evaluation.split
    examples = load_examples(run.data, split, seed=run.seed, tokenizer=tokenizer)
    left_out = [name for name in run.data.tasks if not examples.get(name)]
    if len(left_out) == len(run.data.tasks):
        raise ConfigError(
            f"no task has rows in split {split!r}; choose another with --split, or give the tasks "
            "files for it."
        )
    if left_out:
        warnings.warn(f"left out, no rows in split {split!r}: {', '.join(left_out)}", stacklevel=2)
    examples = {name: rows for name, rows in examples.items() if rows}
    if not run.evaluation.examples_in_prompt:
        return examples, {}
    return examples, load_examples(run.data, "train", seed=run.seed, tokenizer=tokenizer)


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
    lines = rows(report)
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(rich_table(lines))
    else:
        print(plain_text(lines))
    note = [f"model: {origin['note']}"] if origin["note"] else []
    for line in [*footnotes(report), *note, f"written: {file}"]:
        print(line)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal, elsewhere a line every ten seconds and at each end."""
    if not sys.stderr.isatty():
        yield _line_progress()
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        jobs: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in jobs:
                jobs[what] = bar.add_task(what, total=total)
            bar.update(jobs[what], completed=done)

        yield show


def _line_progress() -> Progress:
    last = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 10:
            last = time.monotonic()
            _note(f"{what} {done}/{total}")

    return show
