"""What was recorded of a layer's routing, as figures of an inspection."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from rotmole.inspection.inspection import ALL, Affinity, Angles, Known, Table, Usage
from rotmole.recording.statistics import (
    LayerStatistics,
    RotationStatistics,
    TaskStatistics,
    added,
    bin_edges,
)

GROUP = "/"
"""Between the names of a task and of its group: "units/de"."""


def usage_by_task(layer: LayerStatistics) -> dict[str, Usage]:
    """Return how the experts of a layer were used by each task, and by all of them."""
    plane_E = None if layer.plane_drift_E is None else _known(1 - layer.plane_drift_E)
    usage = {ALL: usage_of(layer.total(), plane_E)}
    if len(layer.tasks) > 1:
        usage |= {name: usage_of(task) for name, task in layer.tasks.items()}
    return usage


def usage_of(task: TaskStatistics, plane_E: Known | None = None) -> Usage:
    """Return the figures of sums over tokens."""
    return Usage(
        tokens=task.tokens,
        choices=tuple(task.choices_E.tolist()),
        share=_zeros(task.selection_share_E),
        part=_zeros(task.weight_share_E),
        weight=_known(task.mean_weight_E),
        top=_zeros(task.top_share_E),
        entropy=_or_none(task.mean_entropy),
        together=_table(task.pair_share_EE),
        angles=None if task.rotation is None else _angles(task.rotation, plane_E),
    )


def _angles(rotation: RotationStatistics, plane_E: Known | None) -> Angles:
    beyond_EA = rotation.beyond_share_EA
    return Angles(
        edges=tuple(bin_edges()),
        counts=tuple(map(tuple, rotation.histogram_EH.tolist())),
        mean=_known(rotation.mean_absolute_E),
        resultant=_known(rotation.resultant_E),
        direction=_known(rotation.direction_E),
        turned={f"{angle:g}": _known(beyond_EA[:, i]) for i, angle in enumerate(rotation.angles)},
        plane=plane_E,
    )


def affinities(layer: LayerStatistics) -> dict[str, Affinity]:
    """Return what tasks, and groups such as languages over all tasks, say about experts."""
    result = {}
    for part in ("task", "group"):
        merged: dict[str, TaskStatistics] = {}
        for name, task in layer.tasks.items():
            head, _, group = name.rpartition(GROUP)
            key = (head or name) if part == "task" else (group if head else "")
            if key:
                merged[key] = added(merged[key], task) if key in merged else task
        known = replace(layer, tasks=merged).mutual_information()
        if known is not None:
            result[part] = Affinity(known.value, known.chance, known.ceiling, known.limit)
    return result


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _known(values_E: Tensor) -> Known:
    return tuple(_or_none(value) for value in values_E.tolist())


def _zeros(values_E: Tensor) -> tuple[float, ...]:
    return tuple(values_E.nan_to_num(0.0).tolist())


def _table(values_EE: Tensor) -> Table:
    return tuple(map(tuple, values_EE.nan_to_num(0.0).tolist()))
