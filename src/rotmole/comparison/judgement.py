"""The judgement of a study: every figure that its tables, pages and study.json show.

Figures that depend on the clock stand apart, in `Clock`: all others come out the same when the same
commit repeats the study on the same machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rotmole.errors import InputError
from rotmole.evaluation.statistics.paired import Paired
from rotmole.files import atomic_write_text

FORMAT = 1

BETTER, WORSE, NONE = "better", "worse", "no difference found"
FEW, UNEQUAL, UNPAIRED = "too few seeds for a claim", "not equal", "not paired"
DIVERGED = "diverged"
"""The verdicts on a difference."""


@dataclass(frozen=True)
class Measure:
    """What cells are judged by.

    Attributes:
        name: "nll" or "own metric".
        label: in words; the metric's name where all tasks have the same one.
        higher_is_better: whether a higher score is better.
    """

    name: str
    label: str
    higher_is_better: bool


@dataclass(frozen=True)
class Score:
    """A method's score on one part of the test split.

    Attributes:
        method: its name.
        measure: name of the measure.
        task, group: of the part; both "" for everything.
        value: mean over the seeds; None if a seed's score is not finite.
        spread: standard deviation over the seeds; None with fewer than two.
        by_seed: seed -> score; None if it is not finite.
    """

    method: str
    measure: str
    task: str
    group: str
    value: float | None
    spread: float | None
    by_seed: Mapping[int, float | None]


@dataclass(frozen=True)
class Method:
    """What is known of a method without its scores.

    Attributes:
        parameters: trainable, gates included; gate_parameters are those of the gates.
        difference: parameters relative to the target, such as 0.013; None without a target.
        equal: whether it is part of claims at equal parameters.
        settings: of the tuning grid, as chosen.
        rate: learning rate of the experts.
        updates, tokens, flops: of training, mean over the seeds; flops None if it is not known.
        seeds: finished final seeds.
    """

    name: str
    parameters: int
    gate_parameters: int
    difference: float | None
    equal: bool
    settings: Mapping[str, Any]
    rate: float
    updates: float
    tokens: float
    flops: float | None
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """A method minus the baseline, paired by seed.

    Attributes:
        measure: name of the measure.
        task, group: the part of the test split; both "" for everything.
        estimate: None if no pair of cells can be compared.
        verdict: on a difference over everything; parts are no claims and have "" or "diverged".
        adjusted: p-value after Holm's steps; None outside the family.
        detectable: the smallest true difference that would be found in 80 % of such studies.
    """

    method: str
    measure: str
    task: str
    group: str
    estimate: Paired | None
    verdict: str = ""
    adjusted: float | None = None
    detectable: float | None = None


@dataclass(frozen=True)
class AtBudget:
    """A method minus the baseline in validation NLL where the cheaper of both has ended.

    Attributes:
        budget: mean over the pairs, in seconds or floating-point operations.
        share: of the method's own training that lies within the budget, 0 .. 1.
        estimate: None if no pair has a validation within the budget.
    """

    method: str
    budget: float | None
    share: float | None
    estimate: Paired | None


@dataclass(frozen=True)
class Curve:
    """Validation NLL while a final cell trains; one value a validation in each list."""

    method: str
    seed: int
    update: tuple[int, ...]
    tokens: tuple[int, ...]
    flops: tuple[float | None, ...]
    nll: tuple[float | None, ...]


@dataclass(frozen=True)
class Trial:
    """One tuning cell: its settings, and its validation NLL; None if it diverged."""

    method: str
    settings: Mapping[str, Any]
    rate: float
    seed: int
    nll: float | None


@dataclass(frozen=True)
class Clock:
    """The figures that depend on the clock.

    Attributes:
        seconds: method -> seed -> seconds of training alone.
        curves: method -> seed -> seconds at each validation of its curve.
        at_equal_seconds: differences where the quicker of both has ended.
    """

    seconds: Mapping[str, Mapping[int, float]]
    curves: Mapping[str, Mapping[int, tuple[float, ...]]]
    at_equal_seconds: tuple[AtBudget, ...]


@dataclass(frozen=True)
class Judgement:
    """All figures of a study.

    Attributes:
        headline: what the study can decide, in one line.
        baseline: the method that others are compared with.
        measures: what is judged.
        own_metrics: task -> its own metric.
        seeds: final seeds of the study.
        claims: size of the family of claims, and seeds_needed for its first step.
        study: plan.json of the study without its cells: methods, grid, chosen settings, split.
        facts: what all cells share: dtype, device, threads, processor, versions, commit.
        methods: those with finished cells, in the order of the study file.
        scores, differences: over everything, then by task, then by group.
        at_equal_flops: differences where the cheaper of both has ended.
        curves, trials: of final and of tuning cells.
        notes: what else has to be known, in sentences.
        clock: the figures that depend on the clock.
        missing: names of cells that are planned and not finished.
    """

    headline: str
    baseline: str
    measures: tuple[Measure, ...]
    own_metrics: Mapping[str, str]
    seeds: tuple[int, ...]
    claims: int
    seeds_needed: int
    study: Mapping[str, Any]
    facts: Mapping[str, Any]
    methods: tuple[Method, ...]
    scores: tuple[Score, ...]
    differences: tuple[Difference, ...]
    at_equal_flops: tuple[AtBudget, ...]
    curves: tuple[Curve, ...]
    trials: tuple[Trial, ...]
    notes: tuple[str, ...]
    clock: Clock
    missing: tuple[str, ...] = ()
    format: int = field(default=FORMAT)

    def score(self, method: str, measure: str, task: str = "", group: str = "") -> Score | None:
        """Return a method's score on a part; None if it has none."""
        wanted = (method, measure, task, group)
        scores = (s for s in self.scores if (s.method, s.measure, s.task, s.group) == wanted)
        return next(scores, None)

    def difference(
        self, method: str, measure: str, task: str = "", group: str = ""
    ) -> Difference | None:
        """Return a method's difference to the baseline on a part; None if it has none."""
        wanted = (method, measure, task, group)
        differences = (
            d for d in self.differences if (d.method, d.measure, d.task, d.group) == wanted
        )
        return next(differences, None)

    def others(self) -> list[str]:
        """Return the names of all methods but the baseline."""
        return list(dict.fromkeys(difference.method for difference in self.differences))


def write_judgement(judgement: Judgement, path: Path) -> Path:
    """Write study.json; figures that depend on the clock stand under "clock" and nowhere else.

    Raises:
        StorageError: the file cannot be written.
    """
    text = TypeAdapter(Judgement).dump_json(judgement, indent=1).decode("utf-8")
    return atomic_write_text(path, text + "\n")


def read_judgement(path: Path) -> Judgement:
    """Read study.json.

    Raises:
        InputError: it is missing or is not what write_judgement writes.
    """
    try:
        judgement = TypeAdapter(Judgement).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no study.json"
        raise InputError(
            f"cannot read {str(path)!r}: {reason}; give a study.json of `rotmole compare`."
        ) from None
    if judgement.format != FORMAT:
        raise InputError(
            f"{str(path)!r} has format {judgement.format}, but this version reads {FORMAT}; "
            "run `rotmole compare` again, which keeps finished cells."
        )
    return judgement
