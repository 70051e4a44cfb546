"""The `optimizer:` section beside the rest of the run file: what does not go together, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def optimizer_problems(section: Mapping[str, Any], training: Mapping[str, Any]) -> list[str]:
    """Say what a Riemannian optimiser cannot work with.

    Args:
        section: `optimizer:` as parsed.
        training: the checked `training:` section.

    Returns:
        One sentence per problem.

    Source: our choice.
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
