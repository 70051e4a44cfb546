"""Task ids on their way to the routers: taken out of a batch by a hook, for the localised loss."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rotmole.errors import DataError

if TYPE_CHECKING:
    from rotmole.tuner.batch.losses import BalanceState

KEY = "task_id"


def _keep_tasks(
    states: Sequence[BalanceState], module: nn.Module, args: Any, kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook: remember the [N] task groups of the batch; the model never sees them."""
    for state in states:
        state.tasks, state.checked_groups = kwargs.get(KEY), 0
    return args, {name: value for name, value in kwargs.items() if name != KEY}


def watch_tasks(model: nn.Module, states: Sequence[BalanceState]) -> Any:
    """Hook a model so that `task_id` of its batch, [N], reaches the states of its stacks.

    Args:
        model: the base model.
        states: of its stacks.

    Returns:
        The hook's handle.
    """
    for state in states:
        state.wants_tasks = True
    hook = partial(_keep_tasks, list(states))
    return model.register_forward_pre_hook(hook, with_kwargs=True)


def tasks_for(state: BalanceState, x: Tensor, groups: int) -> Tensor | None:
    """Return the [N] task groups if they belong to x [N, ..., D]; warn once if there are none.

    Raises:
        DataError: one of them is no group of the adapter at hand, which has `groups`.
    """
    if x.dim() < 3:
        return None
    if state.tasks is None:
        if not state.warned_of_tasks and not torch.compiler.is_compiling():
            state.warned_of_tasks = True
            warnings.warn(
                f"router_task_loss_coef is on, but the batch has no {KEY} (whole numbers, one a "
                "row), so that loss does not act; give it beside input_ids",
                stacklevel=2,
            )
        return None
    if state.checked_groups != groups and not torch.compiler.is_compiling():
        _check(state.tasks, groups)
        state.checked_groups = groups  # once a batch, not once a layer
    if x.shape[0] != state.tasks.shape[0]:
        return None
    return state.tasks.to(x.device)


def _check(tasks: Tensor, groups: int) -> None:
    low, high = (int(tasks.min()), int(tasks.max())) if tasks.numel() else (0, 0)
    if low < 0 or high >= groups:
        raise DataError(
            f"{KEY} holds {low if low < 0 else high}; it is the group of a row's task and must "
            f"lie in 0..{groups - 1}, because router_task_groups is {groups}"
        )
