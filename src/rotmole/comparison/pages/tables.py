"""The tables of a study as lines of text, the header first: for screen, Markdown and page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from rotmole.comparison.judgement import (
    NONE,
    AtBudget,
    Difference,
    Judgement,
    Measure,
    Method,
)
from rotmole.comparison.results import NLL
from rotmole.comparison.scores import HELD_OUT
from rotmole.evaluation.statistics.paired import LEVEL, Paired
from rotmole.units import duration

Lines = list[list[str]]
DASH = "-"


def screen(judgement: Judgement) -> list[tuple[str, Lines]]:
    """Return titles and tables for the screen; those of the clock come last."""
    nll = judgement.measures[0]
    titled = [(judgement.headline, overview(judgement, gates=False))]
    for measure in judgement.measures:
        words = f"{measure.label} minus that of {judgement.baseline}"
        titled.append((words, differences(judgement, measure)))
    titled.append((f"{nll.label} by task", by_task(judgement, nll)))
    clock = judgement.clock.at_equal_seconds
    titled.append((
        "at equal operations (validation)",
        at_budget(judgement, judgement.at_equal_flops, "operations"),
    ))  # fmt: skip
    titled.append(("training, by the clock", seconds(judgement)))
    words = "at equal seconds (validation), by the clock"
    titled.append((words, at_budget(judgement, clock, "seconds")))
    return [(title, lines) for title, lines in titled if lines]


def overview(judgement: Judgement, *, gates: bool = True) -> Lines:
    """Methods with their parameters, rates and scores over everything.

    Args:
        gates: show the parameters of the gates in a column of their own.
    """
    header = ["method", "parameters", "to target", *(["gates"] if gates else []), "rate"]
    lines = [header + [measure.label for measure in judgement.measures]]
    for method in judgement.methods:
        line = [method.name, count(method.parameters), relative(method)]
        line += [count(method.gate_parameters)] if gates else []
        line.append(f"{method.rate:.3g}")
        for measure in judgement.measures:
            score = judgement.score(method.name, measure.name)
            line.append(figure(measure, score.value if score else None))
        lines.append(line)
    return lines


def differences(judgement: Judgement, measure: Measure) -> Lines:
    """Methods minus the baseline over everything, with intervals and verdicts."""
    lines = [["method", "seeds", "difference", "p", "verdict"]]
    for name in judgement.others():
        difference = judgement.difference(name, measure.name)
        if difference is not None:
            seeds = str(difference.estimate.n) if difference.estimate else "0"
            p = DASH if difference.adjusted is None else f"{difference.adjusted:.3f}"
            shown = interval(measure, difference.estimate)
            lines.append([name, seeds, shown, p, difference.verdict])
    if len({line[1] for line in lines[1:]} | {str(len(judgement.seeds))}) == 1:
        return [[line[0], *line[2:]] for line in lines]  # the headline has the number
    return lines


def by_task(judgement: Judgement, measure: Measure) -> Lines:
    """Scores of each task, a column a method; [] if there is a single task."""
    tasks = dict.fromkeys(s.task for s in judgement.scores if s.measure == measure.name and s.task)
    if len(tasks) < 2:
        return []
    names = [method.name for method in judgement.methods]
    lines = [["task", *names]]
    for task in tasks:
        scores = [judgement.score(name, measure.name, task) for name in names]
        values = [score.value if score else None for score in scores]
        lines.append([task, *(figure(measure, value) for value in values)])
    return lines


def at_budget(judgement: Judgement, found: Sequence[AtBudget], unit: str) -> Lines:
    """Methods minus the baseline in validation NLL where the cheaper of both has ended.

    Args:
        found: differences at equal seconds or operations.
        unit: "seconds" or "operations".
    """
    nll = judgement.measures[0]
    lines = [["method", f"equal {unit}", "of its updates", f"NLL minus {judgement.baseline}"]]
    for entry in found:
        budget = DASH
        if entry.budget is not None:
            seconds = unit == "seconds"
            budget = duration(entry.budget) if seconds else f"{entry.budget:.3g}"
        share = DASH if entry.share is None else f"{100 * entry.share:.0f} %"
        lines.append([entry.method, budget, share, interval(nll, entry.estimate)])
    return lines


def seconds(judgement: Judgement) -> Lines:
    """Methods with their seconds of training, the mean over the seeds."""
    lines = [["method", "training", "a seed: least", "most"]]
    for name, by_seed in judgement.clock.seconds.items():
        values = list(by_seed.values())
        lines.append([name, *map(duration, (fmean(values), min(values), max(values)))])
    return lines


def trials(judgement: Judgement) -> Lines:
    """Validation NLL of tuning, a line a combination of settings, a column a method.

    It is the mean over the tuning seeds, and "*" marks what was chosen.
    """
    losses = tried(judgement)
    if not losses:
        return []
    names = list(dict.fromkeys(method for method, _ in losses))
    chosen = {method.name: dict(method.settings) for method in judgement.methods}
    lines = [["settings", *names]]
    for settings in sorted(dict.fromkeys(settings for _, settings in losses)):
        line = [", ".join(f"{key.rpartition('.')[2]} {value:.3g}" for key, value in settings)]
        for name in names:
            nlls = losses.get((name, settings), [])
            known = bool(nlls) and all(map(math.isfinite, nlls))
            mark = " *" if chosen.get(name) == dict(settings) else ""
            line.append(f"{fmean(nlls):.4f}{mark}" if known else DASH)
        lines.append(line)
    return lines


Settings = tuple[tuple[str, float], ...]


def tried(judgement: Judgement) -> dict[tuple[str, Settings], list[float]]:
    """Return (method, settings of the grid) -> NLL of each tuning seed."""
    losses: dict[tuple[str, Settings], list[float]] = {}
    for trial in judgement.trials:
        nll = math.inf if trial.nll is None else trial.nll
        losses.setdefault((trial.method, tuple(trial.settings.items())), []).append(nll)
    return losses


def remarks(judgement: Judgement) -> list[str]:
    """Return sentences that say how to read the tables, and what has to be known."""
    baseline = judgement.baseline
    measures = [m.label for m in judgement.measures if m.name != HELD_OUT]
    equal = str(judgement.study.get("equal", "parameters")).replace("_", " ")
    lines = [
        f"Differences are to {baseline}, paired by seed: [low, high] is a 95 % interval over seeds "
        "(Student's t). It covers the choice of the seed, not of the test rows."
        if judgement.seeds
        else "Each method is scored by the validation rows that chose its settings, and so looks a "
        "little better than it is on others. A screen picks methods for a study with final seeds."
    ]
    if judgement.claims:
        lines.append(
            f"Claims: {judgement.claims}, methods equal in {equal} by {' and '.join(measures)}. "
            f"p is that of exact sign flips after Holm's steps over all of them, and a claim needs "
            f"p of at most {LEVEL}, so at least {judgement.seeds_needed} seeds."
        )
    lines += [line for line in map(_unclaimed, _by_verdict(judgement, NONE)) if line]
    unequal = [method for method in judgement.methods if not method.equal]
    if unequal:
        named = ", ".join(f"{m.name} ({relative(m)})" for m in unequal)
        lines.append(f"Not equal in {equal}, so part of no claim: {named}.")
    return [*lines, *judgement.notes]


def methods(judgement: Judgement) -> Lines:
    """What each method is: its settings in the study file, and the size that was solved for it.

    Empty where study.json does not say it, as of studies that were judged earlier.
    """
    lines = [["method", "settings", "solved"]]
    for name, planned in judgement.study.get("methods", {}).items():
        if "written" not in planned:
            return []
        settings = [f"{k.removeprefix('adapter.')} {v}" for k, v in planned["written"].items()]
        solved = f"{planned['solved']} {planned['value']}" if planned["solved"] else ""
        if planned["raised_layers"]:
            layers = planned["raised_layers"]
            solved += f", {planned['value'] + 1} in {layers} layer{'s' * (layers > 1)}"
        lines.append([name, ", ".join(settings), solved])
    return lines if len(lines) > 1 else []


def _by_verdict(judgement: Judgement, verdict: str) -> Iterable[tuple[Measure, list[Difference]]]:
    for measure in judgement.measures:
        decided = [
            d for d in judgement.differences if d.measure == measure.name and d.verdict == verdict
        ]
        yield measure, decided


def _unclaimed(entry: tuple[Measure, list[Difference]]) -> str:
    measure, found = entry
    known = [d for d in found if d.detectable is not None]
    if not known:
        return ""
    named = ", ".join(f"{d.method} {figure(measure, d.detectable)}" for d in known)
    return (
        f"No difference was found in {measure.label}; the smallest that would have been found in "
        f"80 % of such studies: {named}."
    )


def count(number: int) -> str:
    """Say a number of parameters: "3.04 M", "55,296", "0"."""
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number:,}"


def relative(method: Method) -> str:
    """Say how a method's parameters differ from the target."""
    return DASH if method.difference is None else f"{100 * method.difference:+.1f} %"


def figure(measure: Measure, value: float | None, *, signed: bool = False) -> str:
    """Write a score or a difference of a measure, "-" if there is none."""
    digits = 4 if measure.name in (NLL, HELD_OUT) else 3
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:{'+' if signed else ''}.{digits}f}"


def interval(measure: Measure, estimate: Paired | None) -> str:
    """Write a difference with its interval, such as "-0.0310 [-0.0421, -0.0199]"."""
    if estimate is None:
        return DASH
    text = figure(measure, estimate.value, signed=True)
    if estimate.low is None:
        return text
    ends = ", ".join(figure(measure, end, signed=True) for end in (estimate.low, estimate.high))
    return f"{text} [{ends}]"


def markdown(lines: Lines) -> str:
    """Write a table in Markdown."""
    head, *body = ["| " + " | ".join(map(_cell, line)) + " |" for line in lines]
    rule = "|" + " --- |" * len(lines[0])
    return "\n".join([head, rule, *body])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def facts(found: Mapping[str, object]) -> str:
    """Write what all cells share in one line."""
    parts = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            parts += [f"{key} {version}" for key, version in value.items()]
        else:
            parts.append(f"{name} {value}")
    return ", ".join(parts)
