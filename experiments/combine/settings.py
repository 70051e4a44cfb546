"""Settings of the gates: those that were tried on validation rows, and those of the final cells."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]


def tried(rate: float = 1e-3, updates: int = 90, **adapter: Any) -> Settings:
    """Return sections of a run file: dense routing without rotation, unless something is said."""
    return {
        "adapter": {"selection": "dense", "rotation": "none", **adapter},
        "training": {"learning_rate": rate, "max_steps": updates, "warmup_steps": 10},
    }


SEARCH: dict[str, Settings] = {
    "dense": tried(),
    "rate 5e-3": tried(rate=5e-3),
    "temperature 0.1": tried(router_temperature=0.1),
    "top 1": tried(selection="top_k", top_k=1, norm_topk_prob=False),
    "all parameters": {**tried(rate=5e-4), "experts_from": {"trainable": "all"}},
    "shared expert of rank 4": tried(shared_expert_r=4),
    "rotation": tried(rotation="tangent"),
}
FINAL: dict[int, Settings] = {60: tried(updates=60), 360: tried()}
