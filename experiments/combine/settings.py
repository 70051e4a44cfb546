"""Settings of the gates: those that were tried on validation rows, and those of the final cells."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]


def tried(
    rate: float = 1e-3,
    updates: int = 90,
    trainable: str = "gates",
    gate_rate: float | None = None,
    **adapter: Any,
) -> Settings:
    """Return sections of a run file: dense routing without rotation, unless something is said."""
    return {
        "adapter": {"selection": "dense", "rotation": "none", **adapter},
        "experts_from": {"trainable": trainable},
        "training": {"learning_rate": rate, "max_steps": updates, "warmup_steps": 10},
        "optimizer": {"scaling_gate_lr": gate_rate},
    }


TASKS = {"router_task_loss_coef": 1.0, "router_task_groups": 2, "router_task_offset": 0.9}
"""LoRAMoE's localised loss: each part's rows shall use its own expert, 19 to 1."""

SEARCH: dict[str, Settings] = {
    "dense": tried(),
    "rate 5e-3": tried(5e-3),
    "temperature 0.1": tried(router_temperature=0.1),
    "top 1": tried(selection="top_k", top_k=1, norm_topk_prob=False),
    "task loss, rate 5e-3": tried(5e-3, **TASKS),
    "all parameters": tried(5e-4, trainable="all"),
    "all parameters, gates at 5e-3": tried(5e-4, trainable="all", gate_rate=5e-3),
    "all parameters, gates at 0": tried(5e-4, trainable="all", gate_rate=0.0),
    "all parameters at 1e-3, gates at 5e-3": tried(1e-3, trainable="all", gate_rate=5e-3),
}
FINAL: dict[str, dict[int, Settings]] = {
    "all parameters": {
        60: tried(5e-4, 45, trainable="all", gate_rate=5e-3),
        360: tried(5e-4, 90, trainable="all", gate_rate=5e-3),
    },
    "gates": {60: tried(5e-3, 45), 360: tried(5e-3, 90)},
    "experts": {360: tried(5e-4, 90, trainable="all", gate_rate=0.0)},
}
"""Rows of each part -> settings; the first are those of `rotmole combine`."""
