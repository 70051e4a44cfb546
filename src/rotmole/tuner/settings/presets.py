"""Presets: the settings of published mixtures of low-rank experts; data only.

A preset holds the settings that define a method. Settings that a comparison must hold equal (rank,
lora_alpha, dropout, modules) are left out; only FlyLoRA sets the rank, because its experts have
rank one. docs/family.md has the equations, and every difference from the authors' code.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rotmole.errors import ConfigError, one_of


@dataclass(frozen=True)
class Preset:
    """One published method.

    Attributes:
        paper: arXiv number.
        about: one line.
        fields: settings of RotMoleConfig.
    """

    paper: str
    about: str
    fields: Mapping[str, Any]


PRESETS: dict[str, Preset] = {
    "lora": Preset(
        "2106.09685", "one expert, no gate: LoRA itself",
        {"num_experts": 1, "rotation": "none"},
    ),
    "moe_lora": Preset(
        "1701.06538", "top-k softmax gate over LoRA experts",
        {"num_experts": 4, "top_k": 2, "rotation": "none"},
    ),
    "hydralora": Preset(
        "2404.19245", "one A for all experts, every B weighed by a softmax",
        {"num_experts": 4, "selection": "dense", "share_A": True, "rotation": "none"},
    ),
    "loramoe": Preset(
        "2312.09979", "dense softmax, experts of a task's group favoured by a localised loss",
        {
            "num_experts": 6, "selection": "dense", "rotation": "none",
            "router_task_loss_coef": 0.1, "router_task_offset": 0.1,
        },
    ),
    "mola": Preset(
        "2402.08562", "more experts in higher layers: 2, 4, 6, 8 by quarter of the depth",
        {"num_experts": 8, "num_experts_pattern": [2, 4, 6, 8], "top_k": 2, "rotation": "none"},
    ),
    "mixlora": Preset(
        "2404.15159", "one router for a feed-forward block, plain LoRA on attention",
        {
            "num_experts": 8, "top_k": 2, "rotation": "none", "router_scope": "block",
            "router_aux_loss_coef": 0.01, "target_modules": "all-linear",
        },
    ),
    "adamole": Preset(
        "2405.00361", "experts above a learned threshold",
        {
            "num_experts": 8, "selection": "threshold", "rotation": "none",
            "router_aux_loss_coef": 1e-3,
        },
    ),
    "goat": Preset(
        "2502.16894", "experts from segments of the weight's SVD, closed-form scale",
        {
            "num_experts": 8, "top_k": 2, "rotation": "none", "init_weights": "svd",
            "goat_eta": 1.0, "router_aux_loss_coef": 1e-3,
        },
    ),
    "switch": Preset(
        "2101.03961", "one expert a token, weighed by its probability",
        {
            "num_experts": 8, "top_k": 1, "norm_topk_prob": False, "rotation": "none",
            "router_aux_loss_coef": 0.01,
        },
    ),
    "top_p": Preset(
        "2403.07652", "the fewest experts that hold a share of the probability",
        {
            "num_experts": 8, "selection": "top_p", "top_p": 0.4, "norm_topk_prob": False,
            "rotation": "none",
        },
    ),
    "deepseekmoe": Preset(
        "2401.06066", "a shared expert that every token uses, beside routed ones",
        {
            "num_experts": 8, "top_k": 2, "norm_topk_prob": False, "rotation": "none",
            "shared_expert_r": 16, "router_aux_loss_coef": 1e-3,
        },
    ),
    "radargate": Preset(
        "2505.23184", "each expert's output rotated by what the other selected experts say",
        {"num_experts": 4, "top_k": 2, "rotation": "radar"},
    ),
    "rotmole": Preset(
        "2605.25565", "each selected expert's activation rotated in a plane, token by token",
        {"num_experts": 4, "top_k": 2, "rotation": "tangent"},
    ),
    "flylora": Preset(
        "2510.08396", "rank-one experts on one frozen sparse A that is the router as well",
        {
            "r": 1, "lora_alpha": 2, "num_experts": 32, "top_k": 8, "rotation": "none",
            "router": "magnitude", "router_bias_rate": 1e-3, "frozen": "A", "A_density": 0.25,
            "init_weights": "gaussian",
        },
    ),
    "deepseek_v3": Preset(
        "2412.19437", "sigmoid scores balanced by a bias, their weighted sum times 2.5",
        {
            "num_experts": 8, "top_k": 2, "scoring": "sigmoid", "rotation": "none",
            "router_bias_rate": 1e-3, "routed_scaling_factor": 2.5, "shared_expert_r": 8,
        },
    ),
}  # fmt: skip


FREE = frozenset({
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save",
    "trainable_token_indices", "compute_dtype", "kernels",
})  # fmt: skip
"""Settings that belong to no method: a comparison of methods holds them equal."""


def contradictions(name: str, settings: Mapping[str, Any]) -> list[str]:
    """Return the settings that make a preset another method than its name says.

    Words, flags and a number of 1 of the preset must stay; its other numbers may change, but not
    to 0, null, or, if they count something, 1.

    Args:
        name: a key of PRESETS.
        settings: further settings of RotMoleConfig.

    >>> contradictions("lora", {"r": 4, "rotation": "tangent"})
    ['rotation']
    >>> contradictions("moe_lora", {"num_experts": 8})
    []
    """
    return [
        key
        for key, meant in PRESETS[name].fields.items()
        if key in settings and key != "target_modules" and not _still(meant, settings[key])
    ]


def _still(meant: Any, value: Any) -> bool:
    if isinstance(meant, (str, bool)):
        return bool(value == meant)
    if isinstance(meant, int):
        return value == meant if meant == 1 else isinstance(value, int) and value > 1
    return bool(value)


def preset_fields(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a preset, with `overrides` in place of those they name.

    Args:
        name: a key of PRESETS.
        overrides: settings of RotMoleConfig.

    Raises:
        ConfigError: no preset of that name.

    >>> preset_fields("lora", {"r": 4})
    {'num_experts': 1, 'rotation': 'none', 'r': 4}
    """
    if name not in PRESETS:
        raise ConfigError(one_of("preset", name, PRESETS))
    return copy.deepcopy(dict(PRESETS[name].fields)) | dict(overrides)
