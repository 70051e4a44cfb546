"""The losses of a run, from its log."""

from __future__ import annotations

from pathlib import Path

from rotmole.inspection.inspection import ALL
from rotmole.training.callbacks.metrics import read_metrics
from rotmole.training.folder.layout import METRICS

Curves = dict[str, tuple[tuple[float, float], ...]]


def curves_of(folder: Path) -> Curves:
    """Return training loss "", validation loss ALL, and that of each task, over the updates.

    {} if the folder has no metrics.jsonl.
    """
    file = folder / METRICS
    if not file.is_file():
        return {}
    points: dict[str, dict[float, float]] = {}
    for row in read_metrics(file):
        for name, value in row.items():
            task = _task(name)
            if task is not None and isinstance(value, int | float):
                points.setdefault(task, {})[row["step"]] = float(value)
    return {task: tuple(sorted(each.items())) for task, each in points.items()}


def _task(name: str) -> str | None:
    """Return whose loss a figure of the log is, None for another figure."""
    if name == "loss":
        return ""
    if name == "eval_loss":
        return ALL
    is_task = name.startswith("eval_") and name.endswith("_loss")
    return name.removeprefix("eval_").removesuffix("_loss") if is_task else None
