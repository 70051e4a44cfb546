"""Rules between sections of a run file: which settings contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rotmole.config.schema import TaskSection
from rotmole.config.training import NO_VALIDATION, saves_when_it_validates


def optimizer_problems(
    section: Mapping[str, Any], training: Mapping[str, Any], adapter: Mapping[str, Any]
) -> list[str]:
    """Say which settings an optimizer of our own cannot work with.

    Args:
        section: `optimizer:` as parsed.
        training: the checked `training:` section.
        adapter: the checked `adapter:` section.

    Returns:
        One sentence per problem.
    """
    name, problems = section.get("name"), []
    if section.get("expert_lr_by_load") == "sqrt":
        problems += _rates_by_load_problems(name or training.get("optim"), training)
    if name is None:
        return problems
    if "peft_type" in adapter:
        problems.append(
            f"optimizer.name: {name} works on the experts of ROTMOLE, and adapter.peft_type is "
            f"{adapter['peft_type']}; use training.optim."
        )
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


def _rates_by_load_problems(optimizer: Any, training: Mapping[str, Any]) -> list[str]:
    head = "optimizer.expert_lr_by_load: sqrt"
    problems = []
    if optimizer in ("sgd", "riemannian_sgd"):
        problems.append(
            f"{head} does not fit {optimizer}, whose step for an expert is as long as its share of "
            "the tokens already; drop it, or choose an optimizer of Adam's kind."
        )
    if training.get("fsdp"):
        problems.append(
            f"{head} needs each expert whole, which training.fsdp shards; train with DDP (leave "
            "training.fsdp out), or drop it."
        )
    return problems


def early_stopping_problems(
    section: Mapping[str, Any], training: Mapping[str, Any], validated: bool
) -> list[str]:
    """Say what early stopping lacks.

    Args:
        section: `evaluation:` as parsed.
        training: the arguments of SFTConfig, with all defaults.
        validated: whether any task may have validation rows.

    Returns:
        One sentence per problem.
    """
    patience = section.get("early_stopping_patience")
    head = f"evaluation.early_stopping_patience: {patience} needs"
    if not patience:
        return []
    if not validated:
        return [f"{head} {NO_VALIDATION}"]
    if training.get("eval_strategy", "no") == "no":
        return [f"{head} validation, but training.eval_strategy is no; write steps or epoch."]
    if not training.get("load_best_model_at_end", saves_when_it_validates(training)):
        return [
            f"{head} the best checkpoint at the end: training.load_best_model_at_end must not be "
            "false, and save_strategy and save_steps must follow eval_strategy and eval_steps."
        ]
    return []


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
