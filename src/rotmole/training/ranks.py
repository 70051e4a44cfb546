"""What the processes of one run must agree on: who writes, when to stop, what one of them found."""

from __future__ import annotations

import os

import torch


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

    Source: our choice.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    shared = torch.tensor(value, device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared)
