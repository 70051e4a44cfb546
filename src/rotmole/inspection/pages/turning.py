"""Figures of rotation: angles by layer and task, planes, and what two experts reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rotmole.drawing import FAINT, INK, legend, series, short
from rotmole.inspection.inspection import ALL, Angles, Inspection, Layer
from rotmole.inspection.pages import sheets
from rotmole.inspection.pages.plot import MARKERS, Plot, first_upper, marked, mean, ticks
from rotmole.inspection.pages.sheets import Cell, Sheet, by_depth, name_of, parts_of, tasks_of

PANELS = 8
"""Tasks that a figure has room for; its table has all."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Turned:
    """The expert whose angles are drawn: the one that turns most, in the module that does.

    Attributes:
        module: name of the module.
        expert: number of the expert.
        angles: block -> task -> its counts by angle [N].
        edges: of the bins [N + 1].
    """

    module: str
    expert: int
    angles: dict[str, dict[str, Any]]
    edges: Any

    @property
    def name(self) -> str:
        """What it is called."""
        return f"expert {self.expert} of {self.module}"


def most_turned(inspection: Inspection) -> Turned | None:
    """Return the angles of the expert whose mean |angle| over all layers is largest."""
    layers = [layer for layer in inspection.layers if _angles(layer, ALL) is not None]
    if not layers:
        return None
    totals: dict[tuple[str, int], list[float]] = {}
    for layer in layers:
        for expert, size in enumerate(getattr(_angles(layer, ALL), "mean", ())):
            totals.setdefault((layer.module, expert), []).append(size or 0.0)
    module, expert = max(totals, key=lambda key: float(np.mean(totals[key])))
    kept = [x for x in layers if x.module == module and expert < x.num_experts]
    angles: dict[str, dict[str, Any]] = {}
    edges = None
    for name, group in by_depth(kept).items():
        for part, keys in parts_of(inspection).items():
            for found in (_angles(layer, key) for layer in group for key in keys):
                if found is not None:
                    edges = np.asarray(found.edges)
                    counts = np.asarray(found.counts[expert], dtype=float)
                    parts = angles.setdefault(name, {})
                    parts[part] = parts.get(part, 0) + counts
    return Turned(module, expert, angles, edges) if angles else None


def _angles(layer: Layer, task: str) -> Angles | None:
    return layer.usage[task].angles if task in layer.usage else None


def quantiles(edges: Any, counts: Any) -> list[float]:
    """Return the QUANTILES of a histogram; NaN if it is empty.

    >>> quantiles([0, 1, 2], [0, 10])
    [1.05, 1.25, 1.5, 1.75, 1.95]
    """
    below = np.concatenate([[0.0], np.cumsum(counts)])
    if below[-1] == 0:
        return [math.nan] * len(QUANTILES)
    places = np.interp(np.array(QUANTILES) * below[-1], below, edges)
    return [round(float(place), 6) for place in places]


def angles_by_layer(inspection: Inspection) -> Plot | None:
    """Draw how an expert's angles are distributed in each layer, task by task (figure 4)."""
    turned = most_turned(inspection)
    if turned is None:
        return None
    tasks, names = list(parts_of(inspection)), list(turned.angles)
    nothing = np.zeros(len(turned.edges) - 1)
    spreads = {
        task: [quantiles(turned.edges, turned.angles[n].get(task, nothing)) for n in names]
        for task in tasks
    }
    shown = tasks[:PANELS]
    columns, rows = min(2, len(shown)), math.ceil(len(shown) / 2)

    def paint(figure: Any) -> None:
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
        for panel in panels[len(shown) :]:
            panel.set_visible(False)
        for index, (axes, task) in enumerate(zip(panels, shown, strict=False)):
            color, x, q = series(index)["color"], range(len(names)), np.array(spreads[task]).T
            axes.fill_between(x, q[0], q[4], color=color, alpha=0.18, lw=0)
            axes.fill_between(x, q[1], q[3], color=color, alpha=0.35, lw=0)
            axes.plot(x, q[2], color=color, marker="o", ms=3, markevery=_dots(q[2]))
            axes.axhline(0, color=FAINT, lw=1)
            axes.set_title(short(task))
            ticks(axes, names, 10 // columns)
        figure.supylabel("angle (radians)", fontsize=9)
        figure.supxlabel("layer", fontsize=9)

    lines = tuple(
        (Cell(name), *(Cell(_spread(spreads[task][place])) for task in tasks))
        for place, name in enumerate(names)
    )
    caption = f"Median angle of {turned.name} in radians, in brackets 5 % and 95 %"
    return Plot(
        "angles-by-layer",
        f"Rotation angles of {turned.name} by layer and task",
        f"{first_upper(turned.name)} turns most. Line: median angle of the tokens that selected "
        "it; bands: 25 to 75 % and 5 to 95 % of them. Bands that differ between tasks are what a "
        "rotation gate is for; a flat line at zero is a rotation that costs parameters and does "
        "nothing: see the effect of rotation below.",
        Sheet(caption, ("layer", *tasks), lines),
        paint,
        height=0.7 + 1.9 * rows,
    )


def _dots(values: Any) -> list[int]:
    """Return which points of a line get a dot: all of a few, of many those without neighbours."""
    known = np.pad(np.isfinite(values), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    return list(range(len(values))) if len(values) <= MARKERS else np.flatnonzero(alone).tolist()


def angle_histogram(inspection: Inspection) -> Plot | None:
    """Draw the histogram of an expert's angles by task, in the layer in which tasks differ most."""
    turned = most_turned(inspection)
    if turned is None:
        return None
    tasks = list(tasks_of(inspection))
    layers = {
        name: {task: counts for task, counts in of_tasks.items() if task in tasks}
        for name, of_tasks in turned.angles.items()
    }
    name = max(layers, key=lambda each: _difference(layers[each], turned.edges))
    shares = {task: counts / max(counts.sum(), 1) for task, counts in layers[name].items()}
    used = np.flatnonzero(sum(shares.values()))
    low, high = (used[0], used[-1]) if len(used) else (0, len(turned.edges) - 2)
    edges = turned.edges[low : high + 2]
    shown = {task: share[low : high + 1] for task, share in shares.items()}

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for index, (task, share) in enumerate(list(shown.items())[:PANELS]):
            color, dashes = series(index)["color"], ("-", "--", ":", "-.")[index % 4]
            axes.stairs(100 * share, edges, color=color, ls=dashes, lw=1.6, label=short(task))
        axes.axvline(0, color=FAINT, lw=1)
        axes.set(xlabel="angle (radians)", ylabel="share of choices (%)", ylim=(0, None))
        legend(figure, axes)

    lines = tuple(
        (
            Cell(f"{edges[place]:+.2f} to {edges[place + 1]:+.2f}"),
            *sheets.shares(share[place] for share in shown.values()),
        )
        for place in range(len(edges) - 1)
    )
    where = f"{turned.name}, layer {name}"
    return Plot(
        "angles",
        f"Rotation angles of {where}, by task",
        "The layer in which the tasks' angles of this expert differ most. Curves that lie on one "
        "another say that the angle does not know the task; a single narrow peak away from zero is "
        "a fixed rotation, which A and B could learn without a gate.",
        Sheet(f"Share of choices by angle in radians, {where}", ("angle", *shown),
              lines),
        paint,
        height=3.1 + 0.2 * math.ceil(len(shown) / 2),
    )  # fmt: skip


def _difference(tasks: Mapping[str, Any], edges: Any) -> float:
    """Return how far the tasks' median angles are apart; of one task, how wide its angles are."""
    spreads = [quantiles(edges, counts) for counts in tasks.values() if counts.sum()]
    if not spreads:
        return -1.0
    if len(spreads) == 1:
        return spreads[0][-1] - spreads[0][0]
    middles = [line[2] for line in spreads]
    return max(middles) - min(middles)


def planes(inspection: Inspection) -> Plot | None:
    """Draw how much of a rotation is the same for all tokens: its angle, and its plane."""
    groups = by_depth(x for x in inspection.layers if _angles(x, ALL) is not None)
    if not groups:
        return None

    def means(read: Callable[[Angles], Sequence[float | None] | None]) -> list[float]:
        return [
            mean([v for layer in group for v in read(layer.usage[ALL].angles) or ()])  # type: ignore[arg-type] # only layers with angles
            for group in groups.values()
        ]

    angle, resultant = means(lambda a: a.mean), means(lambda a: a.resultant)
    plane = means(lambda a: a.plane)
    first = next(iter(groups.values()))[0].usage[ALL].angles
    limits = list(first.turned) if first is not None else []
    beyond = [means(lambda a, limit=limit: a.turned[limit]) for limit in limits]  # type: ignore[misc]
    names = list(groups)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for index, (label, values) in enumerate([("angle", resultant), ("plane", plane)]):
            if np.isfinite(values).any():
                axes.plot(range(len(names)), values, label=label, **marked(index, len(names)))
        axes.set(ylim=(-0.02, 1.05), xlabel="layer", ylabel="likeness over tokens (0 to 1)")
        ticks(axes, names)
        legend(figure, axes)

    lines = tuple(
        (
            Cell(name), Cell(sheets.number(angle[place], 3)),
            *sheets.shares(values[place] for values in beyond),
            *sheets.numbers((resultant[place], plane[place]), 1.0),
        )
        for place, name in enumerate(names)
    )  # fmt: skip
    head = ("layer", "mean angle", *(f"> {limit}" for limit in limits), "angle", "plane")
    return Plot(
        "planes",
        "How alike angles and planes of rotation are",
        "1: every token is turned by the same angle, or in the same plane. Angles spread evenly "
        "are at 0, planes at random at 2 / rank. If both are near 1 the rotation is a fixed one, "
        "which A and B could learn: rotation none does as well.",
        Sheet("Mean over experts and modules: |angle| in radians, share of choices turned by more, "
              "likeness of angles and of planes", head, lines),
        paint,
        height=3.1,
    )  # fmt: skip


def reach(inspection: Inspection) -> Plot | None:
    """Draw the outputs that two experts reach with scaling, and with rotation too (figure 2)."""
    known = [x for x in inspection.layers if x.experts is not None and x.experts.reach is not None]
    if not known:
        return None
    layer = max(known, key=lambda x: x.effects[ALL].rotation_off or 0 if ALL in x.effects else 0)
    assert layer.experts is not None
    pair = layer.experts.reach
    assert pair is not None
    scaled, turned = outline(pair.scaled), outline(pair.turned)
    first, second = pair.experts

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for index, (border, label) in enumerate(
            [(turned, "scaling and rotation"), (scaled, "scaling alone")]
        ):
            style = series(1 - index)
            closed = np.concatenate([border, border[:1]])
            axes.fill(*border.T, color=style["color"], alpha=0.22, lw=0)
            axes.plot(*closed.T, color=style["color"], ls=style["linestyle"], lw=1.4, label=label)
        for expert, mark, plain, moved in zip(
            pair.experts, "oD", pair.outputs, pair.actual, strict=True
        ):
            arrow = {"color": INK, "marker": mark, "markevery": [1]}
            label = f"expert {expert}"
            axes.plot(*_from_zero(plain), lw=1.4, label=f"{label}, not turned", **arrow)
            moved_to = {"lw": 1.2, "ls": ":", "mfc": "none", "label": f"{label}, as turned"}
            axes.plot(*_from_zero(moved), **moved_to, **arrow)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set(xlabel=f"along expert {first}'s output", ylabel=f"across, towards expert {second}")
        legend(figure, axes)

    points = [
        (f"expert {expert}, {words}", point)
        for words, both in (("not turned", pair.outputs), ("as turned", pair.actual))
        for expert, point in zip(pair.experts, both, strict=True)
    ]
    lines = [(Cell(name), *sheets.numbers(point, digits=3), Cell("")) for name, point in points]
    for name, border in (("scaling alone", scaled), ("scaling and rotation", turned)):
        lines.append((Cell(name), Cell(""), Cell(""), Cell(f"{area(border):.3g}")))
    token = f" for the token {sheets.shown(pair.token)!r}" if pair.token else ""
    return Plot(
        "reach",
        f"Outputs that experts {first} and {second} of layer {name_of(layer)} reach",
        f"In the plane of the two experts' outputs{token}, in the layer in which rotation changes "
        "most. Weights reach the inner area; with any angle in the token's plane of rotation, the "
        "outer one. Dotted lines that stay in the inner area say that rotation buys little.",
        Sheet("Outputs in this plane, and the areas that are reached",
              ("", "along", "across", "area"), tuple(lines)),
        paint,
        height=4.6,
    )  # fmt: skip


def _from_zero(point: tuple[float, float]) -> tuple[list[float], list[float]]:
    return [0, point[0]], [0, point[1]]


def outline(points: Sequence[tuple[float, float]]) -> Any:
    """Return the corners [N, 2] of the area that points fill; of points on one line its ends."""
    from scipy.spatial import ConvexHull, QhullError

    every = np.asarray(points, dtype=float)
    try:
        return every[ConvexHull(every).vertices]
    except QhullError:
        along = every - every.mean(axis=0)
        axis = np.linalg.svd(along, full_matrices=False)[2][0]
        places = along @ axis
        return every[[int(places.argmin()), int(places.argmax())]]


def area(border: Any) -> float:
    """Return the area of a polygon [N, 2].

    >>> area(np.array([[0, 0], [2, 0], [2, 1], [0, 1]]))
    2.0
    """
    x, y = np.asarray(border, dtype=float).T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def _spread(line: Sequence[float]) -> str:
    if math.isnan(line[2]):
        return "-"
    return f"{line[2]:+.2f} [{line[0]:+.2f}, {line[4]:+.2f}]"
