"""The figures of a report: experts, static share, effects, losses; and which ones there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rotmole.drawing import INK, WIDTH, legend, series, short
from rotmole.inspection.inspection import ALL, Effects, Inspection, Layer
from rotmole.inspection.pages import sheets
from rotmole.inspection.pages.plot import Plot, file_names, first_upper, marked, mean, ticks
from rotmole.inspection.pages.sheets import Cell, Sheet, by_depth
from rotmole.inspection.pages.turning import angle_histogram, angles_by_layer, planes, reach


def plots(inspection: Inspection) -> list[Plot]:
    """Return every figure that has data."""
    drawn = [
        angles_by_layer(inspection), angle_histogram(inspection), planes(inspection),
        reach(inspection), similarity(inspection), static_share(inspection), effects(inspection),
    ]  # fmt: skip
    return [plot for plot in drawn if plot is not None]


def similarity(inspection: Inspection) -> Plot | None:
    """Draw how alike the experts of a layer are."""
    groups = by_depth(
        x for x in inspection.layers if x.experts is not None and len(x.experts.norm) > 1
    )
    if not groups:
        return None
    names = list(groups)

    def pairs(table: str) -> list[list[float]]:
        rows = [[getattr(layer.experts, table) for layer in group] for group in groups.values()]
        return [
            [
                abs(v)
                for each in group
                for i, line in enumerate(each)
                for v in line[:i]
                if v is not None
            ]
            for group in rows
        ]

    cosines = pairs("cosine")
    lines_drawn = {
        "most alike": [max(values) for values in cosines],
        "mean": [mean(values) for values in cosines],
    }
    angles = [[mean(values) for values in pairs(t)] for t in ("input_angle", "output_angle")]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for index, (label, values) in enumerate(lines_drawn.items()):
            axes.plot(range(len(names)), values, label=label, **marked(index, len(names)))
        axes.set(ylim=(-0.02, 1.05), xlabel="layer", ylabel="|cosine| of two experts")
        ticks(axes, names)
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
              ("layer", *lines_drawn, "inputs", "outputs"), lines),
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
                range(len(names)), 100 * np.array(values), label=label, **marked(index, len(names))
            )
        axes.plot(
            range(len(names)), 100 * np.array(linear), color=INK, ls="--", lw=1.2, label="any rank"
        )
        low = min(*(min(line) for line in held), *linear)
        axes.set(xlabel="layer", ylabel="share (%)", ylim=(min(0, max(100 * low, -20)) - 2, 103))
        ticks(axes, names)
        legend(figure, axes, columns=3)

    lines = [
        (Cell(name), *sheets.shares([*(line[n] for line in held), linear[n]]))
        for n, name in enumerate(names)
    ]
    whole = inspection.static
    if whole is not None:
        known = dict(zip(whole.ranks, whole.held_out, strict=True))
        total = sheets.shares([*map(known.get, ranks), whole.linear[1]])
        lines.insert(0, (Cell("all"), *total))
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
    measured = [layer.static for layer in layers if layer.static is not None]
    shares = [
        static.linear[1] if rank is None else dict(zip(static.ranks, static.held_out, strict=True))
        .get(rank, math.nan)
        for static in measured
    ]  # fmt: skip
    power = [static.power[1] for static in measured]
    return float(np.average(shares, weights=power)) if sum(power) else math.nan


def effects(inspection: Inspection) -> Plot | None:
    """Draw what changes in each layer if the rotation is off, or the routing uniform."""
    groups = by_depth(layer for layer in inspection.layers if ALL in layer.effects)
    names = list(groups)

    def means(read: Callable[[Effects], float | None]) -> list[float]:
        return [mean([read(layer.effects[ALL]) for layer in group]) for group in groups.values()]

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
                range(len(names)), 100 * np.array(values), label=label, **marked(index, len(names))
            )
        axes.set(xlabel="layer", ylabel="change (% of what the adapter adds)", ylim=(0, None))
        ticks(axes, names)
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
    shown = [task for task in tasks if task and any(c.get(task) for c in runs.values())]
    names = file_names("convergence", shown)
    drawn = [_curves(runs, task, name) for task, name in zip(shown, names, strict=True)]
    if any(curves.get("") for curves in runs.values()):
        drawn.insert(0, _curves(runs, "", "convergence-training"))
    return drawn


def _curves(runs: Mapping[str, Mapping[str, Any]], task: str, file: str) -> Plot:
    what = "training loss" if task == "" else "validation loss"
    curves = {name: np.array(c[task], dtype=float) for name, c in runs.items() if c.get(task)}

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for index, (name, points) in enumerate(curves.items()):
            axes.plot(*points.T, label=short(name, 30), **marked(index, len(points)))
        axes.set(xlabel="update", ylabel=f"{what} (nats)")
        legend(figure, axes, columns=1)

    words = f"{first_upper(what)}" if task in ("", ALL) else f"{first_upper(what)}, task {task}"
    updates = sorted({x for points in curves.values() for x, _ in points.tolist()})
    step = math.ceil(len(updates) / 20)
    kept = sorted({*updates[::step], *updates[-1:]})
    tables = {name: dict(points.tolist()) for name, points in curves.items()}
    lines = tuple(
        (Cell(f"{update:g}"), *sheets.numbers((t.get(update) for t in tables.values()), digits=3))
        for update in kept
    )
    return Plot(
        file,
        words,
        f"{first_upper(what)} by update, in nats (lower is better). If it still falls at the end, "
        "train longer before you judge the method.",
        Sheet(f"{words}, in nats", ("update", *curves), lines),
        paint,
        height=2.9 + 0.2 * len(curves),
    )


def maps(inspection: Inspection) -> list[Plot]:
    """Return the tables with shades as figures: usage by layer and task, similarity."""
    usage = sheets.usage_by_part(inspection)
    tables = list(zip(file_names("usage", list(usage)), usage.values(), strict=True))
    cosines = sheets.similarity(inspection)
    tables += [("similarity-matrix", cosines)] if cosines is not None else []
    return [_map(name, sheet) for name, sheet in tables]


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
