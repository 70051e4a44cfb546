"""The rules of RotMoleConfig's settings about the scaling gate: routers, scores, selections."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rotmole.ops.routing.routers import ROUTERS
from rotmole.ops.routing.selection import SELECTIONS
from rotmole.tuner.settings.expert_rules import is_number

if TYPE_CHECKING:
    from rotmole.tuner.config import RotMoleConfig


def router_problems(config: RotMoleConfig) -> Iterator[str]:
    """Yield what is wrong with numbers about the scaling gate, each by itself."""
    for name, least in (("router_dim", 1), ("router_seed", 0)):
        count: object = getattr(config, name)
        if name == "router_dim" and count is None:
            continue
        if not (isinstance(count, int) and not isinstance(count, bool) and count >= least):
            yield f"{name} is {count!r}; it must be a whole number of at least {least}"
    ranges = {
        "router_temperature": (
            config.router_temperature is None or _between(config.router_temperature, least=0),
            "a number above 0, or null",
        ),
        "router_jitter": (
            is_number(config.router_jitter) and 0 <= config.router_jitter < 1,
            "a number with 0 <= router_jitter < 1",
        ),
        "top_p": (_between(config.top_p, least=0, most=1), "a number with 0 < top_p <= 1"),
        "router_bias_rate": (
            is_number(config.router_bias_rate) and config.router_bias_rate >= 0,
            "a number of at least 0",
        ),
    }
    for name, (is_right, rule) in ranges.items():
        if not is_right:
            yield f"{name} is {getattr(config, name)!r}; it must be {rule}"


def _between(value: float, *, least: float, most: float = math.inf) -> bool:
    return is_number(value) and least < value <= most


def router_rule_problems(config: RotMoleConfig, broken: set[str]) -> Iterator[str]:
    """Yield rules between settings of the scaling gate that are broken."""
    if "selection" in broken:
        return
    row = SELECTIONS[config.selection]
    if "scoring" not in broken and config.scoring not in row.scorings:
        yield (
            f"scoring is {config.scoring!r} but selection is {row.name!r}; that selection needs "
            "probabilities that sum to one, so scoring: softmax, or selection: top_k or dense"
        )
    if "router" not in broken and ROUTERS[config.router].weight != "learned":
        if row.name != "top_k":
            yield (
                f"router is {config.router!r} but selection is {row.name!r}; its scores say which "
                "experts, not how much of each, so selection: top_k"
            )
        if config.router == "hash" and is_number(config.router_bias_rate):
            yield from _hash_problems(config)
    biased = is_number(config.router_bias_rate) and config.router_bias_rate > 0
    if biased and row.name != "top_k":
        yield (
            f"router_bias_rate is {config.router_bias_rate} but selection is {row.name!r}; the "
            "bias moves which experts are the K best, so selection: top_k"
        )
    if row.sequences and getattr(config.task_type, "value", config.task_type) == "CAUSAL_LM":
        yield (
            f"selection is {row.name!r} but task_type is 'CAUSAL_LM'; experts would choose among "
            "tokens that are not written yet, so training and generation would differ: use top_k"
        )


def _hash_problems(config: RotMoleConfig) -> Iterator[str]:
    if config.router_bias_rate > 0:
        yield (
            f"router_bias_rate is {config.router_bias_rate} but router is 'hash'; a token's "
            "experts are fixed by its id, so router_bias_rate: 0"
        )


def router_notices(config: RotMoleConfig, routed: bool) -> Iterator[str]:
    """Yield one sentence for each setting of the scaling gate that has no effect with the others.

    Args:
        config: settings that are right.
        routed: whether any module has more than one expert.
    """
    router, selection = ROUTERS[config.router], SELECTIONS[config.selection]
    learned = router.weight == "learned"
    plain_dense = config.selection == "dense" and config.scoring == "softmax"
    idle = {
        "router": not routed and config.router != "linear",
        "scoring": config.scoring != "softmax" and not (routed and learned),
        "norm_topk_prob": not config.norm_topk_prob
        and (plain_dense or not selection.normalises or not (routed and learned)),
        "top_p": config.top_p != type(config).top_p and not (routed and selection.name == "top_p"),
        "router_dim": config.router_dim is not None and not (routed and router.hidden),
        "router_temperature": config.router_temperature is not None and not (routed and learned),
        "router_jitter": config.router_jitter > 0 and not (routed and router.reads != "ids"),
        "router_seed": config.router_seed != 0 and not (routed and router.reads == "ids"),
        "router_bias_rate": config.router_bias_rate > 0 and not routed,
        "router_aux_loss_coef": config.router_aux_loss_coef > 0 and not (routed and learned),
        "router_z_loss_coef": config.router_z_loss_coef > 0 and not (routed and learned),
    }
    for name, is_idle in idle.items():
        if is_idle:
            yield f"{name}={getattr(config, name)!r} has no effect with the other settings"
