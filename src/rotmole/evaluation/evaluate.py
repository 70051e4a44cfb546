"""Evaluation of a model on named tasks, with and without its adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

from peft import PeftModel

from rotmole.config.schema import EvaluationSection
from rotmole.data.examples import Example
from rotmole.data.load import within_limit
from rotmole.errors import ConfigError, did_you_mean
from rotmole.evaluation import generation
from rotmole.evaluation.few_shot import with_examples
from rotmole.evaluation.generation import prompt_tokens
from rotmole.evaluation.metrics import METRICS, Answer, default_metrics
from rotmole.evaluation.report import Report, System, compare, summarise
from rotmole.evaluation.scoring import (
    Scored,
    likelihoods,
    scored_answers,
    scored_choices,
)
from rotmole.models.limits import check_readable, window_of

Tasks = Mapping[str, Sequence[Example]]
Progress = Callable[[str, int, int], None]
UNLIMITED = 1 << 30

ANSWERS = 4
"""Rows of generation for each row of a batch: a step of generation reads one token of each."""


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
    max_length: int | None = None,
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
        max_length: the most tokens of a row, as in training; None is no limit. A longer row is an
            error, or its prompt loses its beginning if its `long_rows` is "cut". With k worked
            examples in its prompt it may have (k + 1) times as many.
        spread: share the batches among the processes of the default process group, all of which
            must call this; each gets the whole report, equal to that of one process in every bit.

    Returns:
        A report with the systems "before" and "after", or "base" for a model without adapter.

    Raises:
        ConfigError: a task has no rows, or a metric does not exist or does not fit its task.
        DataError: a row is too long, or the model cannot read it; nothing was scored.
    """
    prepared = _prepared(
        model,
        tokenizer,
        limit_rows(examples_by_task, section.limit, seed=seed),
        section,
        metrics_by_task=metrics_by_task,
        demonstrations=demonstrations,
        progress=progress,
        seed=seed,
        max_length=max_length,
    )
    run = partial(_measured, model, tokenizer, prepared, section, seed=seed, spread=spread)
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
    max_length: int | None = None,
    spread: bool = False,
) -> System:
    """Measure one system: the model as it is now, on all rows; for arguments see `evaluate`.

    Args:
        section: batch size, length of answers, examples in prompts; its limit is not used.

    Returns:
        One system; `compare` makes a report of several.
    """
    prepared = _prepared(
        model,
        tokenizer,
        examples_by_task,
        section,
        metrics_by_task=metrics_by_task,
        demonstrations=demonstrations,
        progress=None,
        seed=seed,
        max_length=max_length,
    )
    return _measured(
        model, tokenizer, prepared, section, progress=progress, seed=seed, spread=spread
    )


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


@dataclass(frozen=True)
class _Prepared:
    """What the model reads.

    Attributes:
        shown: task -> its rows, with the worked examples in their prompts.
        metrics: task -> names.
        choices: task -> the choices of its first row, of its second, and so on.
        losses: task -> its rows with their correct answers.
        prompts: task -> the token ids of its prompts, to be continued.
        cut: task -> ids of rows that were shortened.
    """

    shown: Tasks
    metrics: Mapping[str, Sequence[str]]
    choices: dict[str, list[Scored]] = field(default_factory=dict)
    losses: dict[str, list[Scored]] = field(default_factory=dict)
    prompts: dict[str, list[list[int]]] = field(default_factory=dict)
    cut: dict[str, set[str]] = field(default_factory=dict)


def _prepared(
    model: Any,
    tokenizer: Any,
    examples_by_task: Tasks,
    section: EvaluationSection,
    *,
    metrics_by_task: Mapping[str, Sequence[str] | None] | None,
    demonstrations: Tasks | None,
    progress: Progress | None,
    seed: int,
    max_length: int | None,
) -> _Prepared:
    """Tokenise all rows, cut those that may be cut, and check that the model can read them."""
    count = section.examples_in_prompt
    shown = {
        task: [with_examples(row, demonstrations or {}, count=count, seed=seed) for row in rows]
        for task, rows in examples_by_task.items()
    }
    prepared = _Prepared(shown, task_metrics(examples_by_task, metrics_by_task or {}))
    limit = max_length or UNLIMITED
    tick = _counter(progress, "tokenising", sum(map(len, shown.values())))
    for task, rows in examples_by_task.items():
        whole = scored_answers(rows, tokenizer, longest=limit)  # training's rule for rows
        _add_inputs(prepared, model, tokenizer, task, whole, section, limit)
        _check_inputs(prepared, model, tokenizer, task, section)
        if tick is not None:
            tick(len(rows))
    return prepared


def _add_inputs(
    prepared: _Prepared,
    model: Any,
    tokenizer: Any,
    task: str,
    whole: list[Scored],
    section: EvaluationSection,
    limit: int,
) -> None:
    """Tokenise the rows of one task; `whole` are its rows without worked examples."""
    rows, window = prepared.shown[task], window_of(model)
    needs = {METRICS[name].needs for name in prepared.metrics[task]}
    most = window.positions if window is not None and window.fixed else UNLIMITED
    cuts = rows[0].long_rows == "cut"
    longest = min(limit * (1 + section.examples_in_prompt), most) if cuts else UNLIMITED
    if section.examples_in_prompt or longest < limit:
        whole = scored_answers(rows, tokenizer, longest=longest)
    if needs & {"choices", "score"}:
        prepared.choices[task] = scored_choices(rows, tokenizer, longest=longest)
    if "loss" in needs:
        prepared.losses[task] = whole
    if "text" in needs:
        # a row of training leaves room for one token of the answer and the end
        room = max(1, min(longest - 2, most - section.max_new_tokens)) if cuts else None
        prepared.prompts[task] = [
            prompt_tokens(row.prompt, tokenizer, longest=room) for row in rows
        ]
    prepared.cut[task] = {row.id for row, text in zip(rows, whole, strict=True) if text.cut}


def _check_inputs(
    prepared: _Prepared, model: Any, tokenizer: Any, task: str, section: EvaluationSection
) -> None:
    rows = prepared.shown[task]
    places = [row.place for row in rows]
    fix = "set long_rows: cut for this task, shorten the row"
    if section.examples_in_prompt:
        fix += ", or lower evaluation.examples_in_prompt"
    texts = list(zip(places, (t.tokens for t in prepared.losses.get(task, ())), strict=False))
    for place, choices in zip(places, _by_row(rows, prepared.choices.get(task, [])), strict=True):
        texts += [(place, choice.tokens) for choice in choices]
    check_readable(model, tokenizer, texts, fix=fix)
    prompts = zip(places, prepared.prompts.get(task, ()), strict=False)
    fix = f"lower evaluation.max_new_tokens, {fix}"
    check_readable(model, tokenizer, prompts, new_tokens=section.max_new_tokens, fix=fix)


def _measured(
    model: Any,
    tokenizer: Any,
    prepared: _Prepared,
    section: EvaluationSection,
    *,
    progress: Progress | None,
    seed: int,
    spread: bool,
) -> System:
    started = time.perf_counter()
    options: dict[str, Any] = {
        "batch_size": section.batch_size, "progress": progress, "spread": spread,
    }  # fmt: skip
    answers = _scored_answers(model, prepared, **options)
    _add_texts(answers, model, tokenizer, prepared, section.max_new_tokens, **options)
    seconds = time.perf_counter() - started
    return summarise(
        prepared.shown, answers, prepared.metrics, seconds=seconds, seed=seed, cut=prepared.cut
    )


def _by_row(rows: Sequence[Example], texts: Sequence[Scored]) -> list[list[Scored]]:
    """Group the texts of choices by row; rows without texts get none."""
    following = iter(texts)
    return [list(islice(following, len(row.choices))) for row in rows]


def _scored_answers(
    model: Any,
    inputs: _Prepared,
    *,
    batch_size: int,
    progress: Progress | None,
    spread: bool,
) -> dict[str, list[Answer]]:
    """Return answers with log-likelihoods and losses, the rows of all tasks batched together."""
    shown = inputs.shown
    texts = [text for part in (inputs.choices, inputs.losses) for t in part.values() for text in t]
    tick = _counter(progress, "likelihoods", len(texts))
    values = likelihoods(model, texts, batch_size=batch_size, tick=tick, spread=spread)
    results = iter(values)
    answers = {task: [Answer()] * len(rows) for task, rows in shown.items()}
    for task in inputs.choices:
        for index, row in enumerate(shown[task]):
            logs = tuple(next(results).log for _ in row.choices)
            answers[task][index] = replace(answers[task][index], log_likelihoods=logs)
    for task, measured in inputs.losses.items():
        for index, text in enumerate(measured):
            found = next(results)
            answers[task][index] = replace(
                answers[task][index],
                loss=-found.log, tokens=len(text.positions), greedy=found.greedy,
            )  # fmt: skip
    return answers


def _add_texts(
    answers: dict[str, list[Answer]],
    model: Any,
    tokenizer: Any,
    inputs: _Prepared,
    max_new_tokens: int,
    *,
    batch_size: int,
    progress: Progress | None,
    spread: bool,
) -> None:
    """Generate text for the tasks that need it and add it to their answers, in place."""
    shown = inputs.shown
    for one_line in (True, False):
        places = [
            (task, index)
            for task in inputs.prompts
            if one_line == (not any("\n" in row.completion.strip() for row in shown[task]))
            for index in range(len(shown[task]))
        ]
        if not places:
            continue
        texts = generation.continuations(
            model,
            tokenizer,
            [inputs.prompts[task][index] for task, index in places],
            max_new_tokens=max_new_tokens,
            batch_size=ANSWERS * batch_size,
            one_line=one_line,
            ends=sorted({shown[task][index].end for task, index in places} - {""}),
            tick=_counter(progress, "answers", len(places)),
            spread=spread,
        )
        for (task, index), found in zip(places, texts, strict=True):
            text = generation.cut_answer(found.text, one_line=one_line)
            answers[task][index] = replace(answers[task][index], text=text)


def _named(progress: Progress | None, name: str) -> Progress | None:
    if progress is None:
        return None
    return lambda what, done, total: progress(f"{name}: {what}", done, total)


def _counter(progress: Progress | None, what: str, total: int) -> Callable[[int], None] | None:
    if progress is None or not total:
        return None
    done = 0
    progress(what, done, total)  # the first batch may take minutes

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress(what, done, total)

    return tick
