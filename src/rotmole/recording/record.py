"""Record what an adapter's routers and rotations do, in whatever forward passes are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rotmole.recording.log import RoutingLog
from rotmole.recording.statistics import ANGLES


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
    raise NotImplementedError
    yield RoutingLog()
