"""Settings that differ from module to module: by a pattern of names, or by depth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, make_dataclass, replace
from typing import TYPE_CHECKING, Any

from peft.utils.other import get_pattern_key
from torch import nn

from rotmole.errors import ConfigError

if TYPE_CHECKING:
    from rotmole.tuner.config import RotMoleConfig


def depth_share(model: nn.Module, name: str, parts: int) -> int | None:
    """Tell in which of `parts` equal parts of the model's depth a module lies.

    Args:
        model: the base model.
        name: path of the module.
        parts: into how many parts the list of layers is cut.

    Returns:
        0 to parts - 1; None for a module that is in no numbered list of layers.
    """
    found = re.match(r"(.+?)\.(\d+)(?:\.|$)", name)
    if found is None:
        return None
    layers = model.get_submodule(found[1])
    return int(found[2]) * parts // len(list(layers.children()))


def value_for(
    pattern: Mapping[str, int] | Sequence[int], default: int, model: nn.Module, name: str
) -> int:
    """Find a module's value.

    Args:
        pattern: {pattern of names: value}, as PEFT's rank_pattern; or a list, one value for each
            equal part of the depth, the first for the layers next to the input.
        default: what holds where nothing matches.
        model: the base model.
        name: path of the module.

    Returns:
        The value.
    """
    if isinstance(pattern, Mapping):
        return pattern.get(get_pattern_key(list(pattern), name), default)
    part = depth_share(model, name, len(pattern)) if pattern else None
    return default if part is None else pattern[part]


def plain_settings(config: Any) -> Any:  # shim until Settings is there
    """Return a plain copy."""
    if type(config).__name__ == "Settings":
        return config
    names = [entry.name for entry in fields(config)]
    kind = make_dataclass("Settings", names)
    return kind(**{name: getattr(config, name) for name in names})


def module_settings(config: RotMoleConfig, model: nn.Module, name: str) -> Any:
    """Return the settings of one module: r, lora_alpha, num_experts and top_k after all patterns.

    Args:
        config: the adapter's settings; it is left as it is.
        model: the base model.
        name: path of the module.

    Returns:
        A copy.

    Raises:
        ConfigError: the module would have fewer experts than a token is to use.
    """
    key = get_pattern_key(list(config.alpha_pattern), name)
    assert config.top_k is not None
    experts = value_for(config.num_experts_pattern, config.num_experts, model, name)
    top_k = 1 if experts == 1 else value_for(config.top_k_pattern, config.top_k, model, name)
    if top_k > experts:
        raise ConfigError(
            f"module {name!r} has {experts} experts by num_experts_pattern, but a token is "
            f"to use {top_k}; lower top_k, or set top_k_pattern"
        )
    return replace(
        plain_settings(config),
        r=value_for(config.rank_pattern, config.r, model, name),
        lora_alpha=config.alpha_pattern.get(key, config.lora_alpha),
        num_experts=experts,
        top_k=top_k,
    )
