"""Trained LoRA adapters: read from folders or the hub, and checked before they become experts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rotmole.errors import AdapterError
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.storage.weights import EXPERTS
from rotmole.tuner.targets import linear_widths

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NO_NAME = re.compile(r"adapter|lora|checkpoint-\d+")
"""Folders that a run or a trainer names; the name of the folder around them says more."""

_READ = {
    "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
    "fan_in_fan_out", "init_lora_weights", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "megatron_core", "runtime_config",
}  # fmt: skip
"""Keys of a LoRA configuration that are read, or that do not change what was trained."""

_REASONS = {
    "use_dora": "DoRA divides by the norm of the merged weight, which no expert can do by itself",
    "bias": "trained biases are not low-rank experts",
    "lora_bias": "a bias of B is not a low-rank factor",
    "modules_to_save": "whole trained modules cannot be mixed token by token",
    "trainable_token_indices": "trained embeddings cannot be mixed token by token",
    "target_parameters": "only the weights of linear layers can have experts",
    "layer_replication": "it changes the base model",
}

_READ_OF_ONE_EXPERT = _READ | {
    "num_experts", "top_k", "rotation", "init_weights", "format_version", "base_fingerprint",
    "selection", "scoring", "norm_topk_prob", "top_p", "frozen", "A_density", "share_A", "dispatch",
    "compute_dtype", "kernels", "expert_names",
}  # fmt: skip
"""The same of a RotMoLE adapter with one expert, which is LoRA; settings of routers come too."""

_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MOST = 5  # problems of one adapter that are named


@dataclass(frozen=True)
class Lora:
    """One trained adapter.

    Attributes:
        path: the folder or hub id that was given.
        config: adapter_config.json.
        factors: module path in the base model -> (A [R, D], B [O, R]), the scale not applied.
    """

    path: str
    config: dict[str, Any]
    factors: dict[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(A.shape[0] for A, _ in self.factors.values())

    def scale(self, module: str) -> float:
        """Return what the adapter multiplies by in a module: alpha / r, or alpha / sqrt(r)."""
        rank = self.factors[module][0].shape[0]
        pattern = self.config.get("alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(list(pattern), module), self.config["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))


def read_lora(path: str | Path) -> Lora:
    """Read one LoRA adapter; its weights must be safetensors.

    Args:
        path: a folder of an adapter, a run folder with an adapter in it, or an id on the hub.
            The adapter is PEFT's LoRA, or RotMoLE with one expert and rotation none.

    Raises:
        AdapterError: it is missing or damaged, or holds something that no expert can represent.
    """
    folder = _folder(path)
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
    problems = _config_problems(config)
    if not problems and config["peft_type"] == "ROTMOLE":
        tensors = dict(_as_lora(tensors))
    problems += _tensor_problems(tensors)
    if problems:
        raise AdapterError(f"adapter {str(path)!r} cannot be an expert: {'; '.join(problems)}.")
    return Lora(str(path), config, _factors(tensors))


def read_loras(paths: Sequence[str | Path]) -> list[Lora]:
    """Read several LoRA adapters.

    Raises:
        AdapterError: the problems of all of them.
    """
    loras, problems = [], []
    for path in paths:
        try:
            loras.append(read_lora(path))
        except AdapterError as error:
            problems.append(str(error))
    if problems:
        raise AdapterError(listed(problems))
    return loras


def listed(problems: Sequence[str]) -> str:
    """Write one problem as it is, and several as a list."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:" + "".join(f"\n  - {p.rstrip('.')}" for p in problems)


def names_of(paths: Sequence[str | Path]) -> list[str]:
    """Name adapters by their folders or hub ids; equal names get a number.

    >>> names_of(["runs/math/adapter", "me/code-lora", "other/code-lora"])
    ['math', 'code-lora', 'code-lora-2']
    """
    names: list[str] = []
    for path in paths:
        parts = [p for p in Path(path).expanduser().resolve().parts if not _NO_NAME.fullmatch(p)]
        name = re.sub(r"[^\w.+-]+", "-", parts[-1]).strip("-") or "expert"
        number, free = 1, name
        while free in names:
            number += 1
            free = f"{name}-{number}"
        names.append(free)
    return names


def base_problems(base: nn.Module, loras: Sequence[Lora]) -> list[str]:
    """Say which adapters do not fit a base model; a model without weights is enough.

    Returns:
        One sentence for each adapter and kind of fault, with the first module that has it.
    """
    modules = dict(base.named_modules())
    problems = []
    for lora in loras:
        faults: dict[str, list[str]] = {}
        for name, (A, B) in lora.factors.items():
            kind, sentence = _misfit(modules.get(name), name, A.shape[1], B.shape[0])
            if kind:
                faults.setdefault(kind, []).append(sentence)
        for sentences in faults.values():
            more = f" (and {len(sentences) - 1} more modules)" if len(sentences) > 1 else ""
            problems.append(
                f"adapter {lora.path!r} {sentences[0]}{more}; give the base model that the "
                "adapter was trained on"
            )
    return problems


def _misfit(module: nn.Module | None, name: str, inputs: int, outputs: int) -> tuple[str, str]:
    """Return the kind of fault and a sentence on it; empty if a module fits."""
    if module is None:
        return "missing", f"adapts {name!r}, which this base model does not have"
    widths = linear_widths(module)
    if widths is None:
        kind = type(module).__name__
        return kind, f"adapts {name!r}, which in this base model is a {kind}, not a linear layer"
    if (inputs, outputs) != widths:
        return "widths", (
            f"maps {inputs} features to {outputs} in {name!r}; this base model's layer maps "
            f"{widths[0]} to {widths[1]}"
        )
    return "", ""


def _folder(path: str | Path) -> Path:
    """Return where an adapter lies; one of the hub is fetched first."""
    folder = Path(path).expanduser()
    if (folder / "adapter" / CONFIG).is_file() and not (folder / CONFIG).is_file():
        return folder / "adapter"
    if folder.exists():
        return folder
    if not _HUB_ID.fullmatch(str(path)):
        raise AdapterError(
            f"adapter {str(path)!r}: there is no such folder; give a folder, or owner/name of an "
            "adapter on the hub."
        )
    try:
        for file in (CONFIG, WEIGHTS):
            place = hf_hub_download(str(path), file)
    except Exception as error:  # huggingface_hub and its transports raise errors of many classes
        short = " ".join(str(error).split())[:200]
        raise AdapterError(
            f"adapter {str(path)!r}: there is no such folder, and {CONFIG} and {WEIGHTS} cannot be "
            f"fetched from the hub ({short}). Check the spelling and the network (and whether "
            "HF_HUB_OFFLINE is set), or give a folder."
        ) from error
    return Path(place).parent


def _config_problems(config: Any) -> list[str]:
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind == "ROTMOLE":
        problems = _one_expert_problems(config)
    elif kind == "LORA":
        problems = _unlike(config, LoraConfig().to_dict(), _READ)
    else:
        return [f"its peft_type is {kind!r}, not 'LORA'"]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_THE_BASE):
        problems.append(f"init_lora_weights is {init!r} (it changed the base weights)")
    missing = [key for key in ("r", "lora_alpha") if not isinstance(config.get(key), (int, float))]
    return problems + [f"{key} is missing or not a number" for key in missing]


def _unlike(config: dict[str, Any], defaults: Mapping[str, Any], read: set[str]) -> list[str]:
    """Say which settings do more than LoRA does."""
    return [
        f"{key} is {value!r} ({_REASONS.get(key, 'rotmole does not know what it adds to LoRA')})"
        for key, value in config.items()
        if key not in read and value and value != defaults.get(key)
    ]


def _one_expert_problems(config: dict[str, Any]) -> list[str]:
    """Say why a RotMoLE adapter is not one LoRA."""
    experts, rotation = config.get("num_experts"), config.get("rotation")
    problems = []
    if experts != 1 or config.get("num_experts_pattern"):
        problems.append(f"num_experts is {experts!r} (an expert is one adapter, not a mixture)")
    if rotation != "none":
        problems.append(f"rotation is {rotation!r} (its gate would be lost)")
    if config.get("init_weights") == "svd":
        problems.append("init_weights is 'svd' (it changed the base weights)")
    defaults = {f.name: f.default for f in fields(RotMoleConfig) if f.default is not MISSING}
    routers = {key for key in config if key.startswith("router")}
    return problems or _unlike(config, defaults, _READ_OF_ONE_EXPERT | routers)


def _as_lora(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the factors of a single expert under LoRA's names and in its shapes."""
    for key, value in tensors.items():
        module, _, name = key.partition(EXPERTS)
        if name == "expert_A" and value.shape[0] == 1:
            yield f"{module}.lora_A.weight", value[0]
        elif name == "expert_B" and value.shape[0] == 1:
            yield f"{module}.lora_B.weight", value[0].T
        else:
            yield key, value


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
    return problems[:_MOST] or ([] if tensors else ["it holds no tensor"])


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
