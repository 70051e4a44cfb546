"""Experts from trained LoRA adapters: what settings they need, and how they are stacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from rotmole.errors import ConfigError, ModelError, one_of
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.experts.experts import Experts, routed_factor
from rotmole.tuner.layer import RotMoleLayer
from rotmole.tuner.loras import Lora, base_problems, listed, names_of, read_loras

TRAINABLE = ("gates", "all")
DECIDED = (
    "num_experts", "r", "rank_pattern", "lora_alpha", "target_modules", "frozen", "init_weights",
    "expert_names",
)  # fmt: skip
"""Settings that follow from the adapters, from their names, and from what is trained."""
REFUSED = {
    "num_experts_pattern", "alpha_pattern", "use_rslora", "goat_eta", "share_A", "A_density",
}  # fmt: skip
"""Further settings that would change what the adapters computed."""


def from_adapters(
    base: nn.Module,
    paths: Sequence[str | Path],
    *,
    names: Sequence[str] | None = None,
    trainable: str = "gates",
    adapter_name: str = "default",
    **settings: Any,
) -> PeftModel:
    """Make a mixture whose experts are trained LoRA adapters.

    Expert e is adapter e. Its scale is multiplied into B; its rank is padded with zeros to the
    largest rank of a module. In a module that an adapter did not train, its expert adds nothing.
    With one adapter, the model computes what that adapter computes. routed_scaling_factor
    multiplies the weighted sum of the adapters.

    Args:
        base: the model that the adapters were trained on.
        paths: folders of LoRA adapters (adapter_config.json and adapter_model.safetensors), run
            folders, or ids on the hub. RotMoLE adapters with one expert and no rotation are LoRA.
        names: of the experts, in reports; None takes those of the folders.
        trainable: "gates" trains scaling and rotation gates alone; "all" trains the experts too.
        adapter_name: name of the new adapter.
        settings: of RotMoleConfig, such as top_k, selection, rotation; experts, ranks and modules
            follow from the adapters and cannot be set.

    Returns:
        An ordinary PeftModel; saving and loading it does not need the original adapters.

    Raises:
        AdapterError: a folder is damaged, or holds something that no expert can represent.
        ConfigError: settings that do not fit.
        ModelError: the base lacks a module, or its widths differ.

    Source: the idea of MoLE (arXiv 2404.13628) and X-LoRA (arXiv 2402.07148).
    """
    if isinstance(paths, (str, Path)) or not paths:
        raise ConfigError("paths must be a list of at least one adapter folder")
    taken = sorted({*DECIDED, *REFUSED} & settings.keys())
    if taken:
        raise ConfigError(f"{', '.join(taken)} cannot be set: the adapters decide it")
    if isinstance(base, PeftModel):
        raise ModelError("base is a PeftModel already; give the base model itself")
    loras = read_loras(paths)
    decided = decided_settings(loras, names or names_of(paths), trainable)
    tasks = {lora.config.get("task_type") for lora in loras}
    if len(tasks) == 1:
        settings = {"task_type": tasks.pop()} | settings
    config = RotMoleConfig(**decided, **settings)
    if problems := base_problems(base, loras):
        raise ModelError(listed(problems))
    model = get_peft_model(base, config, adapter_name=adapter_name)
    put_experts(model, loras, adapter_name)
    return model


def decided_settings(
    loras: Sequence[Lora], names: Sequence[str], trainable: str = "gates"
) -> dict[str, Any]:
    """Return the settings that adapters decide: the largest ranks, all modules.

    Args:
        trainable: "gates" or "all".

    Returns:
        A value for each name in DECIDED.

    Raises:
        ConfigError: trainable is something else.
    """
    if trainable not in TRAINABLE:
        raise ConfigError(one_of("trainable", trainable, TRAINABLE))
    ranks: dict[str, int] = {}
    for lora in loras:
        for module, (A, _) in lora.factors.items():
            ranks[module] = max(ranks.get(module, 0), A.shape[0])
    rank = max(ranks.values())
    return {
        "num_experts": len(loras),
        "r": rank,
        "rank_pattern": {module: other for module, other in ranks.items() if other != rank},
        "lora_alpha": loras[0].scale(next(iter(loras[0].factors))) * rank,
        "target_modules": sorted(ranks),
        "frozen": "AB" if trainable == "gates" else "none",
        "init_weights": True,
        "expert_names": list(names),
    }


def differing(config: RotMoleConfig, loras: Sequence[Lora]) -> list[str]:
    """Say in which settings a configuration is not that of these adapters."""
    decided = decided_settings(loras, ())
    same: Mapping[str, Any] = vars(config)
    same = {**same, "target_modules": sorted(config.target_modules or ())}
    return [
        f"{name} is {same[name]!r}, the adapters have {decided[name]!r}"
        for name in ("num_experts", "r", "rank_pattern", "lora_alpha", "target_modules")
        if same[name] != decided[name]
    ]


@torch.no_grad()
def put_experts(model: PeftModel, loras: Sequence[Lora], adapter_name: str) -> None:
    """Copy every adapter's factors into its expert; padded ranks add nothing, because B is 0 there.

    Each adapter's own scale is multiplied into B over the layer's without routed_scaling_factor.
    If experts are trained, padded rows of A keep their random start, so that they can learn;
    otherwise they are zero.
    """
    factor = routed_factor(model.peft_config[adapter_name])
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, RotMoleLayer) and adapter_name in layer.rotmole_experts:
            experts = layer.experts(adapter_name)
            _fill(experts, name, loras, scale=experts.spec.scale / factor)


def _fill(experts: Experts, name: str, loras: Sequence[Lora], *, scale: float) -> None:
    if "expert_A" in experts.frozen:
        experts.expert_A.zero_()
    experts.expert_B.zero_()
    for e, lora in enumerate(loras):
        if name in lora.factors:
            A, B = lora.factors[name]
            experts.expert_A[e, : len(A)] = A
            experts.expert_B[e, : len(A)] = B.T * (lora.scale(name) / scale)
