"""Parameter groups by role: experts, scaling gate, rotation gate, everything else."""

from __future__ import annotations

from typing import Any

from torch import nn

from rotmole.tuner.experts.experts import EXPERT, ROTATION_GATE, SCALING_GATE
from rotmole.tuner.layer import RotMoleLayer

OTHER = "other"


def _roles(model: nn.Module) -> dict[int, str]:
    """Map id(parameter) to the role that its Experts module gives it; names do not matter."""
    roles: dict[int, str] = {}
    for module in model.modules():
        if not isinstance(module, RotMoleLayer):
            continue
        for adapter_name in module.rotmole_experts:
            experts = module.experts(adapter_name)
            for name, parameter in experts.named_parameters(recurse=False):
                roles[id(parameter)] = experts.role(name)
            roles |= {id(B): "expert_B" for B in experts.output_factors()}
    return roles


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    scaling_gate_lr: float | None = None,
    rotation_gate_lr: float | None = None,
    lora_plus_ratio: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return the trainable parameters of a model as optimiser groups by role.

    Args:
        model: any model with rotmole adapters.
        lr: learning rate of A and of all other trained parameters (modules_to_save, embeddings).
        scaling_gate_lr: learning rate of the scaling gate's routers; None means lr.
        rotation_gate_lr: learning rate of the rotation gates; None means lr.
        lora_plus_ratio: learning rate of B divided by that of A; None means 1.
        weight_decay: of all groups, except that parameters with fewer than two axes get 0.

    Returns:
        Groups {"params", "lr", "weight_decay", "role"} with role "expert", "expert_B",
        "scaling_gate", "rotation_gate" or "other"; empty roles are left out. The grouping depends
        on roles and axes alone, so a saved optimizer state can be loaded with other rates.

    Source: LoRA+ (arXiv 2402.12354) for the ratio.
    """
    rates = {
        EXPERT: lr,
        "expert_B": lr * (1.0 if lora_plus_ratio is None else lora_plus_ratio),
        SCALING_GATE: lr if scaling_gate_lr is None else scaling_gate_lr,
        ROTATION_GATE: lr if rotation_gate_lr is None else rotation_gate_lr,
        OTHER: lr,
    }
    roles = _roles(model)
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = roles.get(id(parameter), OTHER), parameter.ndim >= 2
            members.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates[role],
            "weight_decay": weight_decay if decays else 0.0,
            "role": role,
        }
        for (role, decays), parameters in members.items()
    ]
