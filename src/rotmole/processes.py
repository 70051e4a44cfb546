"""What the processes of one run must agree on: who writes, when to stop, shared results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from rotmole.errors import ConfigError

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def is_main_process() -> bool:
    """Tell whether this process writes the run folder: the only one, or torchrun's first."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Return the number of processes of the run, as the launcher said it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def highest(value: int, device: torch.device | str = "cpu") -> int:
    """Return the largest of a number over all processes, so that all go the same way.

    Args:
        value: this process's number.
        device: where the processes' backend communicates.

    Returns:
        The maximum; `value` itself where there is one process. Every process must call this.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    shared = torch.tensor(value, device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared)


@contextmanager
def joined() -> Iterator[bool]:
    """Let the processes that a launcher started exchange what they find, inside the block.

    Yields:
        Whether there are several; one process alone joins nobody.
    """
    if world_size() == 1:
        yield False
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield True
    finally:
        torch.distributed.destroy_process_group()


def same_everywhere(what: str, value: Any) -> None:
    """Refuse to go on where processes chose differently.

    Args:
        what: the setting that would decide it.
        value: this process's choice. Every process must call this.

    Raises:
        ConfigError: two processes have two values.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, str(value))
    if len(set(values)) > 1:
        raise ConfigError(f"the processes chose {', '.join(values)} by themselves; set {what}")


def smallest(value: int, *, spread: bool) -> int:
    """Return the smallest value of all joined processes, each of which must call this.

    Args:
        spread: whether there are any; otherwise the value is returned.
    """
    if not spread:
        return value
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return min(values)


def over_batches(
    batches: Sequence[Batch],
    work: Callable[[Batch], Mapping[int, Result]],
    done: Callable[[Sequence[Batch]], None] | None = None,
    *,
    spread: bool = False,
) -> dict[int, Result]:
    """Work through batches; each of N processes takes every N-th, and all get all results.

    The batches are those of one process, so every figure is its figure, to the last bit.

    Args:
        batches: the same in every process.
        work: batch -> results by the number of the row.
        done: called with the batches that are finished, as far as this process knows.
        spread: share the batches among the joined processes, all of which must call this.

    Returns:
        The results of all batches.
    """
    rank, size = 0, 1
    if spread:
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results: dict[int, Result] = {}
    for start in range(0, len(batches), size):
        turn = batches[start : start + size]
        if rank < len(turn):
            results |= work(turn[rank])
        if done is not None:
            done(turn)
    if size == 1:
        return results
    parts: list[Any] = [None] * size
    torch.distributed.all_gather_object(parts, results)
    return {number: value for part in parts for number, value in part.items()}
