"""Rules between sections of a run file: which settings contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rotmole.config.schema import TaskSection


def optimizer_problems(section: Mapping[str, Any], training: Mapping[str, Any]) -> list[str]:
    """Say which settings an optimizer of our own cannot work with.

    Args:
        section: `optimizer:` as parsed.
        training: the checked `training:` section.

    Returns:
        One sentence per problem.
    """
    name = section.get("name")
    if name is None:
        return []
    problems = []
    if "optim" in training:
        problems.append(
            f"training.optim and optimizer.name ({name}) both choose the optimizer; drop one."
        )
    if training.get("fsdp"):
        problems.append(
            f"optimizer.name: {name} needs the whole of A and B, which training.fsdp shards; "
            "train with DDP (leave training.fsdp out), or drop optimizer.name."
        )
    return problems


def task_group_problems(tasks: Mapping[str, TaskSection], adapter: Mapping[str, Any]) -> list[str]:
    """Say which tasks name a group of experts that the adapter does not have.

    Args:
        tasks: the tasks without a problem of their own.
        adapter: the checked `adapter:` section.

    Returns:
        One sentence per problem.
    """
    groups = adapter.get("router_task_groups", 2)
    if not adapter.get("router_task_loss_coef") or not isinstance(groups, int):
        return []
    return [
        f"data.tasks.{name}.task_group: {task.task_group} must be below "
        f"adapter.router_task_groups, which is {groups}."
        for name, task in tasks.items()
        if task.task_group is not None and task.task_group >= groups
    ]
