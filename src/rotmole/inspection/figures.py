"""The figures of a report: each is drawn, has its numbers as a table, and says how to act on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rotmole.drawing import FAINT, INK, WIDTH, draw, legend, pdf, series, short, standalone
from rotmole.files import atomic_write_bytes, atomic_write_text, make_folder
from rotmole.inspection import sheets
from rotmole.inspection.inspection import ALL, Angles, Effects, Inspection, Layer
from rotmole.inspection.sheets import Cell, Sheet, by_depth, name_of, tasks_of

PANELS = 6
"""Tasks that a figure has room for; its table has all."""
MARKED = 24
"""Points of a line up to which each gets a marker."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
        name: of its file, without ending.
        title: above it.
        caption: how to read it and how to act on it.
        sheet: the same numbers.
        paint: draws it on an empty matplotlib figure.
        height, width: inches.
    """

    name: str
    title: str
    caption: str
    sheet: Sheet
    paint: Callable[[Any], None]
    height: float = 2.9
    width: float = WIDTH

    @property
    def svg(self) -> str:
        """The figure for a page."""
        return draw(
            self.paint, name=self.name, label=self.title, height=self.height, width=self.width,
            description=f"{self.caption} The table after the figure has its numbers.",
        )  # fmt: skip

    def write(self, folder: Path) -> list[Path]:
        """Write the figure as SVG and as PDF."""
        place = make_folder(folder)
        return [
            atomic_write_text(place / f"{self.name}.svg", standalone(self.svg) + "\n"),
            atomic_write_bytes(
                place / f"{self.name}.pdf", pdf(self.paint, height=self.height, width=self.width)
            ),
        ]


def plots(inspection: Inspection) -> list[Plot]:
    """Return every figure that has data."""
    found = [
        angles_by_layer(inspection), angle_histogram(inspection), planes(inspection),
        reach(inspection), similarity(inspection), static_share(inspection), effects(inspection),
    ]  # fmt: skip
    return [plot for plot in found if plot is not None]


# ---------------------------------------------------------------- rotation


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
        for expert, mean in enumerate(getattr(_angles(layer, ALL), "mean", ())):
            totals.setdefault((layer.module, expert), []).append(mean or 0.0)
    module, expert = max(totals, key=lambda key: float(np.mean(totals[key])))
    kept = [x for x in layers if x.module == module and expert < x.num_experts]
    angles: dict[str, dict[str, Any]] = {}
    edges = None
    for name, group in by_depth(kept).items():
        for task in tasks_of(inspection):
            for found in (_angles(layer, task) for layer in group):
                if found is not None:
                    edges = np.asarray(found.edges)
                    counts = np.asarray(found.counts[expert], dtype=float)
                    tasks = angles.setdefault(name, {})
                    tasks[task] = tasks.get(task, 0) + counts
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
    tasks, names = tasks_of(inspection), list(turned.angles)
    nothing = np.zeros(len(turned.edges) - 1)
    found = {
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
            color, x, q = series(index)["color"], range(len(names)), np.array(found[task]).T
            axes.fill_between(x, q[0], q[4], color=color, alpha=0.18, lw=0)
            axes.fill_between(x, q[1], q[3], color=color, alpha=0.35, lw=0)
            axes.plot(x, q[2], **_marked(index, len(names)))
            axes.axhline(0, color=FAINT, lw=1)
            axes.set_title("all tokens" if task == ALL else short(task))
            _ticks(axes, names)
        figure.supylabel("angle (radians)", fontsize=9)
        figure.supxlabel("layer", fontsize=9)

    lines = tuple(
        (Cell(name), *(Cell(_spread(found[task][place])) for task in tasks))
        for place, name in enumerate(names)
    )
    caption = f"Median angle of {turned.name} in radians, in brackets 5 % and 95 %"
    return Plot(
        "angles-by-layer",
        f"Rotation angles of {turned.name} by layer and task",
        f"{_first_upper(turned.name)} turns most. Line: median angle of the tokens that selected "
        "it; bands: 25 to 75 % and 5 to 95 % of them. Bands that differ between tasks are what a "
        "rotation gate is for; a flat line at zero is a rotation that costs parameters and does "
        "nothing: see the effect of rotation below.",
        Sheet(caption, ("layer", *map(_task_name, tasks)), lines),
        paint,
        height=0.7 + 1.9 * rows,
    )


def angle_histogram(inspection: Inspection) -> Plot | None:
    """Draw the histogram of an expert's angles by task, in the layer in which tasks differ most."""
    turned = most_turned(inspection)
    if turned is None:
        return None
    name = max(turned.angles, key=lambda n: _difference(turned.angles[n], turned.edges))
    found = {task: counts / max(counts.sum(), 1) for task, counts in turned.angles[name].items()}
    used = np.flatnonzero(sum(found.values()))
    low, high = (used[0], used[-1]) if len(used) else (0, len(turned.edges) - 2)
    edges = turned.edges[low : high + 2]
    shown = {task: share[low : high + 1] for task, share in found.items()}

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for index, (task, share) in enumerate(list(shown.items())[:PANELS]):
            style = series(index)
            axes.stairs(
                100 * share, edges, color=style["color"], ls=style["linestyle"], lw=1.6,
                label=short(_task_name(task)),
            )  # fmt: skip
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
        Sheet(f"Share of choices by angle in radians, {where}", ("angle", *map(_task_name, shown)),
              lines),
        paint,
        height=3.1 + 0.2 * math.ceil(len(shown) / 2),
    )  # fmt: skip


def _difference(tasks: Mapping[str, Any], edges: Any) -> float:
    """Return how far the tasks' median angles are apart; of one task, how wide its angles are."""
    found = [quantiles(edges, counts) for counts in tasks.values() if counts.sum()]
    if not found:
        return -1.0
    if len(found) == 1:
        return found[0][-1] - found[0][0]
    middles = [line[2] for line in found]
    return max(middles) - min(middles)


def planes(inspection: Inspection) -> Plot | None:
    """Draw how much of a rotation is the same for all tokens: its angle, and its plane."""
    groups = by_depth(x for x in inspection.layers if _angles(x, ALL) is not None)
    if not groups:
        return None

    def means(read: Callable[[Angles], Sequence[float | None] | None]) -> list[float]:
        return [
            _mean([v for layer in group for v in read(layer.usage[ALL].angles) or ()])  # type: ignore[arg-type] # only layers with angles
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
                axes.plot(range(len(names)), values, label=label, **_marked(index, len(names)))
        axes.set(ylim=(-0.02, 1.05), xlabel="layer", ylabel="likeness over tokens (0 to 1)")
        _ticks(axes, names)
        legend(figure, axes)

    lines = tuple(
        (
            Cell(name), Cell(sheets.number(angle[place], 3)),
            *sheets.shares(values[place] for values in beyond),
            *sheets.numbers((resultant[place], plane[place]), 1.0),
        )
        for place, name in enumerate(names)
    )  # fmt: skip
    head = ("layer", "mean angle", *(f"beyond {limit}" for limit in limits), "angle", "plane")
    return Plot(
        "planes",
        "How alike angles and planes of rotation are",
        "1: every token is turned by the same angle (or in the same plane); 0: angles (or planes) "
        "are spread evenly. If both are near 1 the rotation is a fixed one, which A and B could "
        "learn: rotation none does as well.",
        Sheet("Mean over experts and modules: |angle| in radians, share of choices turned by more, "
              "likeness of angles and planes", head, lines),
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
    found = layer.experts.reach
    assert found is not None
    scaled, turned = outline(found.scaled), outline(found.turned)
    first, second = found.experts

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
            found.experts, "oD", found.outputs, found.actual, strict=True
        ):
            name = f"expert {expert}"
            axes.plot(
                [0, plain[0]],
                [0, plain[1]],
                color=INK,
                lw=1.4,
                marker=mark,
                markevery=[1],
                label=f"{name}, not turned",
            )
            axes.plot(
                [0, moved[0]],
                [0, moved[1]],
                color=INK,
                lw=1.2,
                ls=":",
                marker=mark,
                mfc="none",
                markevery=[1],
                label=f"{name}, as turned",
            )
        axes.set_aspect("equal", adjustable="datalim")
        axes.set(xlabel=f"along expert {first}'s output", ylabel=f"across, towards expert {second}")
        legend(figure, axes)

    points = [
        (f"expert {expert}, {words}", point)
        for words, both in (("not turned", found.outputs), ("as turned", found.actual))
        for expert, point in zip(found.experts, both, strict=True)
    ]
    lines = [(Cell(name), *sheets.numbers(point, digits=3), Cell("")) for name, point in points]
    for name, border in (("scaling alone", scaled), ("scaling and rotation", turned)):
        lines.append((Cell(name), Cell(""), Cell(""), Cell(sheets.number(area(border), 4))))
    token = f" for the token {sheets.shown(found.token)!r}" if found.token else ""
    return Plot(
        "reach",
        f"Outputs that experts {first} and {second} of layer {name_of(layer)} reach",
        f"In the plane of the two experts' outputs{token}, in the layer in which rotation changes "
        "most. Weights alone reach the inner area; with rotations too, the outer one. If what the "
        "adapter does (dotted) lies in the inner area for most layers, rotation buys little.",
        Sheet("Outputs in this plane, and the areas that are reached",
              ("", "along", "across", "area"), tuple(lines)),
        paint,
        height=4.6,
    )  # fmt: skip


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


# ---------------------------------------------------------------- experts and the mixture


def similarity(inspection: Inspection) -> Plot | None:
    """Draw how alike the experts of a layer are."""
    groups = by_depth(
        x for x in inspection.layers if x.experts is not None and len(x.experts.norm) > 1
    )
    if not groups:
        return None
    names = list(groups)

    def pairs(table: str) -> list[list[float]]:
        return [
            [abs(line[j]) for x in group for i, line in enumerate(getattr(x.experts, table))
             for j in range(i)]
            for group in groups.values()
        ]  # fmt: skip

    cosines = pairs("cosine")
    lines_drawn = {
        "two most alike": [max(values) for values in cosines],
        "mean of all pairs": [_mean(values) for values in cosines],
    }
    angles = [[_mean(values) for values in pairs(t)] for t in ("input_angle", "output_angle")]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for index, (label, values) in enumerate(lines_drawn.items()):
            axes.plot(range(len(names)), values, label=label, **_marked(index, len(names)))
        axes.set(ylim=(-0.02, 1.05), xlabel="layer", ylabel="|cosine| of two experts")
        _ticks(axes, names)
        legend(figure, axes)

    lines = tuple(
        (Cell(name), *sheets.numbers((values[n] for values in lines_drawn.values()), 1.0),
         *sheets.numbers(values[n] for values in angles))
        for n, name in enumerate(names)
    )  # fmt: skip
    return Plot(
        "similarity",
        "How alike the experts are",
        "Cosine between the maps A B of two experts of a layer, over all its modules. Two experts "
        "at 1 are one expert: prune one of them, or train with fewer experts of a higher rank.",
        Sheet("Cosines between experts, and mean principal angles in radians between what they "
              "read and what they write",
              ("layer", *lines_drawn, "angle of inputs", "angle of outputs"), lines),
        paint,
        height=3.1,
    )  # fmt: skip


def static_share(inspection: Inspection) -> Plot | None:
    """Draw how much of what each layer adds a static LoRA does as well, by rank."""
    groups = by_depth(layer for layer in inspection.layers if layer.static is not None)
    if not groups:
        return None
    ranks = next(layer.static.ranks for group in groups.values() for layer in group if layer.static)
    names = list(groups)
    held = [[_weighed(group, rank) for group in groups.values()] for rank in ranks]
    linear = [_weighed(group, None) for group in groups.values()]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for index, (rank, values) in enumerate(zip(ranks, held, strict=True)):
            label = f"rank {rank}"
            axes.plot(
                range(len(names)), 100 * np.array(values), label=label, **_marked(index, len(names))
            )
        axes.plot(
            range(len(names)), 100 * np.array(linear), color=INK, ls="--", lw=1.2, label="any rank"
        )
        low = min(min(min(line) for line in held), min(linear))
        axes.set(xlabel="layer", ylabel="share (%)", ylim=(min(0, max(100 * low, -20)) - 2, 103))
        _ticks(axes, names)
        legend(figure, axes, columns=3)

    lines = [
        (Cell(name), *sheets.shares([*(line[n] for line in held), linear[n]]))
        for n, name in enumerate(names)
    ]
    whole = inspection.static
    if whole is not None:
        total = zip(whole.ranks, whole.held_out, strict=True)
        known = dict(total)
        lines.append((Cell("all"), *sheets.shares([*map(known.get, ranks), whole.linear[1]])))
    return Plot(
        "static-share",
        "Share of what the adapter adds that a static LoRA does as well",
        "Measured on rows that the LoRA was not fitted on. What no rank reaches is what only a "
        "mixture does. Near 100 % at a small rank, rotmole export --lora makes that LoRA, which "
        "runs everywhere and costs less.",
        Sheet("Share of the added power, on held-out rows",
              ("layer", *(f"rank {rank}" for rank in ranks), "any rank"), tuple(lines)),
        paint,
        height=3.3,
    )  # fmt: skip


def _weighed(layers: Sequence[Layer], rank: int | None) -> float:
    """Return the held-out share at a rank (None: any) over layers, weighed by what they add."""
    found = [layer.static for layer in layers if layer.static is not None]
    shares = [
        static.linear[1] if rank is None else dict(zip(static.ranks, static.held_out, strict=True))
        .get(rank, math.nan)
        for static in found
    ]  # fmt: skip
    power = [static.power[1] for static in found]
    return float(np.average(shares, weights=power)) if sum(power) else math.nan


def effects(inspection: Inspection) -> Plot | None:
    """Draw what changes in each layer if the rotation is off, or the routing uniform."""
    groups = by_depth(layer for layer in inspection.layers if ALL in layer.effects)
    names = list(groups)

    def means(read: Callable[[Effects], float | None]) -> list[float]:
        return [_mean([read(layer.effects[ALL]) for layer in group]) for group in groups.values()]

    drawn = {
        "rotation off": means(lambda e: e.rotation_off),
        "routing uniform": means(lambda e: e.uniform),
    }
    drawn = {label: values for label, values in drawn.items() if np.isfinite(values).any()}
    if not drawn:
        return None
    added = means(lambda e: e.added)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for index, (label, values) in enumerate(drawn.items()):
            axes.plot(
                range(len(names)), 100 * np.array(values), label=label, **_marked(index, len(names))
            )
        axes.set(xlabel="layer", ylabel="change (% of what the adapter adds)", ylim=(0, None))
        _ticks(axes, names)
        legend(figure, axes)

    lines = tuple(
        (Cell(name), Cell(sheets.percent(added[n])),
         *sheets.shares(values[n] for values in drawn.values()))
        for n, name in enumerate(names)
    )  # fmt: skip
    return Plot(
        "effects",
        "What rotation and routing change in a layer's output",
        "Change of a layer's output if its rotation were off, or if every expert had the same "
        "weight, relative to what the adapter adds there. A line near zero says that this gate "
        "could be left out; the likelihood of the answers below says what that would cost.",
        Sheet("Mean over modules: what the adapter adds relative to the layer's output, and the "
              "change relative to what it adds", ("layer", "added", *drawn), lines),
        paint,
        height=3.1,
    )  # fmt: skip


def convergence(inspections: Sequence[Inspection]) -> list[Plot]:
    """Draw the losses of one or several runs while they trained (figures 3, 5, 6).

    Args:
        inspections: of the runs; those without curves are left out.

    Returns:
        A figure of the training loss, and one of the validation loss for each task.
    """
    runs = {x.source.target: x.source.curves for x in inspections if x.source.curves}
    tasks = list(dict.fromkeys(task for curves in runs.values() for task in curves))
    return [_curves(runs, task) for task in tasks if any(c.get(task) for c in runs.values())]


def _curves(runs: Mapping[str, Mapping[str, Any]], task: str) -> Plot:
    what = "training loss" if task == "" else "validation loss"
    found = {name: np.array(c[task], dtype=float) for name, c in runs.items() if c.get(task)}

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for index, (name, points) in enumerate(found.items()):
            axes.plot(*points.T, label=short(name, 30), **_marked(index, len(points)))
        axes.set(xlabel="update", ylabel=f"{what} (nats)")
        legend(figure, axes, columns=1)

    words = f"{_first_upper(what)}" if task in ("", ALL) else f"{_first_upper(what)}, task {task}"
    updates = sorted({x for points in found.values() for x, _ in points.tolist()})
    step = math.ceil(len(updates) / 20)
    kept = sorted({*updates[::step], *updates[-1:]})
    tables = {name: dict(points.tolist()) for name, points in found.items()}
    lines = tuple(
        (Cell(f"{update:g}"), *sheets.numbers((t.get(update) for t in tables.values()), digits=3))
        for update in kept
    )
    return Plot(
        "convergence-" + (task or "training"),
        words,
        f"{_first_upper(what)} by update, in nats (lower is better). If it still falls at the end, "
        "train longer before you judge the method.",
        Sheet(f"{words}, in nats", ("update", *found), lines),
        paint,
        height=2.9 + 0.2 * len(found),
    )


# ---------------------------------------------------------------- maps, for files alone


def maps(inspection: Inspection) -> list[Plot]:
    """Return the tables with shades as figures: usage by layer and task, similarity."""
    found = [
        (f"usage-{number}", sheet) for number, sheet in enumerate(sheets.usage_by_task(inspection))
    ]
    cosines = sheets.similarity(inspection)
    found += [("similarity-matrix", cosines)] if cosines is not None else []
    return [_map(name, sheet) for name, sheet in found]


def _map(name: str, sheet: Sheet) -> Plot:
    def paint(figure: Any) -> None:
        from matplotlib.patches import Rectangle

        axes = figure.subplots()
        color = series(0)["color"]
        for y, line in enumerate(sheet.lines):
            for x, cell in enumerate(line[1:]):
                alpha = 0.07 * cell.shade
                axes.add_patch(
                    Rectangle((x - 0.5, y - 0.5), 1, 1, lw=0, facecolor=color, alpha=alpha)
                )
                axes.text(x, y, cell.text, ha="center", va="center", fontsize=8)
        axes.set_xlim(-0.5, len(sheet.head) - 1.5)
        axes.set_ylim(len(sheet.lines) - 0.5, -0.5)
        axes.set_xticks(range(len(sheet.head) - 1), sheet.head[1:])
        axes.set_yticks(range(len(sheet.lines)), [line[0].text for line in sheet.lines])
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)

    width = max(WIDTH, 1.2 + 0.75 * (len(sheet.head) - 1))
    height = 0.6 + 0.24 * len(sheet.lines)
    return Plot(name, sheet.caption, f"{sheet.caption}.", sheet, paint, height, width)


# ---------------------------------------------------------------- what they share


def _marked(index: int, points: int) -> dict[str, Any]:
    """Return the style of a line, without markers if there are many points."""
    return series(index) | ({"marker": ""} if points > MARKED else {})


def _ticks(axes: Any, names: Sequence[str]) -> None:
    """Name the places of a horizontal axis, as many as there is room for."""
    step = max(1, math.ceil(len(names) / 10))
    long = max(map(len, names), default=0) > 5
    axes.set_xticks(
        range(0, len(names), step),
        [short(name, 14) for name in names[::step]],
        rotation=30 if long else 0,
        ha="right" if long else "center",
    )


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def _spread(line: Sequence[float]) -> str:
    if math.isnan(line[2]):
        return "-"
    return f"{line[2]:+.2f} [{line[0]:+.2f}, {line[4]:+.2f}]"


def _task_name(task: str) -> str:
    return "all tokens" if task == ALL else task


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]
