"""Experts from trained PEFT LoRA adapters: read them, check them, stack them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rotmole.errors import AdapterError, ConfigError, ModelError, one_of
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.experts.experts import Experts, routed_factor
from rotmole.tuner.layer import RotMoleLayer
from rotmole.tuner.targets import linear_widths

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

READ = {
    "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
    "fan_in_fan_out", "init_lora_weights", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "megatron_core", "runtime_config",
}  # fmt: skip
"""Keys of a LoRA configuration that are read, or that do not change what was trained."""

REASONS = {
    "use_dora": "DoRA divides by the norm of the merged weight, which no expert can do by itself",
    "bias": "trained biases are not low-rank experts",
    "lora_bias": "a bias of B is not a low-rank factor",
    "modules_to_save": "whole trained modules cannot be mixed token by token",
    "trainable_token_indices": "trained embeddings cannot be mixed token by token",
    "target_parameters": "only the weights of linear layers can have experts",
    "layer_replication": "it changes the base model",
}
DECIDED = {
    "num_experts_pattern", "alpha_pattern", "use_rslora", "goat_eta", "share_A", "A_density",
}  # fmt: skip
"""Further settings that follow from the adapters and cannot be set."""

CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Lora:
    """One trained adapter.

    Attributes:
        path: the folder it was read from.
        config: adapter_config.json.
        factors: module path in the base model -> (A [R, D], B [O, R]), the scale not applied.
    """

    path: str
    config: dict[str, Any]
    factors: dict[str, tuple[Tensor, Tensor]]

    def scale(self, module: str) -> float:
        """Return what the adapter multiplies by in a module: alpha / r, or alpha / sqrt(r)."""
        rank = self.factors[module][0].shape[0]
        pattern = self.config.get("alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(list(pattern), module), self.config["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))


def from_adapters(
    base: nn.Module,
    paths: Sequence[str | Path],
    *,
    trainable: str = "gates",
    adapter_name: str = "default",
    **settings: Any,
) -> PeftModel:
    """Make a mixture whose experts are trained PEFT LoRA adapters.

    Expert e is adapter e. Its scale is multiplied into B; its rank is padded with zeros to the
    largest rank of a module. In a module that an adapter did not train, its expert adds nothing.
    With one adapter, the model computes what that adapter computes. routed_scaling_factor
    multiplies the weighted sum of the adapters.

    Args:
        base: the model that the adapters were trained on.
        paths: folders of LoRA adapters (adapter_config.json and adapter_model.safetensors).
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
    if trainable not in ("gates", "all"):
        raise ConfigError(one_of("trainable", trainable, ("gates", "all")))
    if isinstance(paths, (str, Path)) or not paths:
        raise ConfigError("paths must be a list of at least one adapter folder")
    if isinstance(base, PeftModel):
        raise ModelError("base is a PeftModel already; give the base model itself")
    loras = [read_lora(path) for path in paths]
    config = _config(loras, settings, trainable)
    _check_base(base, loras)
    model = get_peft_model(base, config, adapter_name=adapter_name)
    factor = routed_factor(config)
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, RotMoleLayer):
            experts = layer.experts(adapter_name)
            scale = experts.spec.scale / factor
            _fill(experts, name, loras, scale=scale, keep_drawn=trainable == "all")
    return model


def read_lora(path: str | Path) -> Lora:
    """Read the LoRA adapter in a folder; its weights must be safetensors.

    Raises:
        AdapterError: see `from_adapters`.
    """
    folder = Path(path)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            pickled = file == WEIGHTS and (folder / "adapter_model.bin").exists()
            hint = "; pickle files can run code and are not opened" if pickled else ""
            raise AdapterError(f"adapter folder {str(path)!r} has no {file}{hint}.")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (ValueError, OSError, SafetensorError) as error:
        raise AdapterError(f"adapter folder {str(path)!r} is damaged: {error}.") from error
    problems = [*_config_problems(config), *_tensor_problems(tensors)]
    if problems:
        raise AdapterError(f"adapter {str(path)!r} cannot be an expert: {'; '.join(problems)}.")
    return Lora(str(path), config, _factors(tensors))


def _config_problems(config: Any) -> list[str]:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        return [f"its peft_type is {kind!r}, not 'LORA'"]
    defaults = LoraConfig().to_dict()
    problems = []
    for key, value in config.items():
        if key not in READ and value and value != defaults.get(key):
            reason = REASONS.get(key, "rotmole does not know what it adds to LoRA")
            problems.append(f"{key} is {value!r} ({reason})")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_THE_BASE):
        problems.append(f"init_lora_weights is {init!r} (it changed the base weights)")
    missing = [key for key in ("r", "lora_alpha") if not isinstance(config.get(key), (int, float))]
    return problems + [f"{key} is missing or not a number" for key in missing]


def _tensor_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    factors = (".lora_A.weight", ".lora_B.weight")
    for key, value in tensors.items():
        if not key.endswith(factors):
            problems.append(f"it holds {key}, which is not a factor of a linear layer")
        elif not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            problems.append(f"{key} is {value.dtype} or not finite")
        elif _partner(key) not in tensors:
            problems.append(f"{_partner(key)} is missing")
        elif key.endswith(factors[0]) and value.shape[0] != tensors[_partner(key)].shape[1]:
            problems.append(f"{key} and its lora_B have different ranks")
    return problems[:5] or ([] if tensors else ["it holds no tensor"])


def _partner(key: str) -> str:
    stem, letter, weight = key.rsplit(".", 2)
    return f"{stem}.lora_{'B' if letter == 'lora_A' else 'A'}.{weight}"


def _factors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    factors = {}
    for key, value in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            factors[module] = (value.float(), tensors[_partner(key)].float())
    return factors


def _config(loras: Sequence[Lora], settings: Mapping[str, Any], trainable: str) -> RotMoleConfig:
    """Return settings that every adapter fits: the largest ranks, all modules."""
    ranks: dict[str, int] = {}
    for lora in loras:
        for module, (A, _) in lora.factors.items():
            ranks[module] = max(ranks.get(module, 0), A.shape[0])
    rank = max(ranks.values())
    first = next(iter(loras[0].factors))
    tasks = {lora.config.get("task_type") for lora in loras}
    followed: dict[str, Any] = {
        "num_experts": len(loras),
        "r": rank,
        "rank_pattern": {module: other for module, other in ranks.items() if other != rank},
        "lora_alpha": loras[0].scale(first) * rank,
        "target_modules": sorted(ranks),
        "frozen": "AB" if trainable == "gates" else "none",
        "init_weights": True,
    }
    taken = sorted((followed.keys() | DECIDED) & settings.keys())
    if taken:
        raise ConfigError(f"{', '.join(taken)} cannot be set: the adapters decide it")
    if len(tasks) == 1:
        followed["task_type"] = tasks.pop()
    return RotMoleConfig(**(followed | dict(settings)))


def _check_base(base: nn.Module, loras: Sequence[Lora]) -> None:
    modules = dict(base.named_modules())
    for lora in loras:
        for name, (A, B) in lora.factors.items():
            if name not in modules:
                raise ModelError(
                    f"adapter {lora.path!r} adapts {name!r}, which this base model does not have; "
                    "give the base model that the adapter was trained on"
                )
            widths = linear_widths(modules[name])
            if widths is None:
                raise ModelError(
                    f"adapter {lora.path!r} adapts {name!r}, which in this base model is a "
                    f"{type(modules[name]).__name__}, not a linear layer; give the base model that "
                    "the adapter was trained on"
                )
            if (A.shape[1], B.shape[0]) != widths:
                raise ModelError(
                    f"adapter {lora.path!r} maps {A.shape[1]} features to {B.shape[0]} in "
                    f"{name!r}; this base model's layer maps {widths[0]} to {widths[1]}. Give the "
                    "base model that the adapter was trained on"
                )


@torch.no_grad()
def _fill(
    experts: Experts, name: str, loras: Sequence[Lora], *, scale: float, keep_drawn: bool
) -> None:
    """Copy every adapter's factors into its expert; padded ranks add nothing, because B is 0 there.

    Each adapter's own scale is multiplied into B over `scale`, the layer's without the factor.
    If experts are trained, padded rows of A keep their random start, so that they can learn;
    otherwise they are zero.
    """
    if not keep_drawn:
        experts.expert_A.zero_()
    experts.expert_B.zero_()
    for e, lora in enumerate(loras):
        if name in lora.factors:
            A, B = lora.factors[name]
            experts.expert_A[e, : len(A)] = A
            experts.expert_B[e, : len(A)] = B.T * (lora.scale(name) / scale)
