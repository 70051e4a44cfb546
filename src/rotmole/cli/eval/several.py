"""``rotmole eval A B ...``: runs or adapters on the same rows, and their paired differences."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rotmole.cli.eval.command import (
    chosen_tasks,
    load_rows,
    section_words,
    tell_without_effect,
    with_data,
)
from rotmole.cli.screen import note, progress
from rotmole.comparison.judgement import Measure
from rotmole.comparison.pages.tables import interval
from rotmole.comparison.results import figures_of, rows_of
from rotmole.comparison.runs import (
    Run,
    RunDifferences,
    check_same_rows,
    compare_runs,
    trained,
    unequal,
)
from rotmole.comparison.shared import SharedSources
from rotmole.config.schema import RunFile
from rotmole.config.training import longest_row
from rotmole.config.yaml_text import parse_yaml
from rotmole.data import Example
from rotmole.errors import ConfigError
from rotmole.evaluation import Report, System, compare, limit_rows, measure, to_json
from rotmole.evaluation.evaluate import task_metrics
from rotmole.evaluation.files import PREDICTIONS, RESULT, as_text, is_chosen_here, write_files
from rotmole.evaluation.render import footnotes, print_lines, print_table, rows
from rotmole.evaluation.report import prediction_rows
from rotmole.evaluation.statistics.paired import LEVEL
from rotmole.evaluation.target import Target, with_adapter
from rotmole.files import check_writable
from rotmole.models.endings import take_endings
from rotmole.processes import is_main_process, joined, same_everywhere

LOSS = "perplexity"
"""The metric that comes with the loss of every row."""


def evaluate_several(
    targets: Sequence[Path],
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
    """Score targets on the same rows, and compare them with the first one.

    Args:
        targets: at least two run folders, run files or adapter folders.
        overrides: key=value settings over the run file of each.
        config: run file whose data all of them get.
        split: train, validation or test; None means evaluation.split.
        limit: rows per task and group; None means evaluation.limit.
        as_json: print JSON instead of the tables.
        tasks: names of the tasks to score; none means all.
        output: folder for eval.json and predictions.jsonl; None writes no files.
        trust_remote_code: let transformers run code that came with the model.

    Raises:
        InputError: the targets have different rows.
        StorageError: the files cannot be written.
    """
    names = list(map(str, targets))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{', '.join(twice)} is given twice; compare runs that differ.")
    tell_without_effect(overrides)
    words = [*overrides, *section_words(split, limit)]
    places = {
        name: with_data(path, words, config) for name, path in zip(names, targets, strict=True)
    }
    is_main = is_main_process()
    if is_main and output is not None:
        check_writable(output.expanduser(), RESULT, PREDICTIONS)
    systems, metrics = _scored(places, tasks, trust_remote_code, note if is_main else _silent)
    if not is_main:
        return 0
    first = next(iter(places.values()))
    assert first.run is not None  # with_data
    section = first.run.evaluation.model_dump(exclude={"before"})
    report = compare(systems, {**section, "seed": first.run.seed})
    differences = compare_runs(_runs(report, places), metrics)
    _deliver(report, differences, places, output, as_json=as_json)
    return 0


def _silent(text: str) -> None:
    """Say nothing, as the other processes of a launcher do."""


def _scored(
    places: dict[str, Target], tasks: Sequence[str], trust_remote_code: bool, say: Any
) -> tuple[dict[str, System], list[str]]:
    """Return the answers of every target, and the names of the tasks' metrics."""
    first = _run_of(next(iter(places.values())))
    examples: dict[str, dict[str, list[Example]]] = {}
    shown: dict[str, list[Example]] = {}
    for name, place in places.items():
        run = _run_of(place)
        data = run.data.model_copy(update={"tasks": chosen_tasks(run.data, tasks)})
        say(f"loading data of {name} (split {run.evaluation.split})")
        loaded, demonstrations = load_rows(run, data, place.date, trust_remote_code)
        shown = shown or demonstrations
        examples[name] = limit_rows(loaded, first.evaluation.limit, seed=first.seed)
    check_same_rows(examples)
    given = {name: task.metrics for name, task in first.data.tasks.items()}
    rows_by_task = next(iter(examples.values()))
    wanted = {
        task: list(dict.fromkeys([*names, LOSS]))
        for task, names in task_metrics(rows_by_task, given).items()
    }
    longest = longest_row(first)
    sources = SharedSources(trust_remote_code=trust_remote_code)
    systems = {}
    with joined() as spread, progress() if say is note else nullcontext() as show:
        for name, place in places.items():
            base = sources.model(place.model, say)
            model = base.model
            if place.adapter is not None:
                model = with_adapter(model, place.adapter)
                take_endings(model, place.adapter)
            model.eval()
            same_everywhere("model.dtype", model.dtype)
            named = None if show is None else _named(show, name)
            systems[name] = measure(
                model, base.tokenizer, rows_by_task, first.evaluation,
                metrics_by_task=wanted, demonstrations=shown, progress=named,
                seed=first.seed, max_length=longest, spread=spread,
            )  # fmt: skip
    return systems, list(dict.fromkeys(name for names in wanted.values() for name in names))


def _run_of(place: Target) -> RunFile:
    assert place.run is not None  # with_data
    return place.run


def _named(show: Any, name: str) -> Any:
    return lambda what, done, total: show(f"{name}: {what}", done, total)


def _runs(report: Report, places: dict[str, Target]) -> list[Run]:
    lines = list(prediction_rows(report))
    content = to_json(report)
    runs = []
    for name, place in places.items():
        method, seed = _method_and_seed(place)
        rows, figures = rows_of(lines, name), figures_of(content, name)
        runs.append(Run(name, method or name, seed, rows, figures))
    return runs


def _method_and_seed(place: Target) -> tuple[str, int | None]:
    """Return what a run was trained with but for its seed, and the seed; ("", None) if unknown."""
    if place.adapter is None:
        return "", None
    try:
        path = place.adapter.resolve().parent / "run.yaml"
        content = parse_yaml(path.read_text(encoding="utf-8"), where=str(path))
    except (OSError, ValueError):
        return "", None
    seed = content.pop("seed", None)
    content.pop("output_dir", None)
    return json.dumps(content, sort_keys=True, default=str), seed if isinstance(seed, int) else None


def _deliver(
    report: Report,
    found: RunDifferences,
    places: dict[str, Target],
    output: Path | None,
    *,
    as_json: bool,
) -> None:
    """Print the tables, or JSON; write the files if there is a folder for them."""
    chosen = [name for name, place in places.items() if is_chosen_here(place.run, place.adapter)]
    facts = {
        "adapters": {name: str(p.adapter) if p.adapter else None for name, p in places.items()},
        "models": {name: p.model.name for name, p in places.items()},
        "chosen_on_these_rows": chosen,
        "trained": {name: asdict(trained(place.adapter)) for name, place in places.items()},
        "paired": asdict(found),
    }
    files = [] if output is None else write_files(report, facts, output.expanduser())
    if as_json:
        sys.stdout.write(as_text(report, facts))
        sys.stdout.flush()
        return
    lines = rows(report)
    if len(places) == 2 and not found.left_out:
        lines = [line[:-1] for line in lines]  # the differences have tables of their own
    print_table(lines)
    for one in found.measures:
        print_table(_lines(found, one), title=f"{one.label} minus that of {found.baseline}")
    advice = [
        f"validation rows chose the checkpoint of {name} in training, so its figures are a little "
        "too good; --split test scores others if there are some."
        for name in chosen
    ]
    print_lines(
        [*_remarks(found, places), *_amounts(found, places), *advice, *footnotes(report)[1:]]
    )
    if files:
        print(f"written: {', '.join(map(str, files))}")


def _amounts(found: RunDifferences, places: dict[str, Target]) -> list[str]:
    """Say how the adapters came about, and what but their methods tells them from the baseline's.

    Where runs are paired by seed, each stands beside the baseline's run of its seed.
    """
    known = {name: trained(place.adapter) for name, place in places.items()}
    seeds = {name: _method_and_seed(place)[1] for name, place in places.items()}
    first, *others = found.members[found.baseline]
    of_seed = {seeds[name]: name for name in (first, *others)} if found.unit == "seed" else {}
    parts = []
    for name, run in known.items():
        said = "-" if run.parameters is None else f"{run.parameters:,}"
        amount = "" if run.updates is None else f", {run.updates} updates, {run.tokens:,} tokens"
        parts.append(f"{name} {said}{amount}")
    lines = [f"trainable parameters: {'; '.join(parts)}"]
    for name, run in known.items():
        beside = of_seed.get(seeds[name], first)
        if name not in others and (reasons := unequal(run, known[beside])):
            lines.append(
                f"{name} has {' and '.join(reasons)} beside {beside}: their difference is not that "
                "of their methods alone."
            )
    return lines


def _lines(found: RunDifferences, one: Measure) -> list[list[str]]:
    header = ["run" if found.unit == "row" else "runs", "task", "n", "difference", "p", "verdict"]
    lines = [header]
    for d in found.differences:
        if d.measure != one.name or d.group:
            continue
        n = str(d.estimate.n) if d.estimate else "0"
        p = "" if d.adjusted is None else f"{d.adjusted:.4f}"
        lines.append([d.method, d.task or "overall", n, interval(one, d.estimate), p, d.verdict])
    return lines


def _remarks(found: RunDifferences, places: dict[str, Target]) -> list[str]:
    """Say how to read the differences."""
    seeds = found.unit == "seed"
    interval = (
        "over training seeds, paired by seed; it does not cover the choice of the rows"
        if seeds
        else "over rows, paired by row; another training seed may differ by more, and nothing is "
        "said of that"
    )
    lines = [
        f"[low, high]: 95 % interval {interval}.",
        f"p: sign flips over {'seeds' if seeds else 'rows'}, after Holm's steps over "
        f"{found.claims} claims (everything, by {' and '.join(m.label for m in found.measures)}); "
        f"tasks are no claims. A claim needs p of at most {LEVEL}.",
    ]
    for name, members in found.members.items():
        if len(members) > 1:
            lines.append(f"{name}: {', '.join(members)}")
    if found.left_out:
        lines.append(
            f"the own metric of {', '.join(found.left_out)} is one of many rows: no row has a "
            "difference in it."
        )
    if len({place.model.name for place in places.values()}) > 1:
        lines.append(
            "the runs have different base models: NLL is a mean over tokens and compares runs "
            "with one tokenizer only."
        )
    return lines
