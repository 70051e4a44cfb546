"""The rules of RotMoleConfig's settings about task groups, the sqrt-gate and block routing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rotmole.tuner.settings.expert_rules import is_number

if TYPE_CHECKING:
    from rotmole.tuner.config import RotMoleConfig

ROUTER_SCOPES = ("layer", "block")


def balance_problems(config: RotMoleConfig) -> Iterator[str]:
    """Yield what is wrong with each of these settings by itself."""
    weight, offset = config.router_task_loss_coef, config.router_task_offset
    if not (is_number(weight) and weight >= 0):
        yield f"router_task_loss_coef is {weight!r}; it must be a number of at least 0"
    if not (is_number(offset) and 0 <= offset < 1):
        yield f"router_task_offset is {offset!r}; it must lie in 0 <= router_task_offset < 1"
    groups: object = config.router_task_groups
    if not (isinstance(groups, int) and not isinstance(groups, bool) and groups >= 1):
        yield f"router_task_groups is {groups!r}; it must be a whole number of at least 1"
    if not isinstance(config.router_sqrt_gate, bool):
        yield f"router_sqrt_gate is {config.router_sqrt_gate!r}; it must be true or false"
    if config.router_scope not in ROUTER_SCOPES:
        yield f"router_scope is {config.router_scope!r}; it must be one of layer, block"


def balance_rule_problems(config: RotMoleConfig, broken: set[str]) -> Iterator[str]:
    """Yield rules between these settings and others that are broken."""
    task = {"router_task_loss_coef", "router_task_groups", "num_experts", "num_experts_pattern"}
    if not broken & task and config.router_task_loss_coef:
        groups, patterns = config.router_task_groups, config.num_experts_pattern
        counts = patterns.values() if isinstance(patterns, dict) else patterns
        for count in {config.num_experts, *counts}:
            if 1 < count < groups:
                yield (
                    f"router_task_groups is {groups} but a module has {count} experts; each group "
                    "needs an expert of its own, so router_task_groups <= num_experts"
                )
    radar = config.rotation in ("radar", "radar_pairs")
    if config.router_sqrt_gate is True and radar:
        yield (
            f"router_sqrt_gate is True but rotation is {config.rotation!r}, which mixes the "
            "experts' outputs before they are weighed; choose another rotation"
        )
    if config.router_scope == "block":
        yield from _block_problems(config, radar)


def _block_problems(config: RotMoleConfig, radar: bool) -> Iterator[str]:
    """Yield why experts that are whole feed-forward blocks cannot be mixed that way."""
    constant = config.selection == "dense" and config.scoring == "softmax"
    sums_to_one = config.selection in ("top_k", "dense", "top_p") and config.router != "magnitude"
    if not sums_to_one or not (config.norm_topk_prob or constant):
        yield (
            "router_scope is 'block', where whole feed-forward blocks are weighed, so a token's "
            "weights must sum to one; that needs selection top_k, dense or top_p with "
            f"norm_topk_prob (here: selection {config.selection!r}, norm_topk_prob "
            f"{config.norm_topk_prob!r}, router {config.router!r})"
        )
    if radar:
        yield (
            f"router_scope is 'block' but rotation is {config.rotation!r}, which lets experts' "
            "outputs turn each other within one layer; choose another rotation"
        )
    if config.router_sqrt_gate is True:
        yield "router_scope is 'block'; router_sqrt_gate is defined for single layers only"


def balance_notices(config: RotMoleConfig, routed: bool) -> Iterator[str]:
    """Yield one sentence for each of these settings that has no effect with the others.

    Args:
        config: settings that are right.
        routed: whether any module has more than one expert.
    """
    off = config.router_task_loss_coef == 0
    block = config.router_scope == "block"
    idle = {
        "router_task_loss_coef": not off and not routed,
        "router_task_offset": off and config.router_task_offset != type(config).router_task_offset,
        "router_task_groups": off and config.router_task_groups != type(config).router_task_groups,
        "router_sqrt_gate": config.router_sqrt_gate and not routed,
        "router_scope": block and not routed,
        "dispatch": block and config.dispatch == "grouped",
    }
    for name, is_idle in idle.items():
        if is_idle:
            yield f"{name}={getattr(config, name)!r} has no effect with the other settings"
    if block and config.compute_dtype == "input":
        yield (
            "compute_dtype='input' acts on modules outside of feed-forward blocks only, because "
            "router_scope is 'block'"
        )
