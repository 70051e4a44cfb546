"""A static LoRA as an ordinary PEFT adapter folder, which loads where rotmole is not installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save
from torch import Tensor

from rotmole.export.static_lora import StaticLayer
from rotmole.files import atomic_write_bytes
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.storage.weights import EXPERTS, WEIGHTS

KEPT = (
    "task_type", "base_model_name_or_path", "revision", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices",
    "ensure_weight_tying",
)  # fmt: skip
"""Settings that mean the same for LoRA: which modules are adapted, and what else was trained."""


def write_lora(
    folder: Path,
    layers: Mapping[str, StaticLayer],
    config: RotMoleConfig,
    other: Mapping[str, Tensor],
) -> None:
    """Write adapter_config.json and adapter_model.safetensors of a plain LoRA.

    Args:
        folder: exists.
        layers: path of a layer in the base model -> its static LoRA, all of one rank.
        config: the mixture's.
        other: what was trained beside the experts, from `trained_beside`.
    """
    rank = len(next(iter(layers.values())).A_RD)
    settings: dict[str, Any] = {name: getattr(config, name, None) for name in KEPT}
    lora = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", inference_mode=True,
        **{name: value for name, value in settings.items() if value is not None},
    )  # fmt: skip
    tensors = dict(other)
    for path, layer in layers.items():
        for name, value in (("lora_A", layer.A_RD), ("lora_B", layer.B_OR)):
            key = f"base_model.model.{path}.{name}.weight"
            tensors[key] = value.to(torch.float32).contiguous()
    atomic_write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    lora.save_pretrained(str(folder))


def trained_beside(adapter: Path) -> dict[str, Tensor]:
    """Return the tensors of a mixture's folder that are no experts: whole modules, embeddings."""
    tensors = load_file(adapter / WEIGHTS)
    return {name: value for name, value in tensors.items() if EXPERTS not in f".{name}"}
