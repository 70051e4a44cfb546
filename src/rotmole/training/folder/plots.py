"""loss.svg: the training loss and the validation losses of a run."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = 3
"""Small plots of tasks in a row."""
_TRAINING, _VALIDATION = "#7f7f7f", "#1f4e9c"
_RESUMED = {"color": "#b15928", "lw": 0.9, "ls": ":"}
_KEPT = {"color": "#2e7d32", "lw": 1.2, "ls": "--"}


def loss_svg(
    rows: Sequence[Mapping[str, Any]],
    title: str,
    *,
    resumed: Sequence[int] = (),
    kept: int | None = None,
) -> str:
    """Draw the losses over the updates.

    Args:
        rows: the lines of metrics.jsonl.
        title: above the plot.
        resumed: updates that the run went on from.
        kept: the update that the result's weights are of.

    Returns:
        SVG text: training loss and validation loss of all rows; below, if there are several tasks,
        the validation loss of each in a plot of its own, all with one scale.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    curves = _curves(rows)
    tasks = [name for name in curves if name not in ("training", "validation")]
    tasks = tasks if len(tasks) > 1 else []
    lines = -(-len(tasks) // COLUMNS)
    figure = Figure(figsize=(8, 4 + 2.2 * lines), layout="constrained")
    grid = figure.add_gridspec(1 + lines, COLUMNS, height_ratios=[2.0, *[1.0] * lines])
    axes = figure.add_subplot(grid[0, :])
    steps = [row["step"] for row in rows]
    for name, color in (("training", _TRAINING), ("validation", _VALIDATION)):
        _draw(axes, curves.get(name, []), name, color)
    _mark(axes, resumed, kept)
    _arrange(axes, steps)
    axes.set(xlabel="update", ylabel="loss (nats per learnt token)")
    figure.suptitle(_short(title, 80), parse_math=False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False)
    first = None
    for number, name in enumerate(tasks):
        small = figure.add_subplot(grid[1 + number // COLUMNS, number % COLUMNS], sharey=first)
        first = first or small
        _draw(small, curves[name], name, _VALIDATION)
        _mark(small, resumed, kept)
        _arrange(small, steps)
        small.set_title(_short(f"validation: {name}", 28), fontsize="small", parse_math=False)
        small.tick_params(labelsize="small")
    buffer = io.BytesIO()
    # text stays text, so that a browser shows letters that matplotlib's own font lacks
    with rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue().decode("utf-8")


def _draw(axes: Any, points: Sequence[tuple[int, float]], name: str, color: str) -> None:
    if points:
        steps, values = zip(*points, strict=True)
        few = len(points) <= (1 if name == "training" else 40)
        axes.plot(steps, values, label=name, color=color, lw=1.5, marker="." if few else None)


def _mark(axes: Any, resumed: Sequence[int], kept: int | None) -> None:
    for number, step in enumerate(sorted(set(resumed))):
        axes.axvline(step, label="resumed" if number == 0 else None, **_RESUMED)
    if kept is not None:
        axes.axvline(kept, label=f"result: update {kept:,}", **_KEPT)


def _arrange(axes: Any, steps: Sequence[int]) -> None:
    """Whole updates from 0 to the last, with a little room."""
    from matplotlib.ticker import MaxNLocator

    last = max(steps, default=1)
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(alpha=0.3)


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if value is None:
                continue
            if key == "loss":
                curves.setdefault("training", []).append((row["step"], value))
            elif key == "eval_loss":
                curves.setdefault("validation", []).append((row["step"], value))
            elif key.startswith("eval_") and key.endswith("_loss"):
                task = key.removeprefix("eval_").removesuffix("_loss")
                curves.setdefault(task, []).append((row["step"], value))
    return curves
