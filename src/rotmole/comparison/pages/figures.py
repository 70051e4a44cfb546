"""The figures of a study, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from rotmole.comparison.judgement import BETTER, WORSE, Curve, Judgement, Measure
from rotmole.comparison.pages.tables import figure as digits
from rotmole.comparison.pages.tables import tried
from rotmole.drawing import BETTER as GREEN
from rotmole.drawing import INK, WIDTH, draw, legend, series, short
from rotmole.drawing import WORSE as RED

TOGETHER = 3
"""Methods whose bands one panel can hold and still be read."""


@dataclass(frozen=True)
class Drawing:
    """A figure with its caption.

    Attributes:
        name: of its file, without ending.
        svg: for a page.
        caption: how to read it.
        wide: whether it needs room and scrolls on a narrow page.
    """

    name: str
    svg: str
    caption: str
    wide: bool = False


def drawings(judgement: Judgement) -> list[Drawing]:
    """Return the figures that do not depend on the clock, those that have data."""
    drawn = [convergence(judgement, "update"), parameters(judgement)]
    drawn += [forest(judgement, measure) for measure in judgement.measures]
    drawn.append(rates(judgement))
    drawn += [heat_map(judgement, measure) for measure in judgement.measures]
    return [drawing for drawing in drawn if drawing is not None]


def clock_drawings(judgement: Judgement) -> list[Drawing]:
    """Return the figures that depend on the clock, those that have data."""
    drawn = [convergence(judgement, "seconds"), score_by_seconds(judgement)]
    return [drawing for drawing in drawn if drawing is not None]


def convergence(judgement: Judgement, axis: str) -> Drawing | None:
    """Draw the validation NLL of every method while it trains.

    Args:
        axis: "update" or "seconds".
    """
    lines = {
        method.name: [
            (_costs(judgement, curve, axis), [math.nan if v is None else v for v in curve.nll])
            for curve in judgement.curves
            if curve.method == method.name and len(curve.update) > 1
        ]
        for method in judgement.methods
    }
    if not any(lines.values()):
        return None

    others = [name for name in judgement.others() if lines.get(name)]
    pairs = [[judgement.baseline, name] for name in others if lines.get(judgement.baseline)]
    groups = pairs if len(lines) > TOGETHER and pairs else [list(lines)]
    columns = min(len(groups), 2)
    rows = math.ceil(len(groups) / columns)

    def paint(figure: Any) -> None:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        panels = list(grid.flat)
        words = {"update": "update", "seconds": "seconds of training"}
        shown = []
        for place, (panel, group) in enumerate(zip(panels, groups, strict=False)):
            for name in group:
                if lines[name]:
                    shown.append(_band(panel, name, list(lines).index(name), _common(lines[name])))
            panel.tick_params(labelbottom=True)
            if place + columns >= len(groups):
                panel.set_xlabel(words[axis])
            if place % columns == 0:
                panel.set_ylabel("validation NLL")
            if len(groups) > 1:
                panel.set_title(short(group[-1]), fontweight="normal", loc="left")
        for panel in panels[len(groups) :]:
            panel.set_axis_off()
        _zoom(panels[0], np.concatenate(shown))
        figure.suptitle("Convergence", fontweight="bold")
        legend(figure, *panels)

    beside = "Each panel: a method and the baseline. " if groups is pairs else ""
    caption = (
        f"Validation NLL while training (lower is better). {beside}Line: mean over seeds; band: "
        "from the lowest to the highest seed. The first third may lie above the drawing."
    )
    name = f"convergence-by-{axis}"
    label = f"Validation NLL by {axis} for {', '.join(lines)}"
    height = 1.2 + 1.7 * rows + 0.2 * math.ceil(len(lines) / 2)
    return Drawing(name, draw(paint, name=name, label=label, height=height), caption)


def _band(axes: Any, name: str, index: int, curves: tuple[Any, Any]) -> Any:
    """Draw the mean and the range of a method's seeds; return the last two thirds of the range."""
    x, values = curves
    style = series(index)
    low, high = values.min(axis=0), values.max(axis=0)
    axes.plot(x, values.mean(axis=0), label=short(name), **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.18, lw=0)
    late = x >= x[-1] / 3
    return np.concatenate([low[late], high[late]])


def _costs(judgement: Judgement, curve: Curve, axis: str) -> Sequence[float]:
    if axis == "seconds":
        return judgement.clock.curves[curve.method][curve.seed]
    return curve.update


def _common(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[Any, Any]:
    """Return x [N] and values [seeds, N] on one grid, as far as the shortest curve goes."""
    if len({tuple(x) for x, _ in curves}) == 1:
        return np.asarray(curves[0][0], dtype=float), np.array([y for _, y in curves])
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.linspace(start, end, max(len(x) for x, _ in curves))
    return grid, np.array([np.interp(grid, x, y) for x, y in curves])


def _zoom(axes: Any, values: Any) -> None:
    """Show the range of these values, with a little room."""
    finite = values[np.isfinite(values)]
    if finite.size:
        low, high = float(finite.min()), float(finite.max())
        room = 0.08 * (high - low or 1.0)
        axes.set_ylim(low - room, high + room)


def forest(judgement: Judgement, measure: Measure) -> Drawing | None:
    """Draw the paired differences to the baseline with their intervals."""
    differences = [judgement.difference(name, measure.name) for name in judgement.others()]
    known = [(d, d.estimate) for d in differences if d is not None and d.estimate is not None]
    if not known:
        return None
    colors = {BETTER: GREEN, WORSE: RED}

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=INK, lw=1)
        for line, (d, estimate) in enumerate(known):
            color = colors.get(d.verdict, INK)
            if estimate.low is not None:
                axes.plot([estimate.low, estimate.high], [line, line], color=color, lw=2)
            claim = d.verdict in colors
            axes.plot(estimate.value, line, "o", mec=color, mfc=color if claim else "none", ms=6)
            text = digits(measure, estimate.value, signed=True)
            axes.text(1.02, line, text, transform=axes.get_yaxis_transform(), va="center")
        axes.set_yticks(range(len(known)), [short(d.method) for d, _ in known])
        axes.set_ylim(len(known) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        side = "right" if measure.higher_is_better else "left"
        axes.set(
            xlabel=f"{measure.label} minus {short(judgement.baseline)} (better: {side})",
            title=f"Paired differences: {measure.label}",
        )

    claims = "Filled: a claim; hollow: none." if judgement.claims else ""
    if all(estimate.low is None for _, estimate in known):
        caption = "One seed, so there are no intervals."
    else:
        caption = f"Mean over seeds and 95 % interval over seeds, paired by seed. {claims}".rstrip()
    name = f"differences-{measure.name.replace(' ', '-')}"
    label = f"Paired differences in {measure.label} to {judgement.baseline}"
    height = 1.1 + 0.42 * len(known)
    return Drawing(name, draw(paint, name=name, label=label, height=height), caption)


def parameters(judgement: Judgement) -> Drawing:
    """Draw the score against the number of trainable parameters."""
    most = max(method.parameters for method in judgement.methods)
    unit, word = (1e6, "millions") if most >= 1e6 else (1e3, "thousands")
    cost = {method.name: method.parameters / unit for method in judgement.methods}
    return _scatter(judgement, cost, "parameters", f"trainable parameters, {word}")


def score_by_seconds(judgement: Judgement) -> Drawing:
    """Draw the score against the seconds of training."""
    cost = {name: fmean(seeds.values()) for name, seeds in judgement.clock.seconds.items()}
    return _scatter(judgement, cost, "seconds", "seconds of training")


def _scatter(judgement: Judgement, cost: Mapping[str, float], name: str, xlabel: str) -> Drawing:
    nll = judgement.measures[0]
    label = "test NLL" if judgement.seeds else nll.label

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for index, method in enumerate(judgement.methods):
            score = judgement.score(method.name, nll.name)
            if score is None or score.value is None:
                continue
            style = series(index) | {"linestyle": ""}
            values = [value for value in score.by_seed.values() if value is not None]
            x = cost[method.name]
            axes.plot([x, x], [min(values), max(values)], color=style["color"], lw=1.2)
            axes.plot(x, score.value, label=short(method.name), ms=7, **style)
        axes.ticklabel_format(useOffset=False)
        axes.margins(0.12)
        axes.set(xlabel=xlabel, ylabel=label, title=f"{label[0].upper()}{label[1:]} against {name}")
        legend(figure, axes)

    caption = "Mean over seeds (lower is better); line: from the lowest to the highest seed."
    key = f"score-by-{name}"
    height = 2.9 + 0.2 * math.ceil(len(judgement.methods) / 2)
    svg = draw(paint, name=key, label=f"{label} against {xlabel}", height=height)
    return Drawing(key, svg, caption)


def rates(judgement: Judgement) -> Drawing | None:
    """Draw the validation NLL of tuning against the learning rate."""
    best: dict[str, dict[float, float]] = {}
    rate_of = {(t.method, tuple(t.settings.items())): t.rate for t in judgement.trials}
    for key, nlls in tried(judgement).items():
        line, rate = best.setdefault(key[0], {}), rate_of[key]
        line[rate] = min(fmean(nlls), line.get(rate, math.inf))
    if not best:
        return None
    chosen = {method.name: method.rate for method in judgement.methods}

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.set_xscale("log")
        shown = []
        for index, (method, line) in enumerate(best.items()):
            x = sorted(line)
            y = [line[rate] if math.isfinite(line[rate]) else math.nan for rate in x]
            style = series(index)
            axes.plot(x, y, label=short(method), **style)
            rate = chosen.get(method)
            if rate in line:
                axes.plot(rate, line[rate], "o", ms=11, mfc="none", mec=style["color"], mew=1.4)
            shown += [value for value in y if math.isfinite(value)]
        ticks = sorted({rate for line in best.values() for rate in line})
        axes.set_xticks(ticks, [f"{rate:.0e}".replace("e-0", "e-") for rate in ticks])
        axes.minorticks_off()
        axes.set(xlabel="learning rate", ylabel="validation NLL", title="Learning rates")
        legend(figure, axes)

    caption = (
        "Validation NLL of tuning, the mean over tuning seeds and the best over other tuned "
        "settings; a ring marks the rate that was chosen. Runs that diverged are left out."
    )
    height = 2.9 + 0.2 * math.ceil(len(best) / 2)
    svg = draw(paint, name="rates", label="Validation NLL by learning rate", height=height)
    return Drawing("rates", svg, caption)


def heat_map(judgement: Judgement, measure: Measure) -> Drawing | None:
    """Draw each method's score on each task, coloured by the difference to the baseline."""
    parts = _parts(judgement, measure)
    names = [method.name for method in judgement.methods]
    if len(parts) < 2:
        return None
    changes = {
        (name, part): d.estimate.value
        for name in judgement.others()
        for part in parts
        if (d := judgement.difference(name, measure.name, *part)) and d.estimate
    }
    largest = max(map(abs, changes.values()), default=0.0)
    strongest = f", the strongest colour a difference of {digits(measure, largest)}" * bool(largest)

    def paint(figure: Any) -> None:
        from matplotlib.patches import Rectangle

        axes = figure.subplots()
        for column, name in enumerate(names):
            for line, part in enumerate(parts):
                change = changes.get((name, part))
                if change:
                    good = (change > 0) == measure.higher_is_better
                    axes.add_patch(Rectangle(
                        (column - 0.48, line - 0.46), 0.96, 0.92, lw=0,
                        facecolor=GREEN if good else RED, alpha=0.08 + 0.5 * abs(change) / largest,
                    ))  # fmt: skip
                score = judgement.score(name, measure.name, *part)
                text = digits(measure, score.value if score else None)
                axes.text(column, line, text, ha="center", va="center", fontsize=8.5)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(len(parts) - 0.5, -0.5)
        axes.set_xticks(
            range(len(names)), [short(name, 16) for name in names], rotation=30, ha="left"
        )
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(parts)), [" ".join(filter(None, part)) for part in parts])
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title(f"{measure.label} by {'task' if parts[0][1] == '' else 'group'}")

    caption = (
        f"Numbers: {measure.label}, the mean over seeds. Colour: the difference to "
        f"{judgement.baseline}; green is better, orange worse{strongest}. No claims are made of "
        "single tasks."
    )
    name = f"tasks-{measure.name.replace(' ', '-')}"
    width = 1.6 + 0.72 * len(names)
    height = 1.1 + 0.26 * len(parts)
    label = f"{measure.label} of each method on each task"
    svg = draw(paint, name=name, label=label, height=height, width=max(width, WIDTH))
    return Drawing(name, svg, caption, wide=True)


def _parts(judgement: Judgement, measure: Measure) -> list[tuple[str, str]]:
    """Return the tasks, or the groups if there is a single task."""
    parts = dict.fromkeys((s.task, s.group) for s in judgement.scores if s.measure == measure.name)
    tasks = [part for part in parts if part[0] and not part[1]]
    return tasks if len(tasks) > 1 else [part for part in parts if part[1]]
