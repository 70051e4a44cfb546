"""loss.svg: the training loss and the validation losses of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any


def loss_svg(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Draw the losses over the updates.

    Args:
        rows: the lines of metrics.jsonl.
        title: above the plot.

    Returns:
        SVG text: training loss, validation loss of all rows, and, thin, of each task.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, points in _curves(rows).items():
        thin = name not in ("training", "validation")
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=name, lw=0.8 if thin else 1.8, marker="." if thin else None)
    axes.set(xlabel="update", ylabel="loss (nats per learnt token)", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue().decode("utf-8")


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
                curves.setdefault(f"validation: {task}", []).append((row["step"], value))
    return curves
