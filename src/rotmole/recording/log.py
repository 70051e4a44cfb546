"""The routing log: statistics by layer and task, as they are recorded, merged and stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from rotmole.errors import DataError
from rotmole.recording.statistics import (
    LayerStatistics,
    RotationStatistics,
    TaskStatistics,
    as_dict,
)

ALL = "all"
"""The task of tokens of which nobody said a task."""


@dataclass
class RoutingLog:
    """What one adapter's routers and rotations did in the forward passes of a recording.

    Attributes:
        adapter: its name.
        layers: path of the layer in the base model -> statistics, in the order of the model; a
            layer appears when it is first called.
        task: the task of the rows of the forward passes to come: a name for all, or one for each
            row (or packed sequence). None: what the batch's task_id says, and "all" without one.
    """

    adapter: str = "default"
    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    task: str | Sequence[str] | None = None

    @contextmanager
    def of(self, task: str | Sequence[str]) -> Iterator[RoutingLog]:
        """Count the forward passes of a block for a task, or each of their rows for its own.

        Args:
            task: a name, or one for each row of the batch (of generation too, whatever the number
                of beams), or for each packed sequence of it.

        >>> with RoutingLog().of(["de", "fr"]) as log:
        ...     log.task
        ['de', 'fr']
        """
        before, self.task = self.task, task
        try:
            yield self
        finally:
            self.task = before

    @property
    def tasks(self) -> list[str]:
        """Names of all tasks, in the order in which they came."""
        return list(dict.fromkeys(name for layer in self.layers.values() for name in layer.tasks))

    def clear(self) -> None:
        """Forget everything that was summed up."""
        self.layers.clear()

    def merge(self, other: RoutingLog) -> None:
        """Add what another log of the same adapter saw.

        Raises:
            DataError: the two logs are of adapters that differ in a layer's shape or settings.
        """
        for path, layer in other.layers.items():
            if path not in self.layers:
                self.layers[path] = layer
                continue
            mine = self.layers[path]
            for name in ("experts", "top_k", "selection", "rotation", "rank"):
                ours, theirs = getattr(mine, name), getattr(layer, name)
                if ours != theirs:
                    raise DataError(
                        f"two routing logs differ in {path}: {name} is {ours} in one and {theirs} "
                        "in the other; merge logs of one adapter alone"
                    )
            mine.merge(layer)

    def over_processes(self) -> RoutingLog:
        """Return the sum of the logs of all processes, each of which must call this.

        Without torch.distributed, or before it is initialised, it is the log itself.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, self.to_dict())
        total = RoutingLog(self.adapter)
        for part in parts:
            total.merge(RoutingLog.from_dict(part))
        return total

    def to_dict(self) -> dict[str, Any]:
        """Return the sums as what JSON can hold; the layers as in LayerStatistics.

        {"adapter": ..., "layers": {path: {"experts": E, ..., "tasks": {name: {"tokens": ...,
        "choices": [E], ..., "rotation": {"angles": [A], "histogram": [E][H], ...} or null}}}}}
        """
        return {"adapter": self.adapter, "layers": as_dict(self.layers)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RoutingLog:
        """Return the log that `to_dict` described."""
        layers = {path: _layer(layer) for path, layer in content["layers"].items()}
        return cls(content["adapter"], layers)


def _layer(content: Mapping[str, Any]) -> LayerStatistics:
    values = dict(content)
    planes, shared = values.pop("planes"), values.pop("shared")
    tasks = {name: _task(task) for name, task in values.pop("tasks").items()}
    return LayerStatistics(
        **values,
        tasks=tasks,
        planes_ERR=None if planes is None else torch.tensor(planes, dtype=torch.float64),
        shared=None if shared is None else _layer(shared),
    )


def _task(content: Mapping[str, Any]) -> TaskStatistics:
    experts, rotation = len(content["choices"]), content["rotation"]
    angles = None if rotation is None else tuple(rotation["angles"])
    task = TaskStatistics.empty(experts, angles=angles)
    _fill(task, content)
    if task.rotation is not None:
        _fill(task.rotation, rotation)
    return task


def _fill(statistics: TaskStatistics | RotationStatistics, content: Mapping[str, Any]) -> None:
    for entry in fields(statistics):
        value = getattr(statistics, entry.name)
        stored = content[entry.name.rpartition("_")[0] or entry.name]
        if isinstance(value, Tensor):
            setattr(statistics, entry.name, torch.tensor(stored, dtype=value.dtype))
        elif isinstance(value, int):
            setattr(statistics, entry.name, stored)
