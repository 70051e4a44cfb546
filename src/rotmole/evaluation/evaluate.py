"""Evaluation of a model on named tasks, with and without its adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from peft import PeftModel

from rotmole.config.schema import EvaluationSection
from rotmole.data.examples import Example
from rotmole.data.load import within_limit
from rotmole.errors import ConfigError, did_you_mean
from rotmole.evaluation import generation
from rotmole.evaluation.few_shot import with_examples
from rotmole.evaluation.metrics import METRICS, Answer, default_metrics
from rotmole.evaluation.report import Report, System, compare, summarise
from rotmole.evaluation.scoring import (
    context_window,
    log_likelihoods,
    scored_answers,
    scored_choices,
)

Tasks = Mapping[str, Sequence[Example]]
Progress = Callable[[str, int, int], None]


def evaluate(
    model: Any,
    tokenizer: Any,
    examples_by_task: Tasks,
    section: EvaluationSection,
    *,
    metrics_by_task: Mapping[str, Sequence[str] | None] | None = None,
    demonstrations: Tasks | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    spread: bool = False,
) -> Report:
    """Measure a model; if it has an adapter, also with the adapter disabled.

    Args:
        model: a causal language model, or a PeftModel around one.
        section: limit, batch size, length of answers, examples in prompts, and whether to measure
            "before".
        metrics_by_task: names from METRICS; a task without an entry gets `default_metrics`.
        demonstrations: training rows by task; required if section.examples_in_prompt > 0.
        progress: called with (what, done, total) as rows finish.
        seed: of the rows within the limit, the examples in prompts, and the bootstrap.
        spread: share the batches among the processes of the default process group, all of which
            must call this; each gets the whole report, equal to that of one process in every bit.

    Returns:
        A report with the systems "before" and "after", or "base" for a model without adapter.

    Raises:
        ConfigError: a task has no rows, or a metric does not exist or does not fit its task.
    """
    run = partial(
        measure,
        model,
        tokenizer,
        limit_rows(examples_by_task, section.limit, seed=seed),
        section,
        metrics_by_task=metrics_by_task,
        demonstrations=demonstrations,
        seed=seed,
        spread=spread,
    )
    systems: dict[str, System] = {}
    if isinstance(model, PeftModel) and section.before:
        with model.disable_adapter():
            systems["before"] = run(progress=_named(progress, "before"))
    name = "after" if isinstance(model, PeftModel) else "base"
    systems[name] = run(progress=_named(progress, name))
    return compare(systems, {**section.model_dump(exclude={"before"}), "seed": seed})


def measure(
    model: Any,
    tokenizer: Any,
    examples_by_task: Tasks,
    section: EvaluationSection,
    *,
    metrics_by_task: Mapping[str, Sequence[str] | None] | None = None,
    demonstrations: Tasks | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    spread: bool = False,
) -> System:
    """Measure one system: the model as it is now, on all rows; for arguments see `evaluate`.

    Args:
        section: batch size, length of answers, examples in prompts; its limit is not used.

    Returns:
        One system; `compare` makes a report of several.
    """
    metrics = task_metrics(examples_by_task, metrics_by_task or {})
    needs = {task: {str(METRICS[name].needs) for name in metrics[task]} for task in metrics}
    shown = {
        task: [
            with_examples(row, demonstrations or {}, count=section.examples_in_prompt, seed=seed)
            for row in rows
        ]
        for task, rows in examples_by_task.items()
    }
    started = time.perf_counter()
    options: dict[str, Any] = {"needs": needs, "progress": progress, "spread": spread}
    answers = _scored_answers(model, tokenizer, shown, batch_size=section.batch_size, **options)
    _add_texts(answers, model, tokenizer, shown, section=section, **options)
    seconds = time.perf_counter() - started
    return summarise(examples_by_task, answers, metrics, seconds=seconds, seed=seed)


def limit_rows(
    examples_by_task: Tasks, limit: int | None, *, seed: int
) -> dict[str, list[Example]]:
    """Return at most `limit` rows per task and group: a seeded choice, in the order of the rows.

    Args:
        limit: None returns all rows.
    """
    result = {}
    for task, rows in examples_by_task.items():
        chosen = within_limit([row.group for row in rows], limit, seed=f"{seed}/{task}/")
        result[task] = [rows[index] for index in chosen]
    return result


def task_metrics(
    examples_by_task: Tasks, wanted: Mapping[str, Sequence[str] | None]
) -> dict[str, tuple[str, ...]]:
    """Return the names of each task's metrics after checking that its rows have what they need.

    Args:
        wanted: names by task; None or no entry means `default_metrics`.

    Raises:
        ConfigError: a task has no rows, or a metric does not exist or does not fit its task; lists
            all problems.
    """
    result: dict[str, tuple[str, ...]] = {}
    problems: list[str] = []
    for task, rows in examples_by_task.items():
        if not rows:
            problems.append(f"task {task!r} has no rows to evaluate; check its files and split.")
            continue
        result[task] = tuple(wanted.get(task) or default_metrics(rows))
        problems.extend(_metric_problems(task, rows, result[task]))
    if not examples_by_task:
        problems.append("there is no task to evaluate; give at least one.")
    if problems:
        raise ConfigError(problems, where="evaluation")
    return result


def _metric_problems(task: str, rows: Sequence[Example], names: Sequence[str]) -> list[str]:
    problems = []
    for name in names:
        if name not in METRICS:
            hint = did_you_mean(name, METRICS) or f"; choose from {', '.join(METRICS)}."
            problems.append(f"task {task!r}: there is no metric {name!r}{hint}")
            continue
        needs = METRICS[name].needs
        if needs in ("choices", "score") and not all(row.choices for row in rows):
            lacking = "choices"
        elif needs == "choices" and any(row.answer is None for row in rows):
            lacking = "the index of the correct choice"
        elif needs == "score" and any(row.score is None for row in rows):
            lacking = "a score"
        else:
            continue
        problems.append(
            f"task {task!r}: metric {name!r} needs {lacking} in every row; choose another metric."
        )
    return problems


def _scored_answers(
    model: Any,
    tokenizer: Any,
    shown: Tasks,
    *,
    needs: Mapping[str, set[str]],
    batch_size: int,
    progress: Progress | None,
    spread: bool,
) -> dict[str, list[Answer]]:
    """Return answers with log-likelihoods and losses, the rows of all tasks batched together."""
    window = context_window(model)
    compared = [t for t in shown if needs[t] & {"choices", "score"}]
    measured = [t for t in shown if "loss" in needs[t]]
    pairs = [(row.prompt, choice) for t in compared for row in shown[t] for choice in row.choices]
    measured_rows = [row for t in measured for row in shown[t]]
    texts = scored_choices(pairs, tokenizer, window=window)
    texts += scored_answers(measured_rows, tokenizer, window=window)
    tick = _counter(progress, "likelihoods", len(texts))
    values = log_likelihoods(model, texts, batch_size=batch_size, tick=tick, spread=spread)
    results = iter(zip(values, texts, strict=True))
    answers = {task: [Answer()] * len(rows) for task, rows in shown.items()}
    for task in compared:
        for index, row in enumerate(shown[task]):
            likelihoods = tuple(next(results)[0] for _ in row.choices)
            answers[task][index] = replace(answers[task][index], log_likelihoods=likelihoods)
    for task in measured:
        for index in range(len(shown[task])):
            value, text = next(results)
            loss = replace(answers[task][index], loss=-value, tokens=len(text.positions))
            answers[task][index] = loss
    return answers


def _add_texts(
    answers: dict[str, list[Answer]],
    model: Any,
    tokenizer: Any,
    shown: Tasks,
    *,
    needs: Mapping[str, set[str]],
    section: EvaluationSection,
    progress: Progress | None,
    spread: bool,
) -> None:
    """Generate text for the tasks that need it and add it to their answers, in place."""
    for one_line in (True, False):
        places = [
            (task, index)
            for task, rows in shown.items()
            if "text" in needs[task]
            and one_line == (not any("\n" in row.completion.strip() for row in rows))
            for index in range(len(rows))
        ]
        if not places:
            continue
        texts = generation.answers(
            model,
            tokenizer,
            [shown[task][index].prompt for task, index in places],
            max_new_tokens=section.max_new_tokens,
            batch_size=section.batch_size,
            one_line=one_line,
            ends=sorted({shown[task][index].end for task, index in places} - {""}),
            tick=_counter(progress, "answers", len(places)),
            spread=spread,
        )
        for (task, index), text in zip(places, texts, strict=True):
            answers[task][index] = replace(answers[task][index], text=text)


def _named(progress: Progress | None, name: str) -> Progress | None:
    if progress is None:
        return None
    return lambda what, done, total: progress(f"{name}: {what}", done, total)


def _counter(progress: Progress | None, what: str, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress(what, done, total)

    return tick
