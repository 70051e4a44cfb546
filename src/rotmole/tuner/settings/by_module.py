"""The settings of one module: patterns of names, and values by depth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from peft.utils.other import get_pattern_key
from torch import nn

from rotmole.errors import ConfigError
from rotmole.tuner.settings.settings import Settings


def depth_share(model: nn.Module, name: str, parts: int) -> int | None:
    """Return in which of `parts` equal parts of the model's depth a module is.

    Args:
        model: the base model.
        name: path of the module.
        parts: number of parts into which the list of layers is divided.

    Returns:
        0 to parts - 1; None for a module that is in no numbered list of layers.
    """
    match = re.match(r"(.+?)\.(\d+)(?:\.|$)", name)
    if match is None:
        return None
    layers = model.get_submodule(match[1])
    return int(match[2]) * parts // len(list(layers.children()))


def value_for(
    pattern: Mapping[str, int] | Sequence[int], default: int, model: nn.Module, name: str
) -> int:
    """Return a module's value of a setting that has a pattern.

    Args:
        pattern: {pattern of names: value}, as PEFT's rank_pattern; or a list, one value for each
            equal part of the depth, the first for the layers next to the input.
        default: the value if nothing matches.
        model: the base model.
        name: path of the module.
    """
    if isinstance(pattern, Mapping):
        return pattern.get(get_pattern_key(list(pattern), name), default)
    part = depth_share(model, name, len(pattern)) if pattern else None
    return default if part is None else pattern[part]


def module_settings(settings: Settings, model: nn.Module, name: str) -> Settings:
    """Return the settings of one module: r, lora_alpha, num_experts and top_k after all patterns.

    Args:
        settings: the adapter's, such as its RotMoleConfig.
        model: the base model.
        name: path of the module.

    Raises:
        ConfigError: the module would have fewer experts than a token is to use.
    """
    num_experts = value_for(settings.num_experts_pattern, settings.num_experts, model, name)
    assert settings.top_k is not None
    top_k = value_for(settings.top_k_pattern, settings.top_k, model, name)
    if num_experts == 1:
        top_k = 1
    if top_k > num_experts:
        raise ConfigError(
            f"module {name!r} has {num_experts} experts by num_experts_pattern, but a token is "
            f"to use {top_k}; lower top_k, or set top_k_pattern"
        )
    alpha_key = get_pattern_key(list(settings.alpha_pattern), name)
    return replace(
        settings.plain(),
        r=value_for(settings.rank_pattern, settings.r, model, name),
        lora_alpha=settings.alpha_pattern.get(alpha_key, settings.lora_alpha),
        num_experts=num_experts,
        top_k=top_k,
    )
