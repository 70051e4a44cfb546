"""The rules of RotMoleConfig's settings about experts: sharing, freezing, patterns, starts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rotmole.tuner.experts.initial import INITS

if TYPE_CHECKING:
    from rotmole.tuner.config import RotMoleConfig

FROZEN = ("none", "A", "AB")


def expert_problems(config: RotMoleConfig) -> Iterator[str]:
    """Yield what is wrong with each setting about experts, and between them."""
    for name in ("num_experts_pattern", "top_k_pattern"):
        yield from _pattern_problems(name, getattr(config, name))
    if not isinstance(config.share_A, bool):
        yield f"share_A is {config.share_A!r}; it must be true or false"
    if config.frozen not in FROZEN:
        yield f"frozen is {config.frozen!r}; it must be one of {', '.join(FROZEN)}"
    if not any(config.init_weights is value or config.init_weights == value for value in INITS):
        yield f"init_weights is {config.init_weights!r}; it must be true, false, gaussian or svd"
    if not (is_number(config.A_density) and 0 < config.A_density <= 1):
        yield f"A_density is {config.A_density!r}; it must lie in 0 < A_density <= 1"
    elif config.A_density < 1:
        yield from _sparse_problems(config)
    if config.goat_eta is not None and not (is_number(config.goat_eta) and config.goat_eta > 0):
        yield f"goat_eta is {config.goat_eta!r}; it must be a number above 0 or null"
    if config.share_A is True and config.init_weights == "svd":
        yield "share_A is True; init_weights 'svd' starts each expert at an A of its own"
    if config.init_weights == "svd" and config.router_scope == "block":
        yield "init_weights is 'svd', whose residual router_scope 'block' cannot subtract"
    if config.share_A is True and config.router == "magnitude":
        yield "share_A is True; router 'magnitude' would give all experts the same score |A x|"


def _sparse_problems(config: RotMoleConfig) -> Iterator[str]:
    if config.frozen == "none":
        yield (
            f"A_density is {config.A_density!r} but frozen is 'none'; the first update would fill "
            "the zeros of A, so set frozen: A"
        )
    if config.init_weights == "svd":
        yield f"A_density is {config.A_density!r}; init_weights 'svd' gives a dense A"


def _pattern_problems(name: str, pattern: object) -> Iterator[str]:
    values = pattern
    if isinstance(pattern, dict):
        values = list(pattern.values())
    if not isinstance(values, list):
        yield f"{name} is {pattern!r}; it must map module patterns to numbers, or be a list of them"
        return
    for value in values:
        if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            yield f"{name} holds {value!r}; its values must be whole numbers of at least 1"


def is_number(value: object) -> bool:
    """Tell whether a setting is a finite number, which true and false are not."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type] # checked the line before


def is_routed(config: RotMoleConfig) -> bool:
    """Tell whether any module may have more than one expert, hence a router."""
    pattern = config.num_experts_pattern
    values = list(pattern.values()) if isinstance(pattern, dict) else pattern
    numbers = [config.num_experts, *(values if isinstance(values, list) else [])]
    return any(isinstance(number, int) and number > 1 for number in numbers)


def expert_notices(config: RotMoleConfig) -> Iterator[str]:
    """Yield one sentence for each setting about experts that has no effect with the others."""
    idle = {
        "share_A": config.share_A and not is_routed(config),
        "top_k_pattern": bool(config.top_k_pattern)
        and config.selection not in ("top_k", "expert_choice"),
        "use_rslora": config.goat_eta is not None and config.use_rslora,
        "alpha_pattern": config.goat_eta is not None and bool(config.alpha_pattern),
    }
    for name, is_idle in idle.items():
        if is_idle:
            yield f"{name}={getattr(config, name)!r} has no effect with the other settings"
