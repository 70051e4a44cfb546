"""Adapted layers that no gradient reaches, named once."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rotmole.tuner.layer import RotMoleLayer

logger = logging.getLogger(__name__)

_LISTED = 12
"""So many layers are named one by one; more are grouped by their names without numbers."""


class GradientCallback(TrainerCallback):
    """Warn once, at the first update, of adapted layers without a gradient.

    Such a layer was not called, or what it computed did not reach the loss: it is counted and
    saved, and stays as it began. Costs nothing after the first update.
    """

    def __init__(self) -> None:
        self.done = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradients of the first update."""
        if self.done:
            return
        self.done = True
        names, number = layers_without_gradient(kwargs["model"])
        if names and state.is_world_process_zero:
            logger.warning(
                "%d of %d adapted layers had no gradient in the first update, so they do not "
                "learn: %s. The model does not call them, or the loss does not depend on them: "
                "leave them out by adapter.exclude_modules (a layer of a mixture of experts in "
                "the base model may only have had no token)",
                len(names), number, named(names),
            )  # fmt: skip


def layers_without_gradient(model: nn.Module) -> tuple[list[str], int]:
    """Find adapted layers none of whose trained parameters has a gradient.

    Args:
        model: after a backward pass, before gradients are set to None.

    Returns:
        Their paths, and the number of adapted layers that have trained parameters.
    """
    names, number = [], 0
    for path, layer in model.named_modules():
        if not isinstance(layer, RotMoleLayer):
            continue
        active = [experts for name, experts in layer.rotmole_experts.items()
                  if name in layer.active_adapters]  # fmt: skip
        trained = [p for experts in active for p in experts.parameters() if p.requires_grad]
        number += bool(trained)
        if trained and all(p.grad is None for p in trained):
            names.append(re.sub(r"^(module\.)?(_orig_mod\.)?(base_model\.model\.)?", "", path))
    return names, number


def named(names: Sequence[str]) -> str:
    """Name modules, many of them in groups.

    >>> named(["layers.0.out_proj", "head"])
    'layers.0.out_proj, head'
    >>> named([f"layers.{i}.out_proj" for i in range(30)])
    'layers.*.out_proj (30)'
    """
    if len(names) <= _LISTED:
        return ", ".join(names)
    groups = Counter(re.sub(r"\b\d+\b", "*", name) for name in names)
    return ", ".join(f"{name} ({count})" for name, count in groups.items())
