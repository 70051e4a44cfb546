"""Record what an adapter's routers and rotations do, in whatever forward passes are made."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotmole.errors import DataError
from rotmole.ops.mixture.dense import Turns
from rotmole.ops.rotation.table import ROTATIONS
from rotmole.recording.log import ALL, RoutingLog
from rotmole.recording.statistics import ANGLES, PLANE_RANK, LayerStatistics, TaskStatistics
from rotmole.recording.sums import Chosen, add_choices, add_planes, add_turns
from rotmole.recording.watch import Seen, adapter_to_watch, watch, watched_layers
from rotmole.tuner.batch.batch import Batch
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.layer import RotMoleLayer


@contextmanager
def record_routing(
    model: Any,
    adapter: str | None = None,
    *,
    tasks: Sequence[str] | None = None,
    angles: Sequence[float] = ANGLES,
    rotation: bool = True,
) -> Iterator[RoutingLog]:
    """Record the routing and the rotations of every forward pass in a block, as sums over tokens.

    Nothing is attached to the model before and after; a forward pass then costs what it costs
    without this function. Inside, each layer computes its routing and its angles again, and the
    results of the model stay bit for bit what they are. Memory does not grow with the tokens.

    Padding does not count, and the second run of a checkpointed block does not either. Angles are
    those of the input without dropout. Training and evaluation passes count alike, also those of
    accumulated micro-batches and of generation. Nothing is recorded inside torch.compile and
    torch.func.

    Args:
        model: with the adapter; any wrapper around it (DDP) will do.
        adapter: its name; None: the active one.
        tasks: names of the tasks 0, 1, ... of batches with `task_id` [rows]; the model takes that
            argument inside the block. Or say tasks by `log.of`.
        angles: in radians; how many choices are turned by more than each is counted.
        rotation: whether rotations are recorded; routing alone takes a fraction of the time.

    Yields:
        The log; its layers are up to date after each forward pass.

    Raises:
        ConfigError: several adapters are active and none is named, or there is none of that name.
        DataError: in a forward pass, if its rows do not fit the tasks given for them.
    """
    name = adapter_to_watch(model, adapter)
    log = RoutingLog(name)
    recorder = Recorder(log, tasks=tasks, angles=angles if rotation else None)
    recorder.make_room(watched_layers(model, name))
    with _taking_tasks(model, name, tasks), watch(model, name, recorder.observe):
        yield log
    if not recorder.calls:
        warnings.warn(
            f"nothing was recorded of adapter {name!r}: none of its layers was called outside of "
            "torch.compile and torch.func while the recording went on",
            stacklevel=3,
        )


@contextmanager
def _taking_tasks(model: Any, adapter: str, tasks: Sequence[str] | None) -> Iterator[None]:
    """Let the model take `task_id` in a block, as it does if a loss by task is on."""
    stacks = []
    if tasks is not None:
        for layer in watched_layers(model, adapter):
            stack = layer.rotmole_stack
            while stack.outer is not None:
                stack = stack.outer
            if not stack.takes_tasks:
                stack.takes_tasks = True
                stacks.append(stack)
    try:
        yield
    finally:
        for stack in stacks:
            stack.takes_tasks = False


class Part(NamedTuple):
    """The tokens of one task in the input of a layer.

    Attributes:
        task: its name.
        index_T: their numbers among the rows of the input; None: all.
        row_T: the row of the batch of each, 0..rows-1.
        rows: number of these rows.
        present: how many of them have tokens here.
    """

    task: str
    index_T: Tensor | None
    row_T: Tensor
    rows: int
    present: int

    def add(self, task: TaskStatistics, chosen: Chosen) -> None:
        """Add these tokens to the sums of their task."""
        task.rows += self.present
        add_choices(task, chosen.at(self.index_T), self.row_T, self.rows)


class Recorder:
    """Sum up what is seen of an adapter's layers.

    Args:
        log: to which everything is added.
        tasks: names of the tasks that batches number.
        angles: that turns are compared with; None: rotations are left out.
        planes: whether planes of rotation are summed up too.
        training: True: only training passes count.

    Attributes:
        counting: switch it off to leave out forward passes.
        calls: how many calls of layers were added.
    """

    def __init__(
        self,
        log: RoutingLog,
        *,
        tasks: Sequence[str] | None = None,
        angles: Sequence[float] | None = None,
        planes: bool = True,
        training: bool = False,
    ) -> None:
        self.log, self.names, self.planes, self.training = log, tasks, planes, training
        self.angles = None if angles is None else tuple(float(angle) for angle in angles)
        self.counting, self.calls = True, 0
        self._parts: tuple[weakref.ref[Batch], Any, list[Part]] | None = None
        self._room: dict[str, LayerStatistics] = {}
        self._spare: dict[tuple[int, str, torch.device], TaskStatistics] = {}

    def make_room(self, layers: Sequence[RotMoleLayer]) -> None:
        """Make the sums of all layers before the first forward pass.

        Made one by one in between the tensors of a pass, they would keep the C library from using
        the pass's memory again: 600 MB on SmolLM2-135M.
        """
        for layer in layers:
            self._room[layer.rotmole_path] = self._new(layer.experts(self.log.adapter))

    def observe(self, seen: Seen) -> None:
        """Add one call of one layer."""
        if not self.counting or (self.training and not seen.experts.training):
            return
        self.calls += 1
        layer = self.log.layers.get(seen.layer.rotmole_path)
        if layer is None:
            path = seen.layer.rotmole_path
            layer = self._room[path] if path in self._room else self._new(seen.experts)
            self.log.layers[path] = layer
        parts, selected_TE = self._parts_of(seen), seen.selected()
        turned = None if self.angles is None else seen.turns()
        chosen = Chosen.of(selected_TE, seen.routing)
        for part in parts:
            part.add(self._task(layer, part, selected_TE), chosen)
        if turned is not None:
            self._add_turns(layer, *turned, parts, len(selected_TE))
        if layer.shared is not None:
            self._add_shared(layer.shared, seen, parts)

    def _new(self, experts: Experts) -> LayerStatistics:
        spec, B_ERO = experts.spec, experts.expert_B
        every = spec.selection != "top_k" or spec.num_experts == 1
        layer = LayerStatistics(
            experts=spec.num_experts,
            top_k=spec.num_experts if every else spec.chosen,
            selection=spec.selection,
            rotation=spec.rotation,
            rank=B_ERO.shape[1],
            has_router=experts.has_router,
        )
        self._add_room_for_planes(layer, B_ERO)
        if spec.shared is not None:
            layer.shared = LayerStatistics(
                1, 1, "dense", spec.shared.rotation, experts.shared_B.shape[1], has_router=False
            )
            self._add_room_for_planes(layer.shared, B_ERO)
        return layer

    def _add_room_for_planes(self, layer: LayerStatistics, like: Tensor) -> None:
        turns_z = layer.rotation != "none" and ROTATIONS[layer.rotation].rotate is not None
        if turns_z and self.angles is not None and self._takes_planes(layer) and not like.is_meta:
            shape = layer.experts, layer.rank, layer.rank  # whole, where FSDP shards the like
            layer.planes_ERR = torch.zeros(shape, dtype=torch.float64, device=like.device)

    def _takes_planes(self, layer: LayerStatistics) -> bool:
        return self.planes and layer.rank <= PLANE_RANK

    def _task(self, layer: LayerStatistics, part: Part, like: Tensor) -> TaskStatistics:
        task = layer.tasks.get(part.task)
        if task is None:
            key = id(layer), part.task, like.device
            if key not in self._spare:
                for other in [layer, *_with_shared(self._room.values())]:
                    angles = None if other.rotation == "none" else self.angles
                    empty = TaskStatistics.empty(other.experts, like.device, angles)
                    self._spare.setdefault((id(other), part.task, like.device), empty)
            task = layer.tasks[part.task] = self._spare.pop(key)
        return task

    def _add_turns(
        self, layer: LayerStatistics, found: Turns, counted_NE: Tensor, parts: list[Part], T: int
    ) -> None:
        slots = len(counted_NE) // max(T, 1)
        for part in parts:
            index_N = part.index_T
            if index_N is not None and slots > 1:
                starts_K1 = torch.arange(slots, device=index_N.device)[:, None] * T
                index_N = (starts_K1 + index_N).flatten()
            counted_ME = counted_NE if index_N is None else counted_NE[index_N]
            angle_EMT = found.angle_EMT
            angle_EMT = angle_EMT if index_N is None else angle_EMT[..., index_N]
            rotation = layer.tasks[part.task].rotation
            assert rotation is not None
            add_turns(rotation, angle_EMT, counted_ME)
        if found.turned_ERT is not None and self._takes_planes(layer):
            known_NE = counted_NE
            if any(part.index_T is not None for part in parts) or not parts:
                known_NE = counted_NE & _marked(parts, T, counted_NE).repeat(slots, 1)
            add_planes(layer, found.z_ERT, found.turned_ERT, known_NE)

    def _add_shared(self, shared: LayerStatistics, seen: Seen, parts: list[Part]) -> None:
        weighed = seen.shared()
        assert weighed is not None
        weight_T1, turned = weighed
        all_T1 = torch.ones_like(weight_T1, dtype=torch.bool)
        chosen = Chosen(all_T1, weight_T1, torch.ones_like(weight_T1))
        for part in parts:
            part.add(self._task(shared, part, all_T1), chosen)
        if turned is not None and self.angles is not None:
            self._add_turns(shared, turned, all_T1, parts, len(all_T1))

    # ---- which tokens belong to which task

    def _parts_of(self, seen: Seen) -> list[Part]:
        """Return the unpadded tokens of a layer's input by task; worked out once a batch."""
        key = (seen.call.x.shape[:-1], id(self.log.task))
        known = self._parts
        if known is not None and known[0]() is seen.batch and known[1] == key:
            return known[2]
        parts = self._parts_anew(seen)
        if not seen.batch.is_outside:  # that one knows nothing and lives on
            self._parts = weakref.ref(seen.batch), key, parts
        return parts

    def _parts_anew(self, seen: Seen) -> list[Part]:
        count, device = len(seen.selected()), seen.call.x_TD.device
        layout, stack = seen.layout, seen.layer.rotmole_stack
        if seen.batch.unclear:
            stack.warn_once(
                "recorded padding",
                f"module {seen.layer.rotmole_path!r} cannot tell which tokens are padding "
                f"({seen.batch.unclear}): routing statistics count all; pass the attention mask as "
                "[rows, tokens]",
            )
        if layout is None:
            row_T, rows, mask_T = torch.zeros(count, dtype=torch.long, device=device), 1, None
        else:
            tokens = layout.tokens
            row_T, rows = tokens.numbers(count, device), max(tokens.sequences, 1)
            mask_T = tokens.mask_T
        names = self._names(seen, rows)
        if isinstance(names, str):
            return [_part(names, mask_T, row_T, rows)]
        parts = []
        for name in dict.fromkeys(names):
            of_rows = torch.tensor([each == name for each in names], device=device)
            mine_T = of_rows[row_T]
            parts.append(_part(name, mine_T if mask_T is None else mine_T & mask_T, row_T, rows))
        return parts

    def _names(self, seen: Seen, sequences: int) -> str | list[str]:
        """Return the task of all sequences of the batch, or that of each."""
        given, batch, layout = self.log.task, seen.batch, seen.layout
        if given is None and batch.tasks is not None:
            given = [self._named(number) for number in batch.tasks.tolist()]
        if given is None:
            return ALL
        if isinstance(given, str):
            return given
        names = list(given)
        rows = None if layout is None else layout.rows
        for known in {sequences, rows} - {None}:
            if names and known % len(names) == 0:  # of beams and returned sequences several a row
                each = [name for name in names for _ in range(known // len(names))]
                if known == sequences:
                    return each
                return self._by_sequence(each, seen, sequences)
        where = seen.layer.rotmole_path
        raise DataError(
            f"{len(names)} tasks are given, but the input of {where}, of shape "
            f"{tuple(seen.call.x.shape)}, has {rows or 'an unknown number of'} rows; give one name "
            "for all rows, or one for each row of the batch"
        )

    def _named(self, number: int) -> str:
        if self.names is None:
            return f"task {number}"
        if not 0 <= number < len(self.names):
            raise DataError(
                f"task_id holds {number}; it must lie in 0..{len(self.names) - 1}, because "
                f"{len(self.names)} tasks have names"
            )
        return self.names[number]

    def _by_sequence(self, each: list[str], seen: Seen, sequences: int) -> list[str]:
        """Return the task of each packed sequence, given that of each row."""
        assert seen.layout is not None
        count = len(seen.selected())
        number_T = seen.layout.tokens.numbers(count, seen.call.x_TD.device).tolist()
        names = [ALL] * sequences
        for token, number in enumerate(number_T):
            names[number] = each[token * len(each) // count]
        return names


def _with_shared(layers: Iterable[LayerStatistics]) -> Iterator[LayerStatistics]:
    for layer in layers:
        yield layer
        if layer.shared is not None:
            yield layer.shared


def _part(task: str, mask_T: Tensor | None, row_T: Tensor, rows: int) -> Part:
    index_T = None if mask_T is None or bool(mask_T.all()) else mask_T.nonzero().squeeze(-1)
    row_T = row_T if index_T is None else row_T[index_T]
    return Part(task, index_T, row_T, rows, int(row_T.unique().numel()))


def _marked(parts: list[Part], count: int, like: Tensor) -> Tensor:
    """Return [count, 1], True for the tokens of any part."""
    marked = torch.zeros(count, 1, dtype=torch.bool, device=like.device)
    for part in parts:
        marked[slice(None) if part.index_T is None else part.index_T] = True
    return marked
